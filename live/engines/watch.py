"""How closely an instance is watched, and when it is given up."""

from dataclasses import dataclass

MOST_MISSES = 3
"""Health checks in a row that may be missed."""


@dataclass(frozen=True, slots=True)
class Watch:
    """How an instance is watched. Seconds."""

    report_s: float = 1.0
    """Between two reports, which are health checks too."""
    answer_s: float = 5.0
    """The engine must answer a health check within this time."""
    stall_s: float = 60.0
    """With requests running, an engine that says nothing for this long hangs."""
    retry_s: float = 0.1
    """Before a lost attempt is given back to the core; doubles with each in a row."""
    backoff_s: float = 1.0
    """Before an engine that went down is started again; doubles with each failure in a row."""
    most_backoff_s: float = 60.0
    swap_times: float = 10.0
    """A swap that takes so many times as long as the last one hangs; twice that, where there was none and
    the profile tells ..."""
    least_swap_s: float = 30.0
    """... and no less than this."""

    def swap_patience_s(self, expected_s: float, *, measured: bool) -> float:
        """After which a swap is given up. ``measured``: what is expected is how long the last one took."""
        times = self.swap_times if measured else 2 * self.swap_times
        return max(self.least_swap_s, times * expected_s)
