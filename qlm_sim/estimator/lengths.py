"""How long outputs are: statistics learnt from what finished, starting from a prior.

Nobody's true length is read in advance. Kept per model and SLO class, because a chat answer and a
batch summary differ; a class that has not finished enough yet leans on the prior.
"""

from dataclasses import dataclass

PRIOR_MEAN_TOKENS = 256.0
"""Prior mean output length: between the means of ShareGPT (about 200 to 280 tokens, by tokenizer)
and of the Azure conversation trace of 2023 (211)."""
PRIOR_CV = 1.0
"""Prior coefficient of variation; 1 is an exponential, near that of ShareGPT (about 0.95)."""
PRIOR_REQUESTS = 16
"""How many finished requests the prior counts for."""


@dataclass(slots=True)
class LengthStatistics:
    """Count, sum and sum of squares of output lengths in tokens."""

    count: float = PRIOR_REQUESTS
    total: float = PRIOR_REQUESTS * PRIOR_MEAN_TOKENS
    total_squared: float = PRIOR_REQUESTS * PRIOR_MEAN_TOKENS**2 * (1 + PRIOR_CV**2)

    def observe(self, tokens: int) -> None:
        self.count += 1
        self.total += tokens
        self.total_squared += tokens * tokens

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def second_moment(self) -> float:
        """E[X²], in tokens²."""
        return self.total_squared / self.count

    @property
    def variance(self) -> float:
        return max(0.0, self.second_moment - self.mean**2)


class OutputLengths:
    """Length statistics per (model, SLO class), and per model over all classes."""

    def __init__(self) -> None:
        self._by_class: dict[tuple[str, str], LengthStatistics] = {}
        self._by_model: dict[str, LengthStatistics] = {}

    def observe(self, model: str, slo_class: str, tokens: int) -> None:
        self.of_class(model, slo_class).observe(tokens)
        self.of_model(model).observe(tokens)

    def of_class(self, model: str, slo_class: str) -> LengthStatistics:
        key = (model, slo_class)
        stats = self._by_class.get(key)
        if stats is None:
            stats = self._by_class[key] = LengthStatistics()
        return stats

    def of_model(self, model: str) -> LengthStatistics:
        stats = self._by_model.get(model)
        if stats is None:
            stats = self._by_model[model] = LengthStatistics()
        return stats
