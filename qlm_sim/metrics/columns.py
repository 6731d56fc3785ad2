"""What became of every request of a run, as columns in order of arrival.

Knows requests and SLO classes; nothing of events, policies or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qlm_sim.core.types import SloClass

FloatColumn = NDArray[np.float64]
IntColumn = NDArray[np.int32]
Mask = NDArray[np.bool_]


class State(IntEnum):
    """Where a request stands. Below FINISHED it is still in the system."""

    WAITING = 0
    """Arrived or evicted, on no engine."""
    SENT = 1
    """Pulled by an engine, no token of this attempt yet."""
    RUNNING = 2
    FINISHED = 3
    REJECTED = 4
    FAILED = 5
    """Ended without finishing: failed on an engine, or cancelled by its client."""


@dataclass(frozen=True)
class RequestColumns:
    """One row per request that arrived. Times in seconds since the run's start, NaN where never."""

    ids: Sequence[str]
    models: tuple[str, ...]
    model_index: IntColumn
    class_names: tuple[str, ...]
    class_index: IntColumn
    arrival_s: FloatColumn
    prompt_tokens: IntColumn
    output_tokens: IntColumn
    """Tokens generated; of an unfinished request, as many as the log last told of."""
    first_token_s: FloatColumn
    """The first token that the request ever got, whichever attempt brought it."""
    finished_s: FloatColumn
    instances: tuple[str, ...]
    instance_index: IntColumn
    """The last instance that pulled the request, -1 where none did."""
    attempts: IntColumn
    evictions: IntColumn
    state: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.arrival_s)

    @cached_property
    def finished(self) -> Mask:
        return np.equal(self.state, State.FINISHED)

    @cached_property
    def unfinished(self) -> Mask:
        return np.less(self.state, State.FINISHED)

    @cached_property
    def rejected(self) -> Mask:
        """Refused or failed: neither finished nor still in the system."""
        return np.greater(self.state, State.FINISHED)

    @cached_property
    def refused(self) -> Mask:
        """Refused at once by admission control."""
        return np.equal(self.state, State.REJECTED)

    @property
    def ttft_s(self) -> FloatColumn:
        return self.first_token_s - self.arrival_s

    @property
    def e2e_s(self) -> FloatColumn:
        return self.finished_s - self.arrival_s

    @property
    def tpot_s(self) -> FloatColumn:
        """(E2E - TTFT) / (output tokens - 1): NaN for outputs of one token and for the unfinished."""
        steps = np.where(self.output_tokens > 1, self.output_tokens - 1, np.nan)
        return np.asarray((self.e2e_s - self.ttft_s) / steps, dtype=np.float64)

    def part(self, rows: slice) -> "RequestColumns":
        """Some of the rows, without copying them."""
        columns = {
            field.name: getattr(self, field.name)[rows]
            for field in fields(self)
            if field.name == "ids" or isinstance(getattr(self, field.name), np.ndarray)
        }
        return replace(self, **columns)

    def of_class(self, name: str) -> Mask:
        """The rows of one SLO class; none where no request of that class arrived."""
        if name not in self.class_names:
            return np.zeros(len(self), dtype=np.bool_)
        return np.equal(self.class_index, self.class_names.index(name))

    def slo_met(self, slo_classes: Sequence[SloClass]) -> Mask:
        """Finished, and within every target that its class sets. No other request counts as met."""
        met = np.zeros(len(self), dtype=np.bool_)
        for slo in slo_classes:
            inside = self.finished & self.of_class(slo.name)
            for target, value in ((slo.ttft_s, self.ttft_s), (slo.e2e_s, self.e2e_s)):
                if target is not None:
                    inside &= value <= target
            if slo.tpot_s is not None:
                inside &= (self.tpot_s <= slo.tpot_s) | np.isnan(self.tpot_s)
            met |= inside
        return met
