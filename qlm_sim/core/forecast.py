"""What a request can be told of its wait: a position in line and a distribution of seconds."""

from dataclasses import dataclass
from typing import Protocol


class Wait(Protocol):
    """Seconds until a first token, as a distribution."""

    @property
    def mean_s(self) -> float: ...

    def quantile(self, p: float) -> float:
        """Seconds that the wait does not exceed with probability ``p``, 0 < p < 1."""
        ...

    def within(self, seconds: float) -> float:
        """P(wait <= ``seconds``)."""
        ...


@dataclass(frozen=True, slots=True)
class Forecast:
    """One request's wait, seen from ``asked_at``, if requests go on coming as they have."""

    asked_at: float
    position: int
    """Requests without a first token that are served before it; 0: it is the next."""
    wait: Wait
    deadline: float
    """Absolute time at which its first token is due."""

    @property
    def mean_s(self) -> float:
        """Expected seconds until its first token."""
        return self.wait.mean_s

    @property
    def median_s(self) -> float:
        return self.wait.quantile(0.5)

    def quantile(self, p: float) -> float:
        """Seconds that the wait does not exceed with probability ``p``, 0 < p < 1."""
        return self.wait.quantile(p)

    @property
    def p_slo_met(self) -> float:
        """Probability that the first token comes by the deadline."""
        return self.wait.within(self.deadline - self.asked_at)
