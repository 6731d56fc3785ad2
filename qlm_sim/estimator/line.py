"""What is expected of one instance's line: the waits in it, as distributions.

A line is served in visits, stretches of one model each, with a swap between them. Takes what ``intake``
expects of a visit and says what that means for a request with so many ahead of it.
"""

from dataclasses import dataclass
from math import erf, inf, sqrt
from statistics import NormalDist

import numpy as np

from qlm_sim.core.forecast import Wait
from qlm_sim.estimator.engine import Engine
from qlm_sim.estimator.intake import Intake
from qlm_sim.estimator.steps import prefill_s

BEYOND_SHARE = 0.1
"""So far behind its last request a forecast can tell of later ones, where all start at once."""

REACH_SHARE = 0.85
"""Of the places that were followed."""

TYPICAL_REQUESTS = 16.0
"""So many in line make their pace count half beside the profile's: a few prompts are seldom like those that
come."""

PREFILL_SPREAD = 0.05
"""Relative error of when the prompts ahead are through: others may come and share their iterations."""

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class GammaWait:
    """Seconds until the first token, from when it was asked.

    Gamma in the room that has to come free, by departures, which ``_visit`` turns into time.
    """

    _visit: "Visit"
    _needed: float
    """Room that must come free ..."""
    _start: float
    """... and has from the start: the difference is a gamma, 0 where nothing needs to depart."""
    _spread: float
    """Its standard deviation over its mean."""
    _own_s: float
    """What does not depend on departures."""
    _own_sd_s: float

    @property
    def mean_s(self) -> float:
        return max(0.0, self._visit.seconds_at(self._needed) + self._own_s)

    def quantile(self, p: float) -> float:
        """The wait that is not exceeded with probability ``p``, 0 < p < 1."""
        z = _NORMAL.inv_cdf(p)
        # Wilson and Hilferty: the cube root of a gamma is about normal.
        ninth = self._spread**2 / 9
        factor = max(0.0, 1 - ninth + z * sqrt(ninth)) ** 3
        freed = self._start + (self._needed - self._start) * factor
        return max(0.0, self._visit.seconds_at(freed) + self._own_s + z * self._own_sd_s)

    def within(self, seconds: float) -> float:
        """P(wait <= ``seconds``)."""
        low, high = -8.0, 8.0
        for _ in range(40):
            z = (low + high) / 2
            if self.quantile(min(max(_NORMAL.cdf(z), 1e-15), 1 - 1e-15)) <= seconds:
                low = z
            else:
                high = z
        return 0.5 + 0.5 * erf(low / sqrt(2))


@dataclass(frozen=True, slots=True)
class Stretched:
    """A wait so many times as long as another, of which some has passed."""

    wait: Wait
    times: float
    elapsed_s: float

    @property
    def mean_s(self) -> float:
        return max(0.0, self.wait.mean_s * self.times - self.elapsed_s)

    def quantile(self, p: float) -> float:
        return max(0.0, self.wait.quantile(p) * self.times - self.elapsed_s)

    def within(self, seconds: float) -> float:
        return self.wait.within((seconds + self.elapsed_s) / self.times)


class Never:
    """The wait of what nobody serves."""

    mean_s = inf

    def quantile(self, p: float) -> float:
        return inf

    def within(self, seconds: float) -> float:
        return 0.0


class Visit:
    """One model's stretch of a queue on an instance."""

    def __init__(
        self,
        model: str,
        first: int,
        start_s: float,
        start_sd_s: float,
        result: Intake,
        engine: Engine,
        request_s: float,
    ) -> None:
        self.model = model
        self.request_s = request_s
        """Seconds that one of its requests takes of a full engine, on average, by the profile."""
        self.first = first
        """Requests ahead of it on the queue."""
        self.start_s = start_s
        self.start_sd_s = start_sd_s
        self.intake = result
        self.engine = engine

    @property
    def reach(self) -> int:
        """Most requests ahead that it can tell of."""
        at_once = len(self.intake.at_once_s)
        # Behind them must be places for the upper quantiles of the last.
        more = REACH_SHARE * self.intake.place[-1] or BEYOND_SHARE * at_once
        return self.first + at_once + int(more)

    def pace(self, ahead: float) -> float:
        """Seconds that the full engine takes for one of ``request_s``; 0 where all before start at once."""
        if ahead - self.first + 1 <= len(self.intake.at_once_s):
            return 0.0
        waiting = float(self.intake.place[-1])
        paced = waiting * self.intake.request_s / self.request_s
        return (paced + TYPICAL_REQUESTS) / (waiting + TYPICAL_REQUESTS) if paced else 0.0

    def seconds_at(self, freed: float) -> float:
        """By when so much room has come free for those that do not start at once."""
        return self.start_s + float(np.interp(freed, self.intake.freed, self.intake.seconds))

    def wait(self, ahead: float, prefill_tokens: float, elapsed_s: float, together: float = 1.0) -> GammaWait:
        result, engine = self.intake, self.engine
        place = ahead - self.first + 1 - len(result.at_once_s)
        start = float(result.freed[0])
        if place <= 0 or not result.place[-1]:
            # Those behind the last of a forecast in which all start at once do so at its pace.
            behind = max(place, 0) / len(result.at_once_s)
            at_s = float(result.at_once_s[int(min(place, 0)) - 1]) * (1 + behind)
            unknown = max(result.unknown, PREFILL_SPREAD)
            sd_s = sqrt(self.start_sd_s**2 + (unknown * at_s) ** 2 + (0.3 * result.step_s) ** 2)
            return GammaWait(self, start, start, 0.0, at_s - float(result.seconds[0]) - elapsed_s, sd_s)
        needed = max(start, float(np.interp(place, result.place, result.needed)))
        dispersion = float(np.interp(needed, result.freed, result.dispersion))
        spread = sqrt(dispersion / max(together * (needed - start), 1e-6) + result.unknown**2)
        prompt_s = engine.slowness * prefill_s(engine.profile, prefill_tokens, result.sequences)
        own_s = result.step_s + prompt_s - result.prompt_s
        return GammaWait(self, needed, start, spread, own_s - elapsed_s, self.start_sd_s)

    def admitted(self, seconds: float) -> float:
        """How many of the queue should have been taken in after so many seconds."""
        result = self.intake
        seconds -= self.start_s
        at_once = int(np.searchsorted(result.at_once_s, seconds, side="right"))
        freed = np.interp(seconds, result.seconds, result.freed)
        return self.first + at_once + float(np.interp(freed, result.needed, result.place))


@dataclass(frozen=True, slots=True)
class LineForecast:
    """What is expected of one instance's line. The first of it are on the engine, prefills not done."""

    made_at: float
    reach: int
    """Most requests ahead that it can tell of."""
    span_s: float
    """Until the last in line has its first token."""
    beyond: int
    """From so many ahead on, the visits of models were not followed: they are as long as those before."""
    _visits: tuple[Visit, ...]

    def admitted(self, seconds: float) -> float:
        """How many of the line are expected to have their first token after so many seconds."""
        visit = self._visits[0]
        for later in self._visits[1:]:
            if later.start_s > seconds:
                break
            visit = later
        return visit.admitted(seconds)

    def tells_of(self, model: str, ahead: int) -> bool:
        """Whether it can forecast one more request of ``model`` with so many ahead."""
        if ahead >= self.beyond:
            return True
        return ahead < self.reach and any(v.model == model and v.first <= ahead for v in self._visits)

    def wait(
        self, model: str, ahead: float, prefill_tokens: float, now: float, together: float = 1.0
    ) -> Wait:
        """The wait, from ``now``, of a request with so many ahead of it now.

        ``together``: so many times as many are ahead of it on all the instances that serve the line.
        """
        elapsed_s = now - self.made_at
        ahead = self._ahead(ahead, elapsed_s)
        if ahead >= self.beyond:
            last = self._visits[-1].wait(self.beyond - 1, prefill_tokens, 0.0, together)
            return Stretched(last, (ahead + 1) / self.beyond, elapsed_s)
        return self._visit(model, ahead).wait(ahead, prefill_tokens, elapsed_s, together)

    def pace(self, model: str, ahead: float, now: float) -> float:
        """``Visit.pace`` for a request with so many ahead of it now."""
        ahead = min(self._ahead(ahead, now - self.made_at), self.beyond - 1)
        return self._visit(model, ahead).pace(ahead)

    def serves(self, model: str) -> bool:
        """Whether the line has a visit to ``model``."""
        return any(visit.model == model for visit in self._visits)

    def _ahead(self, ahead: float, elapsed_s: float) -> float:
        """So many were ahead when the forecast was made."""
        return ahead + round(self.admitted(elapsed_s)) if elapsed_s > 0 else ahead

    def _visit(self, model: str, ahead: float) -> Visit:
        for visit in reversed(self._visits):
            if visit.model == model and visit.first <= ahead:
                return visit
        return next(visit for visit in reversed(self._visits) if visit.first <= ahead)
