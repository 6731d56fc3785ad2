"""Summaries of runs that differ by their seeds alone: the mean of each figure, and how sure it is.

Knows summaries as nested dicts of figures; nothing of what they mean.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qlm_sim.metrics.summary import Summary

_STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
"""97.5th percentile of Student's t with 1, 2, ... degrees of freedom."""
_NORMAL = 1.959964
"""The same of the normal distribution."""


def combine(summaries: Sequence[Summary]) -> Summary:
    """The mean of every figure over the runs, with ``ci95`` beside: the half-widths of 95 % confidence.

    Means of counts have one decimal. ``ci95`` has the summaries' shape, without texts, and None where fewer
    than two runs have the figure. A text is the first run's; a verdict (``saturated``) holds if it holds for
    any run, and its sentence is then that run's. ``repeats``: how many runs.
    """
    mean = {key: _mean([each[key] for each in summaries]) for key in summaries[0]}
    saturated = next((each for each in summaries if each.get("saturated")), summaries[0])
    mean["saturation"] = saturated.get("saturation")
    return mean | {"ci95": _half_widths(summaries), "repeats": len(summaries)}


def student_t(freedom: int) -> float:
    """97.5th percentile of Student's t, beyond the table by its expansion (Cornish and Fisher)."""
    if freedom <= len(_STUDENT_T):
        return _STUDENT_T[freedom - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _mean(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _mean([each[key] for each in values]) for key in first}
    if isinstance(first, bool):
        return any(values)
    if isinstance(first, str):
        return first
    known = [each for each in values if each is not None]
    if not known or all(each == known[0] for each in known):  # a count that is always the same stays whole
        return known[0] if known else None
    mean = math.fsum(known) / len(known)
    return round(mean, 1) if all(isinstance(each, int) for each in known) else mean


def _half_widths(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {
            key: _half_widths([each[key] for each in values])
            for key, value in first.items()
            if not isinstance(value, bool | str)
        }
    known = [each for each in values if each is not None]
    if len(known) < 2:
        return None
    mean = math.fsum(known) / len(known)
    variance = math.fsum((each - mean) ** 2 for each in known) / (len(known) - 1)
    return student_t(len(known) - 1) * math.sqrt(variance / len(known))
