"""Engine settings, named and defaulted as vLLM's command line has them."""

from dataclasses import dataclass

from qlm_sim.core.types import ModelOnInstance
from qlm_sim.errors import InputError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine. Defaults are vLLM V1's for its API server."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    """Tokens per KV cache block."""
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    """Longest prompt + output in tokens; None takes the model's own."""
    scheduling_policy: str = "fcfs"
    """Order of requests that wait inside the engine: "fcfs" or "priority"."""
    scheduler_reserve_full_isl: bool | None = None
    """Admit a request only where its whole prompt fits the free KV blocks, not just its first chunk. None
    does as the engine's version (0.19 and later do), where it is known, and else does not."""
    watermark: float = 0.0
    """Share of the KV blocks to keep free when a waiting request is admitted beside running ones."""
    enable_prefix_caching: bool = False
    """Find the KV blocks of requests that began alike (vLLM does so by default). It needs a trace that tells
    what its requests have in common."""
    num_gpu_blocks: int | None = None
    """KV cache blocks, where an engine's log told them; None computes them from memory."""


def check_limits(profile: ModelOnInstance, config: EngineConfig) -> None:
    """Raises InputError where an engine could not run a request."""
    if profile.max_num_batched_tokens < profile.max_num_seqs:
        raise InputError(
            f"max_num_batched_tokens = {profile.max_num_batched_tokens} is less than max_num_seqs = "
            f"{profile.max_num_seqs}; every running request needs a token per iteration"
        )
    if profile.kv_capacity_tokens < config.block_size:
        raise InputError(
            f"kv_capacity_tokens = {profile.kv_capacity_tokens} does not hold one block of "
            f"{config.block_size} tokens"
        )


def default_limits(gpu_title: str, memory_bytes: float) -> dict[str, int]:
    """max_num_seqs and max_num_batched_tokens of vLLM V1's API server where nothing sets them.

    vLLM takes larger ones on GPUs of 70 GiB and more, the A100 excepted (its engine arguments, since 0.8).
    """
    if memory_bytes >= 70 * 2**30 and "a100" not in gpu_title.lower():
        return {"max_num_seqs": 1024, "max_num_batched_tokens": 8192}
    return {"max_num_seqs": 256, "max_num_batched_tokens": 2048}
