"""Whether a run was offered more than it served: then its latencies measure its length.

Knows a run's request columns and nothing else.
"""

from dataclasses import dataclass
from math import inf, sqrt

import numpy as np

from qlm_sim.metrics.columns import FloatColumn, Mask, RequestColumns

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

    An engine takes in more than it serves as long as its batch has room, and no backlog shows that yet. So
    the requests in the system, those that run too, are judged by the same growth, provided that the early
    ones stayed for no more than a quarter of the arrivals: where they stay longer, their number grows at any
    load.
    """
    kept = ~requests.rejected
    arrived = requests.arrival_s[kept]
    if len(arrived) == 0:
        return Saturation(False, "No request was served.")
    arrived = np.sort(arrived)
    served = np.sort(requests.first_token_s[kept & ~np.isnan(requests.first_token_s)])
    left = np.sort(requests.finished_s[kept & ~np.isnan(requests.finished_s)])
    start, end = arrived[0], arrived[-1]

    def behind(gone: FloatColumn, share_from: float, share_to: float) -> float:
        times = start + (end - start) * np.linspace(share_from, share_to, 50)
        return float(np.mean(_count_until(arrived, times) - _count_until(gone, times)))

    def grew(gone: FloatColumn) -> tuple[bool, str]:
        early, middle, late = behind(gone, 0.05, 0.15), behind(gone, 0.45, 0.55), behind(gone, 0.9, 1.0)
        course = (
            f"{early:,.0f} requests a tenth into the arrivals, {middle:,.0f} halfway, {late:,.0f} at their "
            f"end, of {len(arrived):,}"
        )
        between = len(arrived) * 0.85
        growth = late - early
        beyond_chance = growth > max(2 * sqrt(2 * between), 0.02 * between)
        return beyond_chance and late - middle > growth / 4, course

    waiting_grew, course = grew(served)
    if waiting_grew:
        return Saturation(
            True,
            f"Saturated: the backlog still grew when arrivals ended ({course}); in a longer run latencies "
            "would be longer.",
        )
    present_grew, presence = grew(left)
    if present_grew and _early_stay_s(requests, kept, (start + end) / 2) <= (end - start) / 4:
        return Saturation(
            True,
            "Saturated: the requests that wait or run still grew in number when arrivals ended "
            f"({presence}); in a longer run latencies would be longer.",
        )
    last = behind(served, 1.0, 1.0)
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


def _early_stay_s(requests: RequestColumns, kept: Mask, until_s: float) -> float:
    """Mean seconds from arrival to end of those that came until then and have ended; infinite if none has."""
    ended = requests.e2e_s[kept & (requests.arrival_s <= until_s) & ~np.isnan(requests.finished_s)]
    return float(ended.mean()) if len(ended) else inf


def _count_until(sorted_times: FloatColumn, times: FloatColumn) -> FloatColumn:
    return np.searchsorted(sorted_times, times, side="right").astype(np.float64)
