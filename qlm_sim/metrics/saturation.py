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
    arrived = _arrivals(requests)
    if len(arrived) == 0:
        return Saturation(False, "No request was served.")
    grew, course = _grew(arrived, requests.first_token_s[~requests.rejected])
    if grew:
        return Saturation(
            True,
            f"Saturated: the backlog still grew when arrivals ended ({course}); in a longer run latencies "
            "would be longer.",
        )
    last = len(arrived) - int((requests.first_token_s[~requests.rejected] <= arrived[-1]).sum())
    if last > max(len(arrived) / 2, LEAST_BURST - 1):
        return Saturation(
            True,
            f"Saturated: {last:,} of {len(arrived):,} requests waited when the last one arrived; "
            "latencies measure how long the burst takes to drain.",
        )
    return Saturation(
        False,
        f"No growth of the backlog beyond chance ({course}).",
    )


def growing_presence(requests: RequestColumns) -> str | None:
    """How the number of requests that wait or run grew, in the way that a saturated backlog does; None where
    it did not.

    An engine takes in more than it serves as long as its batch has room, and no backlog shows that yet. But
    presence is the rate of arrivals times their stay: it also grows with the rate, and until the first have
    left. So it tells of saturation only where the load is known to be near capacity; and nothing is told
    where the early ones stayed for over a quarter of the arrivals.
    """
    arrived = _arrivals(requests)
    if len(arrived) == 0:
        return None
    early = requests.arrival_s <= (arrived[0] + arrived[-1]) / 2
    stay_s = requests.e2e_s[early & requests.finished]
    if len(stay_s) == 0 or stay_s.mean() > (arrived[-1] - arrived[0]) / 4:
        return None
    grew, course = _grew(arrived, requests.finished_s[~requests.rejected])
    return course if grew else None


def _arrivals(requests: RequestColumns) -> FloatColumn:
    return np.sort(requests.arrival_s[~requests.rejected])


def _grew(arrived: FloatColumn, gone_s: FloatColumn) -> tuple[bool, str]:
    """Whether the number of those that came and have not gone grew beyond chance, and its course."""
    gone = np.sort(gone_s[~np.isnan(gone_s)])
    start, end = arrived[0], arrived[-1]

    def present(share_from: float, share_to: float) -> float:
        times = start + (end - start) * np.linspace(share_from, share_to, 50)
        return float(np.mean(_count_until(arrived, times) - _count_until(gone, times)))

    early, middle, late = present(0.05, 0.15), present(0.45, 0.55), present(0.9, 1.0)
    course = (
        f"{early:,.0f} requests a tenth into the arrivals, {middle:,.0f} halfway, {late:,.0f} at their end, "
        f"of {len(arrived):,}"
    )
    between = len(arrived) * 0.85
    growth = late - early
    beyond_chance = growth > max(2 * sqrt(2 * between), 0.02 * between)
    return beyond_chance and late - middle > growth / 4, course


def _count_until(sorted_times: FloatColumn, times: FloatColumn) -> FloatColumn:
    return np.searchsorted(sorted_times, times, side="right").astype(np.float64)
