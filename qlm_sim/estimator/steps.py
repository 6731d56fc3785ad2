"""Seconds of prefills and decode steps on an engine, as its profile promises them."""

from qlm_sim.core.lifecycle import Tracked
from qlm_sim.core.lso import keeps_kv
from qlm_sim.core.types import ModelOnInstance, StepCost


class BatchTimes(dict[int, float]):
    """Seconds of an iteration that decodes so many sequences, but for their KV; reckoned once each."""

    def __init__(self, step: StepCost) -> None:
        self._step = step

    def __missing__(self, sequences: int) -> float:
        step = self._step
        seconds = self[sequences] = step.base_s(sequences) + step.seq_s * sequences
        return seconds


def prefill_s(profile: ModelOnInstance, tokens: float, beside: float = 0.0, together: float = 0.0) -> float:
    """Engine seconds that ``tokens`` of prompt add to iterations which decode ``beside`` sequences.

    ``together``: tokens of all the prompts that go through the engine with it, if there are others.
    """
    chunk = together if together > tokens else tokens
    budget = profile.max_num_batched_tokens - beside
    if chunk > budget:
        chunk = budget if budget > 1.0 else 1.0
    step = profile.step
    longer_s = step.base_s(int(beside + chunk))
    if beside >= 1:
        longer_s -= step.base_s(int(beside))
    return tokens / chunk * (longer_s + step.seq_s) + step.prefill_pair_s * tokens * tokens * 0.5


def decode_step_s(profile: ModelOnInstance, sequences: float, kv_tokens: float) -> float:
    """Seconds of an iteration that decodes ``sequences`` sequences of ``kv_tokens`` KV in all."""
    step = profile.step
    return step.base_s(max(1, round(sequences))) + step.seq_s * sequences + step.kv_token_s * kv_tokens


def restores(profile: ModelOnInstance, item: Tracked) -> bool:
    """Whether ``item`` was evicted with its KV kept, which comes back instead of a prefill."""
    return item.output_tokens > 0 and keeps_kv(profile, item.context_tokens)
