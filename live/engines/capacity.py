"""What an engine tells of its capacity goes before what its profile promises."""

from dataclasses import replace

from live.engines.backend import EngineFacts
from qlm_sim.core.types import ModelOnInstance


def fitted(promised: ModelOnInstance, facts: EngineFacts | None) -> ModelOnInstance:
    """``promised`` with the engine's own KV capacity and limits."""
    if facts is None:
        return promised
    capacity = promised.kv_capacity_tokens
    if facts.num_gpu_blocks and facts.block_size:
        capacity = facts.num_gpu_blocks * facts.block_size
    return replace(
        promised,
        kv_capacity_tokens=capacity,
        max_num_seqs=facts.max_num_seqs or promised.max_num_seqs,
        max_num_batched_tokens=facts.max_num_batched_tokens or promised.max_num_batched_tokens,
        max_model_len=min(facts.max_model_len or promised.max_model_len, capacity),
    )
