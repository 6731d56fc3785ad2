"""How fast batch lines are answered: a count that forgets. Knows no clock: times are arguments."""

import math

MEMORY_S = 60.0
"""Seconds after which an answer counts 1/e."""


class LinePace:
    def __init__(self) -> None:
        self._count = 0.0
        self._weight_s = 0.0
        self._at: float | None = None

    def answered(self, now: float) -> None:
        self._forget(now)
        self._count += 1

    def idle(self, now: float) -> None:
        """Nothing was to be done until now: that time does not count."""
        self._at = now

    def _forget(self, now: float) -> None:
        if self._at is not None:
            passed_s = max(0.0, now - self._at)
            keep = math.exp(-passed_s / MEMORY_S)
            self._count *= keep
            self._weight_s = self._weight_s * keep + MEMORY_S * (1 - keep)
        self._at = now

    def seconds(self, lines: int) -> float | None:
        """Seconds to answer so many; None before anything is known."""
        if self._count <= 0 or self._weight_s <= 0:
            return None
        return lines * self._weight_s / self._count
