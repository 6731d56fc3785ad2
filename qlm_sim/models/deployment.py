"""One model on one instance, as the scheduler and the engine see it: the single door to this package."""

from qlm_sim.core.types import ModelOnInstance
from qlm_sim.errors import InputError
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.models.engines import load_engine
from qlm_sim.models.hardware import GpuProfile
from qlm_sim.models.memory import kv_capacity_blocks
from qlm_sim.models.specs import ModelSpec
from qlm_sim.models.step_time import step_model
from qlm_sim.models.swap import host_rate, load_s, swap_in_s


def deploy(
    model: ModelSpec,
    gpu: GpuProfile,
    tp: int,
    config: EngineConfig,
    *,
    engine: str,
    storage_bytes_per_s: float,
) -> ModelOnInstance:
    """What ``model`` costs on ``tp`` GPUs under ``engine`` ("vllm-0.11").

    ``max_model_len`` is the config's, and refused where the KV cache cannot hold it, as vLLM does; where
    the config sets none it is the model's own, or what the KV cache holds if that is less (vLLM's
    ``--max-model-len auto``). Raises InputError.
    """
    capacity = kv_capacity_blocks(model, gpu, tp, config) * config.block_size
    if config.max_model_len is not None and config.max_model_len > capacity:
        raise InputError(
            f"max_model_len = {config.max_model_len} of {model.name} exceeds the {capacity} tokens that the "
            f"KV cache of {tp} x {gpu.name} holds; at most {capacity} fits"
        )
    return ModelOnInstance(
        step=step_model(model, gpu, tp, load_engine(engine)),
        kv_capacity_tokens=capacity,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len or min(model.max_model_len, capacity),
        weight_bytes=model.weight_bytes,
        kv_bytes_per_token=model.kv_bytes_per_token,
        swap_in_s=swap_in_s(model, gpu, tp),
        load_s=load_s(model, gpu, tp, storage_bytes_per_s),
        kv_restore_token_s=model.kv_bytes_per_token / tp / host_rate(gpu, tp),
        intake_s=gpu.intake_s.value if gpu.intake_s else 0.0,
    )
