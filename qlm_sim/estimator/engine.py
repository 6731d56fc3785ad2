"""An engine with what runs on it and what waits for it, as columns: what waits are forecast from."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qlm_sim.core.types import ModelOnInstance
from qlm_sim.estimator.lengths import Floats, LengthDistribution
from qlm_sim.estimator.pace import Pace
from qlm_sim.estimator.service import RoomRule
from qlm_sim.estimator.steps import decode_step_s


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine and its rule for taking requests in."""

    profile: ModelOnInstance
    slowness: float
    """Its seconds per second of the profile."""
    rule: RoomRule
    lengths: Sequence[LengthDistribution]
    """Output lengths by kind of request."""
    observations: float
    """How many requests those rest on."""
    pace: Pace | None = None
    """What it was seen to get done under a waiting line."""
    iterated_s: float = 0.0
    """When it was last seen to end an iteration, in seconds from now: not positive ..."""
    began_s: float = 0.0
    """... and when it last ended one with a prefill."""

    def step_s(self, sequences: float, kv_tokens: float) -> float:
        return self.slowness * decode_step_s(self.profile, sequences, kv_tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """What decodes: columns of one length."""

    generated: Floats
    """Tokens, all attempts together, when its survival counts from."""
    since: Floats
    """Decode steps since then, survived in expectation alone."""
    brought: Floats
    """KV tokens that each brought along to its present attempt."""
    began: Floats
    """Tokens generated when its present attempt began to decode."""
    kind: NDArray[np.int64]
    """Index into the length distributions."""

    def __len__(self) -> int:
        return len(self.generated)

    def survivors(
        self, steps: Floats, lengths: Sequence[LengthDistribution]
    ) -> tuple[Floats, Floats, Floats]:
        """Expected sequences, their KV tokens, and what they brought along, after so many steps."""
        sequences, kv_tokens, brought = np.zeros((3, len(steps)))
        for kind in np.unique(self.kind).tolist():
            rows = self.kind == kind
            start = self.generated[rows]
            tokens = (start + self.since[rows])[:, None] + steps
            log_survival = lengths[kind].log_survival
            alive = np.exp(log_survival(tokens) - log_survival(start)[:, None])
            sequences += alive.sum(axis=0)
            contexts = self.brought[rows] @ alive
            brought += contexts
            kv_tokens += contexts + ((tokens - self.began[rows][:, None] + 1) * alive).sum(axis=0)
        return sequences, kv_tokens, brought


@dataclass(frozen=True)
class Line:
    """What waits, in order: columns of one length. The last entries may stand for several requests."""

    context: Floats
    """KV tokens that each needs to start."""
    prefill: Floats
    """Tokens that must be computed for it; fewer than ``context`` where KV comes back from the host."""
    kind: NDArray[np.int64]
    count: Floats
    """Requests per entry: 1 except at the end of a long line."""
    sent_s: Sequence[float] = ()
    """When those at the head that are on the engine already were sent, in seconds from now: ascending, not
    positive."""

    @property
    def sent(self) -> int:
        """So many at the head are on the engine already."""
        return len(self.sent_s)

    def __len__(self) -> int:
        return len(self.context)

    def behind(self, entries: int) -> "Line":
        """The line without its first entries."""
        rest = slice(entries, None)
        sent_s = self.sent_s[entries:]
        return Line(self.context[rest], self.prefill[rest], self.kind[rest], self.count[rest], sent_s)

    @cached_property
    def requests(self) -> float:
        return float(self.count.sum())

    def mean(self, column: Floats) -> float:
        """Mean per request."""
        return float(self.count @ column) / self.requests


class Places:
    """Running totals over the line, linear between its entries; behind its end, more like them."""

    def __init__(self, line: Line, kinds: int) -> None:
        endless = 1e9
        count = np.append(line.count, endless)
        self._place = np.concatenate(([0.0], np.cumsum(count)))
        self._context = self._total(count * np.append(line.context, line.mean(line.context)))
        self._prefill = self._total(count * np.append(line.prefill, line.mean(line.prefill)))
        by_kind = np.zeros((len(count), kinds))
        by_kind[np.arange(len(line)), line.kind] = line.count
        by_kind[-1] = endless / line.requests * by_kind.sum(axis=0)
        contexts = by_kind * np.append(line.context, 0.0)[:, None]
        contexts[-1] = endless / line.requests * contexts.sum(axis=0)
        self._by_kind = self._total(np.hstack((by_kind, contexts)))
        self._kinds = kinds

    @staticmethod
    def _total(column: Floats) -> Floats:
        return np.concatenate((np.zeros_like(column[:1]), np.cumsum(column, axis=0)))

    def with_context(self, place: float, tokens: float, each: float) -> float:
        """The place at which ``tokens`` more of context, and ``each`` per request, are reached."""
        total = self._context + each * self._place if each else self._context
        here = float(np.interp(place, self._place, total))
        return float(np.interp(here + tokens, total, self._place))

    def contexts(self, place: Floats) -> Floats:
        """Tokens of context up to each place."""
        total: Floats = np.interp(place, self._place, self._context)
        return total

    def with_prefill(self, place: float, tokens: float) -> float:
        here = float(np.interp(place, self._place, self._prefill))
        return float(np.interp(here + tokens, self._prefill, self._place))

    def between(self, start: float, end: float) -> tuple[Floats, Floats]:
        """Requests, and what they bring, by kind."""
        both = self._at(end) - self._at(start)
        return both[: self._kinds], both[self._kinds :]

    def _at(self, place: float) -> Floats:
        index = min(max(bisect_left(self._place, place), 1), len(self._place) - 1)
        low, high = self._place[index - 1], self._place[index]
        below, above = self._by_kind[index - 1], self._by_kind[index]
        row: Floats = below + (place - low) / (high - low) * (above - below)
        return row
