"""How work comes: requests per second of each model and SLO class, and what each brings along.

Only what has come is known: that it goes on like that is the forecast.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from math import exp, inf, log
from typing import NamedTuple

from qlm_sim.core.lifecycle import WAITING, Tracked

MEMORY_S = 900.0
"""An arrival weighs 1/e after so long: long beside the gaps of a class, short beside the hours of a day."""
PRIOR_S = 10.0
"""Seconds without arrivals that are taken to have gone before the first."""
BANDS = 8
"""Of SLOs, per factor of e."""
GOES_ON = 9.0
"""For so many times as long as it has been watched, what comes is taken to go on: nine of ten things end
within nine times their age (Gott, 1993)."""


def slo_band(slo_s: float) -> float:
    """Alike for SLOs that are taken for one: clients may each name their own, and few are kept apart."""
    return round(BANDS * log(slo_s)) if 0 < slo_s < inf else slo_s


class Coming(NamedTuple):
    """Requests that come of one model and SLO."""

    model: str
    slo_s: float
    per_s: float
    prompt_tokens: float
    """Mean."""
    seen: float
    """So many arrivals tell this."""
    for_s: float
    """So long they are taken to go on coming."""


class _Seen:
    """Of one model and band of SLOs."""

    __slots__ = ("at", "count", "prompt_tokens", "slo_s")

    def __init__(self, slo_s: float, now: float) -> None:
        self.slo_s = slo_s
        """Of the first."""
        self.at = now
        self.count = 0.0
        """Fades with MEMORY_S, as of ``at``."""
        self.prompt_tokens = 0.0
        """Sum, fading alike."""


class Arrivals:
    """Told of every request that comes, for the first time."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, float], _Seen] = {}
        """By model and band."""
        self._since: float | None = None
        self._waiting: defaultdict[str, deque[Tracked]] = defaultdict(deque)
        """By model, in order of arrival: those that wait, and some that do no longer."""

    def waited_since(self, model: str) -> float:
        """When the oldest came of those who wait for the model; infinity where nobody does."""
        waiting = self._waiting[model]
        while waiting and (waiting[0].state is not WAITING or waiting[0].cancelled):
            waiting.popleft()
        return waiting[0].request.arrived_at if waiting else inf

    def came(self, item: Tracked, now: float) -> None:
        request = item.request
        self._waiting[request.model].append(item)
        if self._since is None:
            self._since = now - PRIOR_S
        key = request.model, slo_band(request.slo_s)
        seen = self._seen.get(key)
        if seen is None:
            seen = self._seen[key] = _Seen(request.slo_s, now)
        keep = exp((seen.at - now) / MEMORY_S)
        seen.at = now
        seen.count = keep * seen.count + 1
        seen.prompt_tokens = keep * seen.prompt_tokens + request.prompt_tokens

    def coming(self, now: float) -> Iterator[Coming]:
        """What is to be expected from ``now`` on."""
        if self._since is None:
            return
        watched_s = MEMORY_S * (1 - exp((self._since - now) / MEMORY_S))
        for_s = GOES_ON * (now - self._since)
        for (model, _), seen in self._seen.items():
            count = seen.count * exp((seen.at - now) / MEMORY_S)
            prompt_tokens = seen.prompt_tokens / seen.count
            yield Coming(model, seen.slo_s, count / watched_s, prompt_tokens, count, for_s)
