"""A live run beside the simulation of it, and what its requests were told beside what came: as figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from live.load import Told
from qlm_sim.metrics.columns import RequestColumns
from qlm_sim.metrics.summary import Summary

Floats = NDArray[np.float64]

LATENCIES = ("ttft_s", "e2e_s")
STATISTICS = ("mean", "p50", "p90", "p95", "p99")
COUNTS = ("swaps", "evictions", "preemptions")
BACKLOG = 64
"""A queue of so many requests ahead is a backlog."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of both. ``error``: of the simulated one, relative to the live; None where there is none."""

    name: str
    live: float | None
    simulated: float | None

    @property
    def error(self) -> float | None:
        if self.live is None or self.simulated is None or self.live == 0:
            return None
        return self.simulated / self.live - 1


def rows(live: Summary, simulated: Summary) -> list[Row]:
    """Attainment, latencies and operations of both runs."""
    found = [Row("slo_attainment", *(each["slo_attainment"]["overall"] for each in (live, simulated)))]
    for name in live["by_class"]:
        shares = (each["slo_attainment"]["by_class"].get(name) for each in (live, simulated))
        found.append(Row(f"slo_attainment.{name}", *shares))
    for latency in LATENCIES:
        found += [Row(f"{latency}.{s}", live[latency][s], simulated[latency][s]) for s in STATISTICS]
    for name in ("throughput_rps", "output_tokens_per_s", *COUNTS):
        found.append(Row(name, live[name], simulated[name]))
    return found


def forecast_accuracy(requests: RequestColumns, told: Mapping[str, Told]) -> dict[str, Any]:
    """How well waits were forecast at arrival, with ``BACKLOG`` requests or more ahead and with fewer.

    R² is that of the means as they were told; the bound was to hold for 90 %.
    """
    waited = requests.ttft_s
    there = np.array([not np.isnan(w) and i in told for i, w in zip(requests.ids, waited, strict=True)])
    known = [told[name] for name, ok in zip(requests.ids, there, strict=True) if ok]
    waited = waited[there]
    position = np.array([each.position for each in known])
    mean = np.array([each.mean_s for each in known])
    bound = np.array([each.bound_s for each in known])
    deep = position >= BACKLOG
    return {
        "backlogged": _accuracy(waited[deep], mean[deep], bound[deep]),
        "shallow": _accuracy(waited[~deep], mean[~deep], bound[~deep]),
        "all": _accuracy(waited, mean, bound),
    }


def _accuracy(waited: Floats, mean: Floats, bound: Floats) -> dict[str, Any]:
    spread = float(((waited - waited.mean()) ** 2).sum()) if len(waited) else 0.0
    return {
        "requests": len(waited),
        "mean_wait_s": float(waited.mean()) if len(waited) else None,
        "sd_wait_s": float(waited.std()) if len(waited) else None,
        "r2": 1 - float(((waited - mean) ** 2).sum()) / spread if spread > 0 else None,
        "bias": float(mean.sum() / waited.sum() - 1) if waited.sum() > 0 else None,
        "within_90_bound": float((waited <= bound).mean()) if len(waited) else None,
    }
