"""How forecasts turned out, and what that says of the next ones.

What was told is held against what came of it, for each model, SLO class and depth of the queue: by how much
waits were longer than told, and how far they lay from the median in units of the spread told. The next
forecasts are corrected by the former and have the quantiles of the latter (recalibration by the observed
distribution of scores; Kuleshov et al., 2018; conformal prediction). So what a model of engines leaves out,
such as evictions and swaps to come, is learnt. Errors of waits that overlap in time are the same errors, so
each counts for the share of its wait in which no other was told before; the model's own word counts as so
many independent scores.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qlm_sim.core.forecast import Wait
from qlm_sim.core.lifecycle import Tracked
from qlm_sim.estimator.lengths import Floats

PRIOR_SCORES = 12.0
"""Independent scores that the model's own distribution counts for."""
NEIGHBOUR = 0.5
"""What scores of half or twice the depth count for, and so on; together for no more than the prior."""
SCORES = 192
"""So many of the last are kept for each depth."""
MOST_OPEN = 4096
"""Forecasts whose end is awaited; what is told beyond them is not scored."""
EXPIRED = 20.0
"""So many times its 90 % bound after it was told, a forecast is given up when others need its place."""
_Z90 = 1.2815515655446004
_LEAST_SIDE = 0.01
"""Least spread that scores are measured in, as a share of the median."""
_MOST = 30.0
_PRIOR_Z: Floats = np.linspace(-4, 4, 33)
_PRIOR_WEIGHT: Floats = np.exp(-(_PRIOR_Z**2) / 2)
_PRIOR_WEIGHT *= PRIOR_SCORES / _PRIOR_WEIGHT.sum()


class _Told(NamedTuple):
    """What was told of one request, before any correction."""

    at: float
    depth: tuple[str, str, int]
    mean_s: float
    median_s: float
    above_s: float
    """Standard deviation as it looks from the median upwards ..."""
    below_s: float
    """... and downwards."""

    def score(self, waited_s: float) -> float:
        late_s = waited_s - self.median_s
        return max(-_MOST, min(_MOST, late_s / (self.above_s if late_s > 0 else self.below_s)))


class _Scores:
    """Of one depth."""

    def __init__(self) -> None:
        self.last_at = -1e9
        self.rows: deque[tuple[float, float, float, float]] = deque(maxlen=SCORES)
        """Weight, score, mean told, wait."""
        self.weight = 0.0
        """Of all rows."""
        self.count = 0


class Correction(NamedTuple):
    """What the scores say."""

    ratio: float
    """Waits over means told."""
    z: Floats
    """Scores, ascending ..."""
    cumulated: Floats
    """... and the share of them up to the middle of each."""


@dataclass(frozen=True, slots=True)
class Corrected:
    """A wait as the record corrects it."""

    _told: _Told
    _correction: Correction

    @property
    def mean_s(self) -> float:
        return self._told.mean_s * self._correction.ratio

    def quantile(self, p: float) -> float:
        told, correction = self._told, self._correction
        z = float(np.interp(p, correction.cumulated, correction.z))
        return max(0.0, told.median_s + z * (told.above_s if z > 0 else told.below_s))

    def within(self, seconds: float) -> float:
        z = self._told.score(seconds)
        return float(np.interp(z, self._correction.z, self._correction.cumulated, left=0.0, right=1.0))


class TrackRecord:
    """Keeps the scores. Told of forecasts by who makes them, and of first tokens by who learns from them."""

    def __init__(self) -> None:
        self.awaited: dict[str, _Told] = {}
        self._scores: dict[tuple[str, str, int], _Scores] = {}
        self._corrections: dict[tuple[str, str, int], tuple[int, Correction]] = {}

    def corrected(self, item: Tracked, ahead: int, wait: Wait, now: float, *, keep: bool) -> Wait:
        """``wait``, told of ``item``, corrected. ``keep``: it is to be scored once it is over."""
        depth = item.request.model, item.request.slo_class, (ahead + 1).bit_length()
        near = self._near(depth)
        if not (keep or near):
            return wait
        median_s = wait.quantile(0.5)
        least_s = max(_LEAST_SIDE * median_s, 1e-6)
        told = _Told(
            now,
            depth,
            max(1e-9, wait.mean_s),
            median_s,
            max(least_s, (wait.quantile(0.9) - median_s) / _Z90),
            max(least_s, (median_s - wait.quantile(0.1)) / _Z90),
        )
        if keep and item.request.id not in self.awaited and self._has_place(now):
            self.awaited[item.request.id] = told
        return Corrected(told, self._correction(depth, near)) if near else wait

    def _near(self, depth: tuple[str, str, int]) -> "list[tuple[float, _Scores]]":
        """The scores of that depth and of those beside it, with what each of them counts for."""
        model, slo_class, octave = depth
        return [
            (NEIGHBOUR ** abs(other - octave), scores)
            for other in range(octave - 3, octave + 4)
            if (scores := self._scores.get((model, slo_class, other))) is not None
        ]

    def _has_place(self, now: float) -> bool:
        if len(self.awaited) >= MOST_OPEN:
            for name, told in list(self.awaited.items()):
                if now - told.at > EXPIRED * (told.median_s + told.above_s):
                    del self.awaited[name]
        return len(self.awaited) < MOST_OPEN

    def first_token(self, request_id: str, now: float) -> None:
        """The wait of a request is over."""
        told = self.awaited.pop(request_id, None)
        if told is None:
            return
        scores = self._scores.get(told.depth)
        if scores is None:
            scores = self._scores[told.depth] = _Scores()
        waited_s = now - told.at
        weight = min(1.0, max(0.0, told.at - scores.last_at) / max(waited_s, 1e-9))
        scores.last_at = max(scores.last_at, told.at)
        weight = max(weight, 1e-6)
        if len(scores.rows) == SCORES:
            scores.weight -= scores.rows[0][0]
        scores.weight += weight
        scores.rows.append((weight, told.score(waited_s), told.mean_s, waited_s))
        scores.count += 1

    def _correction(self, depth: tuple[str, str, int], near: "Sequence[tuple[float, _Scores]]") -> Correction:
        count = sum(scores.count for _, scores in near)
        known = self._corrections.get(depth)
        if known is not None and count < known[0]:
            return known[1]
        weights, z = [_PRIOR_WEIGHT], [_PRIOR_Z]
        above = below = PRIOR_SCORES
        beside = sum(share * scores.weight for share, scores in near if share < 1)
        for share, scores in near:
            _, score, mean_s, waited_s = np.array(scores.rows).T
            weight = scores.weight
            if share < 1:
                weight *= share * min(1.0, PRIOR_SCORES / beside)
            weights.append(np.full(len(score), weight / len(score)))
            z.append(score)
            above += weight * float(waited_s.sum() / mean_s.sum())
            below += weight
        every, all_weights = np.concatenate(z), np.concatenate(weights)
        order = np.argsort(every, kind="stable")
        every, all_weights = every[order], all_weights[order]
        cumulated = (np.cumsum(all_weights) - all_weights / 2) / all_weights.sum()
        correction = Correction(above / below, every, cumulated)
        # Believed until a fiftieth more scores are in.
        self._corrections[depth] = (count + 1 + count // 50, correction)
        return correction
