"""Seconds of one iteration of one model, as the engine looks them up."""

from qlm_sim.core.types import StepCost


class BaseTimes(dict[int, float]):
    """``StepCost.base_s`` by tokens, asked once each."""

    def __init__(self, step: StepCost, factor: float) -> None:
        self._step = step
        self._factor = factor

    def __missing__(self, tokens: int) -> float:
        seconds = self[tokens] = self._step.base_s(tokens) * self._factor
        return seconds


class StepTimes:
    """A StepCost, ``factor`` times as slow, so that a simulated engine need not keep to its profile."""

    __slots__ = ("base_s", "kv_token_s", "prefill_pair_s", "seq_s")

    def __init__(self, step: StepCost, factor: float) -> None:
        self.base_s = BaseTimes(step, factor)
        self.seq_s = step.seq_s * factor
        self.kv_token_s = step.kv_token_s * factor
        self.prefill_pair_s = step.prefill_pair_s * factor
