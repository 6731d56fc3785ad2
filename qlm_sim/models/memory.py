"""GPU memory: how many KV cache blocks remain beside weights and activations, as vLLM counts them.

Knows sizes only; nothing of time.
"""

from qlm_sim.errors import InputError
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.models.hardware import GpuProfile
from qlm_sim.models.specs import ModelSpec
from qlm_sim.models.step_time import kv_bytes_per_gpu_token

GIB = 2**30
SAMPLER_COPIES = 10
"""32-bit copies of the logits alive at the sampler's peak: logits, sorted values and their 64-bit
indices, masks, probabilities. vLLM's log for Llama-3-8B (256 sequences, 128,256 tokens of vocabulary)
tells a peak of 1.26 GiB at tp 1 and tp 2 alike, which is 10.3 copies (vLLM pull request 10511)."""
DEGREES = (1, 2, 4, 8)
"""Tensor-parallel degrees that are tried when a model does not fit."""


def activation_bytes(model: ModelSpec, tp: int, config: EngineConfig) -> float:
    """Peak activations on one GPU in vLLM's profiling run, in bytes.

    The larger of one layer over max_num_batched_tokens tokens (hidden state and residual, whole; gate,
    up and their product, split by tp) and the sampler over max_num_seqs rows of the vocabulary.
    """
    width = 2 * model.hidden_size + 3 * model.intermediate_size / tp
    layer = config.max_num_batched_tokens * width * model.dtype_bytes
    sampler = SAMPLER_COPIES * 4 * config.max_num_seqs * model.vocab_size
    return max(layer, sampler)


def _gpu_bytes(
    model: ModelSpec, gpu: GpuProfile, tp: int, config: EngineConfig
) -> tuple[float, float, float]:
    """Weights, overhead and budget of one GPU, in bytes."""
    overhead = gpu.runtime_bytes.value + activation_bytes(model, tp, config)
    if tp > 1:
        overhead += gpu.tp_runtime_bytes.value
    return model.weight_bytes / tp, overhead, config.gpu_memory_utilization * gpu.memory_bytes.value


def kv_capacity_blocks(model: ModelSpec, gpu: GpuProfile, tp: int, config: EngineConfig) -> int:
    """KV cache blocks of ``config.block_size`` tokens on an instance of ``tp`` GPUs.

    gpu_memory_utilization x memory - weights - activations - runtime, per GPU, unless the config tells
    num_gpu_blocks. Raises InputError where nothing is left, with the arithmetic.
    """
    if tp < 1 or model.heads % tp:
        raise InputError(
            f"tp = {tp} does not divide the {model.heads} attention heads of {model.name}; "
            f"possible: {', '.join(str(degree) for degree in DEGREES if model.heads % degree == 0)}"
        )
    if config.num_gpu_blocks is not None:
        return config.num_gpu_blocks
    blocks = _blocks(model, gpu, tp, config)
    if blocks > 0:
        return blocks
    weights, overhead, budget = _gpu_bytes(model, gpu, tp, config)
    fits = [
        degree for degree in DEGREES if model.heads % degree == 0 and _blocks(model, gpu, degree, config) > 0
    ]
    raise InputError(
        f"{model.name} does not fit on {tp} x {gpu.name}: weights {weights / GIB:.2f} GiB + "
        f"overhead {overhead / GIB:.2f} GiB per GPU leave no KV cache block in "
        f"{config.gpu_memory_utilization:g} x {gpu.memory_bytes.value / GIB:.2f} GiB "
        f"= {budget / GIB:.2f} GiB; "
        + (f"the smallest tp that fits is {fits[0]}" if fits else "no tp up to 8 fits")
    )


def _blocks(model: ModelSpec, gpu: GpuProfile, tp: int, config: EngineConfig) -> int:
    weights, overhead, budget = _gpu_bytes(model, gpu, tp, config)
    return int((budget - weights - overhead) // (config.block_size * kv_bytes_per_gpu_token(model, tp)))
