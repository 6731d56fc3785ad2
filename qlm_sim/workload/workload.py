"""A workload: every request of a run, as columns, in order of arrival.

Output lengths are the trace's secret: only the simulated engine, a load generator and the
clairvoyant policy read them. ``requests`` yields what a scheduler may see.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlm_sim.core.ids import Ids
from qlm_sim.core.types import Request, SloClass
from qlm_sim.workload.content import Content, contents

Counts = NDArray[np.integer[Any]]
"""Whole numbers, of whatever width holds them."""

_CHUNK = 65536
"""Rows at a time that are made into objects, so that long runs stay small."""


@dataclass(frozen=True)
class Trace:
    """What a trace file says, before a scenario fills in what it does not. Columns of one length."""

    name: str
    ids: Sequence[str]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    arrival_s: NDArray[np.float64] | None = None
    """Seconds since the run's start, ascending; None where the file has no times."""
    model: Sequence[str] | None = None
    """Names; "" where a row names none. ``slo_class`` likewise."""
    slo_class: Sequence[str] | None = None
    max_tokens: NDArray[np.int64] | None = None
    content: Sequence[str] | None = None
    """Which requests begin alike, see qlm_sim.workload.content; "" where a row does not say."""
    foreign_models: bool = False
    """The model names are another service's: one that the scenario lacks is no mistake."""

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def take(self, rows: NDArray[np.int64]) -> "Trace":
        """The trace of these rows, in this order."""

        places = rows.tolist()

        return replace(
            self,
            ids=[self.ids[row] for row in places],
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            arrival_s=None if self.arrival_s is None else self.arrival_s[rows],
            model=None if self.model is None else [self.model[row] for row in places],
            slo_class=None if self.slo_class is None else [self.slo_class[row] for row in places],
            max_tokens=None if self.max_tokens is None else self.max_tokens[rows],
            content=None if self.content is None else [self.content[row] for row in places],
        )


@dataclass(frozen=True)
class Workload:
    """Requests ready to run: columns of one length, sorted by arrival."""

    ids: Sequence[str]
    arrival_s: NDArray[np.float64]
    prompt_tokens: Counts
    output_tokens: Counts
    max_tokens: Counts
    models: tuple[str, ...]
    model_index: Counts
    slo_classes: tuple[SloClass, ...]
    slo_index: Counts
    content: Sequence[str] | None = None
    """As a Trace's."""

    def __len__(self) -> int:
        return len(self.arrival_s)

    def output_by_id(self) -> dict[str, int]:
        """Every true output length, for who may be told them in advance: the clairvoyant policy."""
        return dict(zip(self.ids, self.output_tokens.tolist(), strict=True))

    def requests(self) -> Iterator[tuple[Request, int]]:
        """Each request with its true output length, made when it is asked for."""
        return chain.from_iterable(map(self._requests_from, range(0, len(self), _CHUNK)))

    def _requests_from(self, start: int) -> Iterator[tuple[Request, int]]:
        """Those of one chunk."""
        part = slice(start, start + _CHUNK)
        names = [slo.name for slo in self.slo_classes]
        slo_s = [scheduling_slo_s(slo) for slo in self.slo_classes]
        slos = self.slo_index[part].tolist()
        requests = map(
            Request,
            self.ids[part],
            map(self.models.__getitem__, self.model_index[part].tolist()),
            map(names.__getitem__, slos),
            map(slo_s.__getitem__, slos),
            self.arrival_s[part].tolist(),
            self.prompt_tokens[part].tolist(),
            self.max_tokens[part].tolist(),
        )
        return zip(requests, self.output_tokens[part].tolist(), strict=True)

    def contents(self) -> Iterator[Content]:
        """What each request's tokens have in common with others'. Only the simulated engine may see it."""
        return contents(self.ids, repeat("", len(self)) if self.content is None else self.content)


def scheduling_slo_s(slo: SloClass) -> float:
    """The seconds to the first token that a scheduler aims at: the TTFT target, else the E2E one."""
    if slo.ttft_s is not None:
        return slo.ttft_s
    if slo.e2e_s is not None:
        return slo.e2e_s
    return float("inf")


def drawn_ids(ids: Sequence[str], rows: NDArray[np.int64]) -> Ids:
    """The ids of these rows of a trace; each further time that a row stands there it gets "#2", "#3", ..."""
    if len(set(ids)) < len(ids) or any("#" in each for each in ids):
        return Ids(unique_ids([ids[row] for row in rows.tolist()]))
    order = np.argsort(rows, kind="stable")
    drawn = rows[order]
    first = np.r_[True, drawn[1:] != drawn[:-1]]
    places = np.arange(len(rows))
    times = np.empty(len(rows), dtype=np.int64)
    times[order] = places - np.maximum.accumulate(np.where(first, places, 0)) + 1
    return Ids(
        ids[row] if time == 1 else f"{ids[row]}#{time}"
        for start in range(0, len(rows), _CHUNK)
        for row, time in zip(
            rows[start : start + _CHUNK].tolist(), times[start : start + _CHUNK].tolist(), strict=True
        )
    )


def unique_ids(ids: list[str]) -> list[str]:
    """The ids, where one that was seen before gets "#2", "#3", ... behind it."""
    if len(set(ids)) == len(ids):
        return ids
    seen = dict.fromkeys(ids, 0)
    unique = []
    for request_id in ids:
        seen[request_id] += 1
        name = request_id
        while seen[request_id] > 1 and (name := f"{request_id}#{seen[request_id]}") in seen:
            seen[request_id] += 1
        seen.setdefault(name, 1)
        unique.append(name)
    return unique
