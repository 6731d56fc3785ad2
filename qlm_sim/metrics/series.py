"""Load over time in bounded memory: samples that thin out as a run grows longer.

Knows counts and reports; nothing of single requests. A series holds at most MOST_POINTS points:
one more, and every other point is dropped and the distance between points doubles.
"""

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlm_sim.core.events import EngineReported

MOST_POINTS = 600


@dataclass(frozen=True)
class LoadSeries:
    """The cluster's load at evenly spaced instants. Arrays of one length, ``waiting`` by class too."""

    time_s: NDArray[np.float64]
    class_names: tuple[str, ...]
    waiting: NDArray[np.int64]
    """Shape (points, classes): requests that arrived and have no token of a present attempt."""
    running: NDArray[np.int64]
    """Requests that decode."""


class LoadSampler:
    """Samples (running, waiting of class 0, waiting of class 1, ...) at multiples of ``gap_s``."""

    def __init__(self) -> None:
        self.gap_s = 0.125
        self.next_s = 0.0
        self._samples: list[tuple[int, ...]] = []

    def sample(self, now: float, running: int, waiting: list[int]) -> None:
        """Note the counts, which held since the last settle, at every due instant until ``now``."""
        counted = (running, *waiting)
        samples = self._samples
        while self.next_s <= now:
            samples.append(counted)
            if len(samples) > MOST_POINTS:
                del samples[1::2]
                self.gap_s *= 2
            self.next_s = len(samples) * self.gap_s

    def series(self, class_names: tuple[str, ...]) -> LoadSeries:
        table = np.zeros((len(self._samples), 1 + len(class_names)), dtype=np.int64)
        for row, counted in enumerate(self._samples):
            table[row, : len(counted)] = counted
        return LoadSeries(
            time_s=np.arange(len(table), dtype=np.float64) * np.float64(self.gap_s),
            class_names=class_names,
            waiting=table[:, 1:],
            running=table[:, 0],
        )


@dataclass(frozen=True)
class EngineSeries:
    """One engine's reports, in order of time."""

    time_s: NDArray[np.float64]
    busy_s: NDArray[np.float64]
    """Total seconds spent executing iterations until then, restarts of the engine included."""
    kv_utilization: NDArray[np.float64]
    """Share of KV blocks in use, 0 to 1."""

    def busy_share(self, edges_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Share of each interval between ``edges_s`` spent executing, linear between reports."""
        if len(self.time_s) == 0:
            return np.zeros(len(edges_s) - 1)
        # The engine starts with nothing done, at the run's start or when it first reported.
        busy = np.interp(edges_s, np.append(0.0, self.time_s), np.append(0.0, self.busy_s))
        return np.diff(busy) / np.diff(edges_s)


class EngineSampler:
    """Keeps an engine's reports, thinned, the newest always among them."""

    def __init__(self) -> None:
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._earlier = (0, 0, 0)
        self._earlier_busy_s = 0.0
        self._gap_s = 0.0
        self._time_s = array("d")
        self._busy_s = array("d")
        self._kv = array("d")

    def restart(self) -> None:
        """The engine starts anew: its totals begin at zero again."""
        self._earlier = (self.preemptions, self.prefix_queries, self.prefix_hits)
        self._earlier_busy_s = self._busy_s[-1] if self._busy_s else 0.0

    def report(self, now: float, report: EngineReported) -> None:
        preemptions, queries, hits = self._earlier
        self.preemptions = preemptions + report.preemptions
        self.prefix_queries = queries + report.prefix_queries
        self.prefix_hits = hits + report.prefix_hits
        times, busy, kv = self._time_s, self._busy_s, self._kv
        if len(times) > 1 and now - times[-2] < self._gap_s:
            del times[-1], busy[-1], kv[-1]
        times.append(now)
        busy.append(self._earlier_busy_s + report.busy_s)
        kv.append(report.kv_utilization)
        if len(times) > MOST_POINTS:
            for column in (times, busy, kv):
                column[:] = column[::2]
            self._gap_s = 2 * (times[-1] - times[0]) / MOST_POINTS

    def series(self) -> EngineSeries:
        return EngineSeries(
            time_s=np.array(self._time_s), busy_s=np.array(self._busy_s), kv_utilization=np.array(self._kv)
        )


@dataclass(frozen=True)
class InstanceTimeline:
    """What one instance held, and when. Columns in order of time, seconds since the run's start."""

    loaded_s: NDArray[np.float64]
    """When each model was ready to serve."""
    models: tuple[str, ...]
    """The model ready at each ``loaded_s``; empty where the instance went down."""
    swap_s: NDArray[np.float64]
    """Seconds that the swap before took; 0 for a model that was loaded from the start."""
    evicted_s: NDArray[np.float64]
    """When requests were evicted, one entry per request."""
