"""What it does to a wait that more urgent requests are still to come, and go first.

Whoever has W0 seconds of work before it waits for that and for what comes meanwhile and passes it. Classes
that pass it for as long as it waits stretch the wait by 1 / (1 - ρ), as in a delay busy period (Conway,
Maxwell and Miller, 1967), on which Cobham's formula for priorities rests (1954). By deadline, class k passes
it only until newcomers are due later than it is, D - D_k from now: W = W0 + Σ ρ_k · min(W, D - D_k), which
has a solution however great the load is (Goldberg, 1977).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import copysign, erf, inf, sqrt
from statistics import NormalDist
from typing import NamedTuple

from qlm_sim.core.forecast import Wait
from qlm_sim.core.lifecycle import Tracked
from qlm_sim.core.policy import Overtaking

LEAST_LEFT = 0.02
"""Share of an engine that is left at least to those who are overtaken: loads are not known better."""
_NORMAL = NormalDist()


class Passing(NamedTuple):
    """Requests of one kind that pass a waiting one."""

    load: float
    """Seconds of the engine that they take per second."""
    variance_s: float
    """Variance of what they take of a second, in s² per second: Poisson arrivals, λ·E[S²]."""
    load_error: float
    """Standard error of ``load``."""
    for_s: float
    """From now on, so long."""


def passes_for_s(rule: Overtaking, item: Tracked, slo_s: float, now: float) -> float:
    """For how long from now requests that come with that SLO will go before ``item``, while it waits."""
    if rule is Overtaking.BY_DEADLINE:
        return max(0.0, item.deadline - slo_s - now)
    return inf if rule is Overtaking.BY_SLO and slo_s < item.request.slo_s else 0.0


def stretched_s(wait_s: float, passing: Sequence[Passing]) -> tuple[float, float]:
    """How long a wait becomes, and by how much more for one more second. ``passing`` by ``for_s``."""
    load = sum(each.load for each in passing)
    for each in passing:
        left = 1 - load if each.for_s < inf else max(LEAST_LEFT, 1 - load)
        if wait_s <= each.for_s * left:
            return wait_s / left, 1 / left
        # They come until newcomers are due later, which is sooner than its turn.
        wait_s += each.load * each.for_s
        load -= each.load
    return wait_s, 1.0


@dataclass(frozen=True)
class Overtaken:
    """A wait while others pass."""

    wait: Wait
    """Without them."""
    passing: Sequence[Passing]
    """By ``for_s``."""

    @cached_property
    def mean_s(self) -> float:
        return stretched_s(self.wait.mean_s, self.passing)[0]

    @cached_property
    def _median_s(self) -> float:
        return stretched_s(self.wait.quantile(0.5), self.passing)[0]

    @cached_property
    def _spread_s(self) -> float:
        """Standard deviation by what comes: its chance, and that its load is known from so many only."""
        total_s, slope = stretched_s(self.wait.mean_s, self.passing)
        variance = 0.0
        for each in self.passing:
            passed_s = min(total_s, each.for_s)
            variance += each.variance_s * passed_s + (each.load_error * passed_s) ** 2
        return slope * sqrt(variance)

    def quantile(self, p: float) -> float:
        wait_s = self.wait.quantile(p)
        own_s = stretched_s(wait_s, self.passing)[0] - self._median_s
        z = _NORMAL.inv_cdf(p)
        return max(wait_s, self._median_s + copysign(sqrt(own_s**2 + (z * self._spread_s) ** 2), z))

    def within(self, seconds: float) -> float:
        """P(wait <= ``seconds``)."""
        steps = [z / 64 for z in range(-512, 513)]
        at = bisect_left(steps, seconds, key=lambda z: self.quantile(_probability(z)))
        return _probability(steps[at]) if at < len(steps) else 1.0


def _probability(z: float) -> float:
    return min(max(0.5 + 0.5 * erf(z / sqrt(2)), 1e-15), 1 - 1e-15)
