"""The event log's reader: what a run's metrics are made of, gathered while it runs.

Sees each settle's events and actions and nothing else. It is on the hot path of every simulated
request, so settles are gathered and read in batches, and a request's state is a row of columns from
its arrival on: no object per request is kept, nothing is moved when it ends.
"""

from array import array
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from qlm_sim.core.actions import Action, Pull, Reject
from qlm_sim.core.events import (
    EngineReported,
    Event,
    FirstToken,
    InstanceDown,
    InstanceUp,
    ModelSwapped,
    Progress,
    RequestArrived,
    RequestCancelled,
    RequestEvicted,
    RequestFailed,
    RequestFinished,
)
from qlm_sim.core.ids import Ids
from qlm_sim.core.types import InstanceSpec, Request
from qlm_sim.metrics.columns import RequestColumns, State
from qlm_sim.metrics.series import EngineSampler, EngineSeries, InstanceTimeline, LoadSampler, LoadSeries

_BATCH_SETTLES = 256
_BLOCK_ROWS = 8192
_WAITING, _SENT, _RUNNING, _FINISHED, _REJECTED, _FAILED = (int(state) for state in State)

_COLUMNS: dict[str, tuple[str, type[np.generic]]] = {
    "arrival_s": ("_arrival_s", np.float64),
    "prompt_tokens": ("_prompt_tokens", np.int32),
    "output_tokens": ("_output_tokens", np.int32),
    "model_index": ("_model", np.int32),
    "class_index": ("_class", np.int32),
    "first_token_s": ("_first_token_s", np.float64),
    "finished_s": ("_finished_s", np.float64),
    "instance_index": ("_instance", np.int32),
    "attempts": ("_attempts", np.int32),
    "evictions": ("_evictions", np.int32),
    "state": ("_state", np.int8),
}
"""Where the recorder holds each column of RequestColumns while the run goes, and what it becomes."""


class _Codes(dict[str, int]):
    """Small numbers for names, given in order of first sight."""

    def __missing__(self, name: str) -> int:
        code = self[name] = len(self)
        return code


class _Timeline:
    """One instance's InstanceTimeline in the making."""

    def __init__(self) -> None:
        self.loaded_s = array("d")
        self.models: list[str] = []
        self.swap_s = array("d")
        self.evicted_s = array("d")

    def loaded(self, now: float, model: str, swap_s: float) -> None:
        self.loaded_s.append(now)
        self.models.append(model)
        self.swap_s.append(swap_s)


class RunRecorder:
    """The Recorder of runs that are to be measured. Reading it in mid-run is allowed.

    ``instances`` are those up at the start. Events of an attempt that is over are dropped, as the
    core drops them.
    """

    def __init__(self, instances: Sequence[InstanceSpec] = ()) -> None:
        self._pending: list[tuple[float, Sequence[Event], Sequence[Action]]] = []
        self._row_of: dict[str, int] = {}
        """The rows of requests still in the system."""
        self._models, self._classes, self._instances = _Codes(), _Codes(), _Codes()
        # Filled in at arrival.
        self._ids = Ids()
        self._arrival_s = array("d")
        self._prompt_tokens = array("i")
        self._model = array("i")
        self._class: list[int] = []
        # Grown by blocks of rows, written when things happen. Lists of small numbers are faster to
        # read and write than arrays, and hold no objects of their own.
        self._capacity = 0
        self._first_token_s, self._finished_s = array("d"), array("d")
        self._output_tokens, self._evictions = array("i"), array("i")
        self._attempts: list[int] = []
        self._instance: list[int] = []
        self._state: list[int] = []

        self._running = 0
        """Requests that decode now ..."""
        self._waiting: list[int] = []
        """... and those of each class that wait for their first token."""
        self._load = LoadSampler()
        self._engines: defaultdict[str, EngineSampler] = defaultdict(EngineSampler)
        self._timelines: defaultdict[str, _Timeline] = defaultdict(_Timeline)
        self._swaps = 0
        for spec in instances:
            self._instance_up(0.0, spec)

    def record(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None:
        """Take one settle. Neither sequence may be changed afterwards."""
        pending = self._pending
        pending.append((now, events, actions))
        if len(pending) >= _BATCH_SETTLES:
            self._read()

    def requests(self) -> RequestColumns:
        """Every request that arrived until now."""
        return self._columns(release=False)

    def hand_over(self) -> RequestColumns:
        """Every request, when all is recorded: what is handed over is not held here any longer."""
        return self._columns(release=True)

    def _columns(self, release: bool) -> RequestColumns:
        self._read()
        rows = len(self._class)
        columns = {}
        for name, (held_as, kind) in _COLUMNS.items():
            held = getattr(self, held_as)
            if isinstance(held, array):
                column = np.frombuffer(held, kind)[:rows]
                columns[name] = column if release else column.copy()
            else:
                columns[name] = np.fromiter(held, kind, rows)
            if release:
                setattr(self, held_as, array(held.typecode) if isinstance(held, array) else [])
        ids = self._ids
        if release:
            self._ids = Ids()
        return RequestColumns(
            ids=ids if release else Ids(ids),
            models=tuple(self._models),
            class_names=tuple(self._classes),
            instances=tuple(self._instances),
            **columns,
        )

    def load(self) -> LoadSeries:
        """Requests waiting and running over time."""
        self._read()
        return self._load.series(tuple(self._classes))

    def engines(self) -> dict[str, EngineSeries]:
        """The reports of each instance, by its id in order."""
        self._read()
        return {name: self._engines[name].series() for name in sorted(self._engines)}

    def timelines(self) -> dict[str, InstanceTimeline]:
        """Models, swaps and evictions of each instance, by its id in order."""
        self._read()
        return {
            name: InstanceTimeline(
                loaded_s=np.array(timeline.loaded_s),
                models=tuple(timeline.models),
                swap_s=np.array(timeline.swap_s),
                evicted_s=np.array(timeline.evicted_s),
            )
            for name, timeline in sorted(self._timelines.items())
        }

    def swaps(self) -> int:
        """Models loaded since the start, on all instances."""
        self._read()
        return self._swaps

    def preemptions(self) -> int:
        """Requests preempted inside the engines, as those last reported."""
        self._read()
        return sum(engine.preemptions for engine in self._engines.values())

    def prefix_cache_hit_rate(self) -> float | None:
        """Share of the tokens that the engines looked up in their prefix caches and found there."""
        self._read()
        queries = sum(engine.prefix_queries for engine in self._engines.values())
        hits = sum(engine.prefix_hits for engine in self._engines.values())
        return hits / queries if queries else None

    def _grow(self) -> None:
        self._capacity += _BLOCK_ROWS
        for times in (self._first_token_s, self._finished_s):
            times.extend(array("d", [float("nan")]) * _BLOCK_ROWS)
        for numbers in (self._output_tokens, self._evictions):
            numbers.extend(array("i", [0]) * _BLOCK_ROWS)
        for codes, nothing in ((self._attempts, 0), (self._instance, -1), (self._state, _WAITING)):
            codes.extend([nothing] * _BLOCK_ROWS)

    def _read(self) -> None:
        """Read the gathered settles. The commonest events come first; locals are for speed."""
        pending, self._pending = self._pending, []
        row_of, running, waiting, load = self._row_of, self._running, self._waiting, self._load
        row_of_get = row_of.get
        state, attempts, class_of = self._state, self._attempts, self._class
        first_token_s, finished_s = self._first_token_s, self._finished_s
        output_tokens, instance = self._output_tokens, self._instance
        classes, instances = self._classes, self._instances
        arrived: list[Request] = []
        rows = len(class_of)
        sample_s = load.next_s
        for now, events, actions in pending:
            if now >= sample_s:
                load.sample(now, running, waiting)
                sample_s = load.next_s
            for event in events:
                if type(event) is RequestFinished:
                    row = row_of_get(event.request_id, -1)
                    if row < 0 or attempts[row] != event.attempt or state[row] == _WAITING:
                        continue
                    del row_of[event.request_id]
                    if state[row] == _RUNNING:
                        running -= 1
                    else:  # its FirstToken belongs to this same instant and is sorted behind
                        waiting[class_of[row]] -= 1
                        if first_token_s[row] != first_token_s[row]:
                            first_token_s[row] = now
                    state[row] = _FINISHED
                    finished_s[row] = now
                    output_tokens[row] = event.output_tokens
                elif type(event) is FirstToken:
                    row = row_of_get(event.request_id, -1)
                    if row < 0 or attempts[row] != event.attempt:
                        continue
                    if first_token_s[row] != first_token_s[row]:
                        first_token_s[row] = now
                    if state[row] == _SENT:
                        state[row] = _RUNNING
                        running += 1
                        waiting[class_of[row]] -= 1
                elif type(event) is RequestArrived:
                    request = event.request
                    if rows == self._capacity:
                        self._grow()
                    row_of[request.id] = rows
                    rows += 1
                    slo_class = classes[request.slo_class]
                    class_of.append(slo_class)
                    if slo_class == len(waiting):
                        waiting.append(0)
                    waiting[slo_class] += 1
                    arrived.append(request)
                elif type(event) is Progress:
                    row = row_of_get(event.request_id, -1)
                    if row >= 0 and attempts[row] == event.attempt:
                        output_tokens[row] = event.output_tokens
                elif type(event) is EngineReported:
                    self._engines[event.instance].report(now, event)
                else:
                    self._running = running
                    self._rare(now, event)
                    running = self._running
            for action in actions:
                if type(action) is Pull:
                    row = row_of[action.request_id]
                    attempts[row] = action.attempt
                    instance[row] = instances[action.instance]
                    state[row] = _SENT
                elif type(action) is Reject:
                    self._end(action.request_id, _REJECTED)
        self._running = running
        self._append(arrived)

    def _append(self, requests: list[Request]) -> None:
        self._ids.extend([request.id for request in requests])
        self._arrival_s.extend([request.arrived_at for request in requests])
        self._prompt_tokens.extend([request.prompt_tokens for request in requests])
        self._model.extend([self._models[request.model] for request in requests])

    def _rare(self, now: float, event: Event) -> None:
        if isinstance(event, RequestEvicted):
            row = self._row_of.get(event.request_id, -1)
            if row >= 0 and self._attempts[row] == event.attempt and self._state[row] != _WAITING:
                self._give_back(row)
                self._output_tokens[row] = event.output_tokens
                self._evictions[row] += 1
                self._timelines[event.instance].evicted_s.append(now)
        elif isinstance(event, ModelSwapped):
            self._swaps += 1
            self._timelines[event.instance].loaded(now, event.model, event.swap_s)
        elif isinstance(event, RequestFailed):
            row = self._row_of.get(event.request_id, -1)
            if row >= 0 and self._attempts[row] == event.attempt:
                self._end(event.request_id, _FAILED)
        elif isinstance(event, RequestCancelled):
            self._end(event.request_id, _FAILED)
        elif isinstance(event, InstanceUp):
            self._instance_up(now, event.spec)
        elif isinstance(event, InstanceDown):
            gone = self._instances[event.instance]
            for row in self._row_of.values():
                if self._instance[row] == gone and self._state[row] != _WAITING:
                    self._give_back(row)
            self._timelines[event.instance].loaded(now, "", 0.0)

    def _instance_up(self, now: float, spec: InstanceSpec) -> None:
        self._engines[spec.id].restart()
        self._timelines[spec.id].loaded(now, spec.resident or "", 0.0)

    def _give_back(self, row: int) -> None:
        """The request waits again."""
        if self._state[row] == _RUNNING:
            self._running -= 1
            self._waiting[self._class[row]] += 1
        self._state[row] = _WAITING

    def _end(self, request_id: str, state: int) -> None:
        """The request leaves the system without finishing."""
        row = self._row_of.pop(request_id, -1)
        if row >= 0:
            self._give_back(row)
            self._waiting[self._class[row]] -= 1
            self._state[row] = state
