"""When the requests of a ``vllm bench serve`` result started, where it does not say (vLLM before 0.10).

Knows the benchmark's client: it sends requests in their order at a rate, with gamma-distributed gaps, and
where ``max_concurrency`` is set each waits until one of so many places is free.
"""

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qlm_sim.errors import InputError


def bench_starts(path: str, result: Mapping[str, Any], e2e_s: Sequence[float]) -> tuple[list[float], str]:
    """Seconds since the run's start at which each request started, and how they were found, in words.

    With an infinite rate they follow from the requests' times; gaps of a finite one are drawn.
    """
    count = len(e2e_s)
    rate, places = result.get("request_rate"), result.get("max_concurrency")
    words = []
    due = [0.0] * count
    if str(rate) != "inf":
        rate_rps = _positive(path, "request_rate", rate)
        burstiness = _positive(path, "burstiness", result.get("burstiness", 1.0))
        gaps = np.random.default_rng(0).gamma(burstiness, 1 / (rate_rps * burstiness), count)
        due = np.cumsum(gaps).tolist()
        words.append(f"arrivals at {rate_rps:g} per second are drawn, so single times cannot be met")
    if places:
        free = [0.0] * min(int(_positive(path, "max_concurrency", places)), count)
        for place, (ready, seconds) in enumerate(zip(due, e2e_s, strict=True)):
            due[place] = max(ready, heapq.heappop(free))
            heapq.heappush(free, due[place] + seconds)
        words.append(f"each starts when one of {places} places is free")
    return due, "; ".join(words) or "all start at once"


def _positive(path: str, key: str, value: object) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise InputError(f"{path}: {key} is {value!r}; a number above 0 would be right")
    return number
