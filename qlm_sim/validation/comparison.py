"""How far simulated times are from measured ones, overall and request by request."""

from typing import Any

import numpy as np

from qlm_sim.validation.request_log import Floats

STATISTICS = ("mean", "p50", "p90", "p99")


def compare(real: Floats, simulated: Floats) -> dict[str, Any] | None:
    """Both sides' statistics in seconds, their relative errors, and the mean absolute relative error.

    Over the requests that have both times; ``mape`` over those whose measured time is above 0. A relative
    error is simulated / measured - 1. None where no request has both.
    """
    both = np.isfinite(real) & np.isfinite(simulated)
    if not both.any():
        return None
    real, simulated = real[both], simulated[both]
    measured, ours = statistics(real), statistics(simulated)
    above = real > 0
    return {
        "requests": int(both.sum()),
        "real": measured,
        "simulated": ours,
        "error": {name: ours[name] / measured[name] - 1 if measured[name] else None for name in STATISTICS},
        "mape": float(np.abs(simulated[above] / real[above] - 1).mean()) if above.any() else None,
    }


def statistics(seconds: Floats) -> dict[str, float]:
    """Mean and percentiles (linear interpolation) of the values that are there."""
    seconds = seconds[np.isfinite(seconds)]
    values = (seconds.mean(), *np.percentile(seconds, (50, 90, 99)))
    return dict(zip(STATISTICS, map(float, values), strict=True))
