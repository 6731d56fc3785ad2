"""Fair shares: how much of each tenant's backlog the scheduler gets to see.

Not a scheduler: it orders nothing but each tenant's own arrivals. Of every SLO class at most ``window``
requests wait in the scheduler, and each tenant that has work may have its share of them, by weight; the rest
is held here, first come, first served. So a tenant that stays within its share finds at most a window of
other tenants' requests before its own, however many they send. And since the scheduler serves what waits in
it without regard to tenants, tenants that always have more get engine time in proportion to their places,
which is to their weights.

Knows no clock and no request: an item is anything hashable. The methods return the items to let in now.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum


class _State(Enum):
    HELD = "held"
    WAITING = "waiting"
    """Let in, and not pulled by an engine yet."""
    PULLED = "pulled"


@dataclass(slots=True, eq=False)
class _Item:
    slo_class: str
    line: "_Line"
    number: int
    """In the order of the line's arrivals."""
    state: _State = _State.HELD


@dataclass(slots=True, eq=False)
class _Line:
    """One tenant's requests of one class."""

    tenant: str
    weight: float
    held: dict[Hashable, _Item] = field(default_factory=dict)
    waiting: int = 0
    present: int = 0
    """All of its requests that are not over, held or not."""
    arrivals: int = 0


@dataclass(slots=True, eq=False)
class _Class:
    lines: dict[str, _Line] = field(default_factory=dict)
    """Of every tenant that has work."""
    weight: float = 0.0
    """Of all lines together."""


class FairWindows:
    """Decides what is let into the scheduler and what is held back."""

    def __init__(self, window: float, weights: Mapping[str, float]) -> None:
        """``window``: places per class; infinite holds nothing back. ``weights``: 1 where absent."""
        self.window = window
        self.held = 0
        """Requests that are held back, all tenants together."""
        self._weights = dict(weights)
        self._classes: dict[str, _Class] = {}
        self._items: dict[Hashable, _Item] = {}

    def offer(self, key: Hashable, tenant: str, slo_class: str) -> list[Hashable]:
        """A request has come."""
        of_class = self._classes.setdefault(slo_class, _Class())
        line = of_class.lines.get(tenant)
        if line is None:
            line = of_class.lines[tenant] = _Line(tenant, self._weights.get(tenant, 1.0))
            of_class.weight += line.weight
        item = self._items[key] = _Item(slo_class, line, line.arrivals)
        line.arrivals += 1
        line.present += 1
        line.held[key] = item
        self.held += 1
        return self._let_in(of_class)

    def pulled(self, key: Hashable) -> list[Hashable]:
        """An engine has taken the request: its place is free."""
        item = self._items.get(key)
        if item is None or item.state is not _State.WAITING:
            return []
        item.state = _State.PULLED
        item.line.waiting -= 1
        return self._let_in(self._classes[item.slo_class])

    def over(self, key: Hashable) -> list[Hashable]:
        """The request is finished, failed, refused or cancelled, wherever it was."""
        item = self._items.pop(key, None)
        if item is None:
            return []
        line = item.line
        if item.state is _State.HELD:
            del line.held[key]
            self.held -= 1
        elif item.state is _State.WAITING:
            line.waiting -= 1
        line.present -= 1
        of_class = self._classes[item.slo_class]
        if not line.present:
            del of_class.lines[line.tenant]
            of_class.weight = sum(each.weight for each in of_class.lines.values())
        return self._let_in(of_class)

    def ahead(self, key: Hashable) -> int | None:
        """Requests of its tenant and class that are held before this one, at most; None if it is not held."""
        item = self._items.get(key)
        if item is None or item.state is not _State.HELD:
            return None
        first = next(iter(item.line.held.values()))
        return item.number - first.number

    def share(self, tenant: str, slo_class: str) -> float:
        """Places of the class that a tenant with work in it may have now, at least one."""
        of_class = self._classes[slo_class]
        return self._share(of_class, of_class.lines[tenant])

    def held_by_tenant(self) -> dict[str, int]:
        """Requests held back, of every tenant that has work."""
        held: dict[str, int] = {}
        for of_class in self._classes.values():
            for name, line in of_class.lines.items():
                held[name] = held.get(name, 0) + len(line.held)
        return held

    def _share(self, of_class: _Class, line: _Line) -> float:
        if math.isinf(self.window):
            return self.window
        return max(1.0, self.window * line.weight / of_class.weight)

    def _let_in(self, of_class: _Class) -> list[Hashable]:
        admitted: list[Hashable] = []
        if not self.held:
            return admitted
        for line in of_class.lines.values():
            if not line.held:
                continue
            share = self._share(of_class, line)
            while line.held and line.waiting + 1 <= share:
                key = next(iter(line.held))
                line.held.pop(key).state = _State.WAITING
                line.waiting += 1
                admitted.append(key)
        self.held -= len(admitted)
        return admitted
