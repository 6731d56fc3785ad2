"""Whether a run was offered more than it served: then its latencies measure its length.

Knows a run's request columns and nothing else.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np

from qlm_sim.metrics.columns import FloatColumn, RequestColumns

LEAST_BURST = 10
"""So many waiting requests at least make a burst: fewer may just have come."""


@dataclass(frozen=True, slots=True)
class Saturation:
    """The verdict, and a sentence that gives its grounds."""

    saturated: bool
    sentence: str


def saturation(requests: RequestColumns) -> Saturation:
    """Judge by the backlog: requests that arrived and still wait for their first token.

    Below saturation the backlog hovers around a level that does not depend on time, so it is compared
    early (a tenth into the arrivals), halfway and at their end, each the mean over a tenth of the arrival
    span. The backlog of a queue at exactly its capacity drifts by about sqrt(2 n) while n requests arrive
    (independent arrivals and services), so growth beyond 2 sqrt(2 n), and beyond 2 % of those n, is more
    than chance. If the second half still brought more than a quarter of it (steady growth brings half,
    a start that settles nothing), the run is saturated. So is one where over half of all requests wait
    when the last one arrives, however short the arrivals (a burst, if they are not just a few). Requests that
    were refused or failed do not count.
    """
    kept = ~requests.rejected
    arrived = requests.arrival_s[kept]
    if len(arrived) == 0:
        return Saturation(False, "No request was served.")
    arrived = np.sort(arrived)
    served = np.sort(requests.first_token_s[kept & ~np.isnan(requests.first_token_s)])
    start, end = arrived[0], arrived[-1]

    def backlog(share_from: float, share_to: float) -> float:
        times = start + (end - start) * np.linspace(share_from, share_to, 50)
        return float(np.mean(_count_until(arrived, times) - _count_until(served, times)))

    early, middle, late = backlog(0.05, 0.15), backlog(0.45, 0.55), backlog(0.9, 1.0)
    last = backlog(1.0, 1.0)
    course = (
        f"{early:,.0f} requests a tenth into the arrivals, {middle:,.0f} halfway, {late:,.0f} at their end, "
        f"of {len(arrived):,}"
    )
    between = len(arrived) * 0.85
    growth = late - early
    if growth > max(2 * sqrt(2 * between), 0.02 * between) and late - middle > growth / 4:
        return Saturation(
            True,
            f"Saturated: the backlog still grew when arrivals ended ({course}); in a longer run latencies "
            "would be longer.",
        )
    if last > max(len(arrived) / 2, LEAST_BURST - 1):
        return Saturation(
            True,
            f"Saturated: {last:,.0f} of {len(arrived):,} requests waited when the last one arrived; "
            "latencies measure how long the burst takes to drain.",
        )
    return Saturation(
        False,
        f"No growth of the backlog beyond chance ({course}).",
    )


def _count_until(sorted_times: FloatColumn, times: FloatColumn) -> FloatColumn:
    return np.searchsorted(sorted_times, times, side="right").astype(np.float64)
