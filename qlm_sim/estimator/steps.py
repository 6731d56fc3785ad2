"""Seconds of prefills and decode steps on an engine, as its profile promises them."""

from qlm_sim.core.lifecycle import Tracked
from qlm_sim.core.lso import keeps_kv
from qlm_sim.core.types import ModelOnInstance


def prefill_s(profile: ModelOnInstance, tokens: float, beside: float = 0.0, together: float = 0.0) -> float:
    """Engine seconds that ``tokens`` of prompt add to iterations which decode ``beside`` sequences.

    ``together``: tokens of all the prompts that go through the engine with it, if there are others.
    """
    chunk = together if together > tokens else tokens
    budget = profile.max_num_batched_tokens - beside
    if chunk > budget:
        chunk = budget if budget > 1.0 else 1.0
    step = profile.step
    alone = step.base_s(int(beside)) if beside >= 1 else 0.0
    per_chunk = step.base_s(int(beside + chunk)) - alone + step.seq_s
    return tokens / chunk * per_chunk + step.prefill_pair_s * tokens * tokens / 2


def decode_step_s(profile: ModelOnInstance, sequences: float, kv_tokens: float) -> float:
    """Seconds of an iteration that decodes ``sequences`` sequences of ``kv_tokens`` KV in all."""
    step = profile.step
    return step.base_s(max(1, round(sequences))) + step.seq_s * sequences + step.kv_token_s * kv_tokens


def restores(profile: ModelOnInstance, item: Tracked) -> bool:
    """Whether ``item`` was evicted with its KV kept, which comes back instead of a prefill."""
    return item.output_tokens > 0 and keeps_kv(profile, item.context_tokens)
