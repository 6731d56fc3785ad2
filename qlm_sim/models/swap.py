"""Model swaps: seconds to bring weights onto the GPUs of an instance, from host memory or storage.

A swap from host memory is vLLM's sleep mode waking up, not a cold start of the engine (40 to 100 s).
Knows bytes and rates only.
"""

from qlm_sim.models.hardware import GpuProfile
from qlm_sim.models.specs import ModelSpec

LOADER_BYTES_PER_S = 5e9
"""Rate at which one process reads safetensors into host memory however fast the storage is. Estimate: whole
loads from the page cache ran at 5.3 (H100, 65 GB), 3.6 (H100, 16 GB), 3.2 (A100, 8 GB) and 2.7 GB/s (A5000,
13 GB), the copy to the GPU included; with that copy apart, 5 GB/s leaves +19, -12, -7 and -27 %."""


def host_rate(gpu: GpuProfile, tp: int) -> float:
    """Bytes per second that each of ``tp`` GPUs gets when all copy from host memory together."""
    return min(gpu.host_bytes_per_s.value, gpu.host_total_bytes_per_s.value / tp)


def swap_in_s(model: ModelSpec, gpu: GpuProfile, tp: int) -> float:
    """Seconds to load the weights from host memory: a fixed part and each GPU's share over its link."""
    return gpu.wake_s.value + model.weight_bytes / tp / host_rate(gpu, tp)


def load_s(model: ModelSpec, gpu: GpuProfile, tp: int, storage_bytes_per_s: float) -> float:
    """Seconds to load the weights from storage: read into host memory, then swapped in.

    Each of the tp processes reads its share; together they are bound by the storage.
    """
    return model.weight_bytes / min(storage_bytes_per_s, LOADER_BYTES_PER_S * tp) + swap_in_s(model, gpu, tp)
