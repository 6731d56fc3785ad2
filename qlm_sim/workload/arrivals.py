"""Arrival processes: when requests come, in seconds from the run's start.

Knows no requests. The first comes one gap after the start.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlm_sim.errors import InputError

KINDS = "trace, poisson, gamma:CV (such as gamma:2.5) or uniform"


@dataclass(frozen=True, slots=True)
class Arrivals:
    """A kind of arrival process: the trace's own times, or independent gaps with this variation."""

    from_trace: bool
    cv: float = 0.0
    """Coefficient of variation of the gaps: 0 is evenly spaced, 1 is Poisson."""


def parse_arrivals(kind: str) -> Arrivals:
    """What ``trace``, ``poisson``, ``gamma:CV`` or ``uniform`` mean."""
    name, colon, value = kind.partition(":")
    if not colon and name in ("trace", "poisson", "uniform"):
        return Arrivals(from_trace=name == "trace", cv=float(name == "poisson"))
    if name == "gamma" and colon:
        try:
            cv = float(value)
        except ValueError:
            cv = math.nan
        if 0.01 <= cv <= 100:
            return Arrivals(from_trace=False, cv=cv)
        raise InputError(
            f"arrivals {kind!r}: the CV of gamma is a number from 0.01 to 100, such as gamma:2.5"
        )
    raise InputError(f"arrivals {kind!r} are unknown; {KINDS} would be right")


def arrival_times(kind: str, rate_rps: float, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """``n`` ascending times of a process whose gaps have the mean 1 / ``rate_rps``.

    ``poisson`` has exponential gaps, ``gamma:CV`` gamma gaps of shape 1/CV², ``uniform`` equal gaps.
    """
    arrivals = parse_arrivals(kind)
    if arrivals.from_trace:
        raise InputError("arrivals 'trace' come from the trace's times; there is no process to draw from")
    _check_rate(rate_rps)
    if arrivals.cv == 0:
        return np.arange(1, n + 1) / rate_rps
    if arrivals.cv == 1:
        gaps = rng.standard_exponential(n)
    else:
        gaps = rng.standard_gamma(arrivals.cv**-2, n) * arrivals.cv**2
    return np.cumsum(gaps) / rate_rps


def rescale(arrival_s: NDArray[np.float64], rate_rps: float) -> NDArray[np.float64]:
    """Times stretched or squeezed from 0 so that their mean gap is 1 / ``rate_rps``; one alone stays."""
    _check_rate(rate_rps)
    if len(arrival_s) < 2:
        return arrival_s
    span_s = float(arrival_s[-1] - arrival_s[0])
    if span_s <= 0:
        raise InputError("the trace's requests all arrive at one time, so they cannot be brought to a rate")
    return arrival_s * ((len(arrival_s) - 1) / span_s / rate_rps)


def _check_rate(rate_rps: float) -> None:
    if not (math.isfinite(rate_rps) and rate_rps > 0):
        raise InputError(f"rate {rate_rps:g} requests/s; a number above 0 would be right")
