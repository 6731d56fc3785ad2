"""A run's event log as a file, and the proof that a fresh core decides the same again.

JSON Lines: a header with all that the core was made from, then one line per settle, which holds its time,
its events and the orders that the core gave. A plan's problem is kept as a digest: the core makes it anew.
"""

import gzip
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args

import msgspec

from qlm_sim import __version__
from qlm_sim.core.actions import Action, Replan
from qlm_sim.core.events import Event, InstanceUp
from qlm_sim.core.types import InstanceSpec, SloClass, StepCost
from qlm_sim.errors import InputError
from qlm_sim.models.step_time import StepModel
from qlm_sim.policies import POLICIES, SchedulerSettings, make_core
from qlm_sim.runtime import Recorder
from qlm_sim.workload.files import text_lines

VERSION = 1
_START = b'{"qlm_event_log":'
_BUFFER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LogHeader:
    """All that a core is made from, and what its run was to be measured by."""

    qlm_event_log: int = VERSION
    qlm_version: str = __version__
    policy: str
    settings: SchedulerSettings
    instances: tuple[InstanceSpec, ...]
    """Those up at the start."""
    slo_classes: tuple[SloClass, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a fresh core decided otherwise."""

    line: int
    at_s: float
    logged: str
    decided: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of replaying a log."""

    header: LogHeader
    settles: int
    events: int
    orders: int
    ended_at: float
    difference: Difference | None
    """The first one; the replay stops there."""
    cut: str | None
    """What is wrong with the last line where the writer was killed in the middle of it."""


def _by_name(union: UnionType) -> dict[str, type]:
    return {kind.__name__: kind for kind in get_args(union)}


_EVENTS = _by_name(Event)


def _encode_hook(value: Any) -> Any:
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(f"an event log cannot hold {value!r}")


def _decode_hook(kind: type, value: Any) -> Any:
    if kind is StepCost:
        return msgspec.convert(value, StepModel)
    raise TypeError(f"an event log holds no {kind}")


def _bare(spec: InstanceSpec) -> InstanceSpec:
    """The spec without what its step models have remembered."""
    models = {}
    for name, model in spec.models.items():
        assert isinstance(model.step, StepModel), f"{spec.id}: an event log holds no {type(model.step)}"
        models[name] = replace(model, step=replace(model.step))
    return replace(spec, models=models)


_encode = msgspec.json.Encoder(enc_hook=_encode_hook).encode


def _order(action: Action) -> tuple[str, Any]:
    if isinstance(action, Replan):
        problem = hashlib.blake2b(_encode(action.problem), digest_size=8).hexdigest()
        return "Replan", {"number": action.problem.number, "problem": problem}
    return type(action).__name__, action


def _fact(event: Event) -> tuple[str, Event]:
    if isinstance(event, InstanceUp):
        event = InstanceUp(_bare(event.spec))
    return type(event).__name__, event


def _settle_line(now: float, events: Sequence[Event], actions: Sequence[Action]) -> bytes:
    return _encode({"at": now, "events": list(map(_fact, events)), "orders": list(map(_order, actions))})


class EventLogWriter:
    """A Recorder that writes each settle down and passes it on.

    Lines are buffered; ``flush`` hands them to the system. Close it at the end.
    """

    def __init__(self, path: Path, header: LogHeader, recorder: Recorder | None = None) -> None:
        self._recorder = recorder
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        self._lines = [_encode(replace(header, instances=tuple(map(_bare, header.instances))))]
        self._size = 0

    def record(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None:
        if self._recorder is not None:
            self._recorder.record(now, events, actions)
        line = _settle_line(now, events, actions)
        self._lines.append(line)
        self._size += len(line)
        if self._size >= _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        self._file.write(b"".join(line + b"\n" for line in self._lines))
        self._file.flush()
        self._lines.clear()
        self._size = 0

    def close(self) -> None:
        self.flush()
        self._file.close()


def is_event_log(path: str) -> bool:
    """Whether the file begins as an event log does. False for one that cannot be read."""
    try:
        with Path(path).open("rb") as raw:
            start = raw.read(2)
            raw.seek(0)
            file = gzip.GzipFile(fileobj=raw) if start == b"\x1f\x8b" else raw
            return file.read(len(_START)) == _START
    except (OSError, EOFError):
        return False


def replay_event_log(
    path: str, recorder: Recorder | None = None, progress: Callable[[int, int], None] | None = None
) -> Verdict:
    """Feed a log's events to a fresh core and compare its orders with those in the log.

    ``recorder`` sees every settle. ``progress`` is told (bytes read, bytes of the file). Raises InputError.
    """
    lines = text_lines(path, progress)
    number, text = next(lines, (1, ""))
    header = _header(path, text)
    core = make_core(header.policy, header.instances, header.settings)
    settles = count = orders = 0
    now = 0.0
    difference = cut = None
    for number, settle, problem in _settles(path, lines):
        if settle is None:
            cut = problem
            break
        now = settle["at"]
        events = [_event(path, number, each) for each in settle["events"]]
        actions = core.handle(now, events)
        decided = msgspec.json.decode(_encode(list(map(_order, actions))))
        if decided != settle["orders"]:
            difference = Difference(number, now, *_first_unlike(settle["orders"], decided))
            break
        if recorder is not None:
            recorder.record(now, events, actions)
        settles += 1
        count += len(events)
        orders += len(actions)
    return Verdict(header, settles, count, orders, now, difference, cut)


def _header(path: str, text: str) -> LogHeader:
    try:
        header = msgspec.json.decode(text, type=LogHeader, dec_hook=_decode_hook)
    except (msgspec.DecodeError, TypeError) as error:
        raise InputError(f"{path}:1: not the header of an event log: {error}") from None
    if header.qlm_event_log != VERSION:
        raise InputError(
            f"{path}:1: event log version {header.qlm_event_log}, written by qlm {header.qlm_version}; "
            f"this is qlm {__version__}, which reads version {VERSION}"
        )
    if header.policy not in POLICIES:
        raise InputError(f"{path}:1: policy {header.policy!r} is not known; known: {', '.join(POLICIES)}")
    return header


def _settles(
    path: str, lines: Iterator[tuple[int, str]]
) -> Iterator[tuple[int, Mapping[str, Any] | None, str | None]]:
    """(line number, settle, None); at the end perhaps (line number, None, what is wrong with that line)."""
    held: tuple[int, str] | None = None
    for number, text in lines:
        if held is not None:
            raise InputError(f"{path}:{held[0]}: {held[1]}")
        try:
            settle = msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            held = number, f"not JSON: {error}"
            continue
        if not (isinstance(settle, dict) and settle.keys() == {"at", "events", "orders"}):
            raise InputError(f"{path}:{number}: no settle; expected an object of at, events and orders")
        yield number, settle, None
    if held is not None:
        yield held[0], None, f"line {held[0]}: {held[1]}"


def _event(path: str, line: int, value: Any) -> Event:
    try:
        name, fields = value
        event: Event = msgspec.convert(fields, _EVENTS[name], dec_hook=_decode_hook)
    except (KeyError, TypeError, ValueError) as error:
        known = f"; known: {', '.join(_EVENTS)}" if isinstance(error, KeyError) else ""
        raise InputError(f"{path}:{line}: not an event: {error}{known}") from None
    return event


def _first_unlike(logged: Sequence[Any], decided: Sequence[Any]) -> tuple[str, str]:
    """The first order that differs, as text, of each."""
    index = next(
        (i for i, (one, other) in enumerate(zip(logged, decided, strict=False)) if one != other),
        min(len(logged), len(decided)),
    )
    text = [
        msgspec.json.encode(orders[index]).decode() if index < len(orders) else "no further order"
        for orders in (logged, decided)
    ]
    return text[0], text[1]
