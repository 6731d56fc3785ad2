"""Groups by their first deadline, and instances by when they want to be asked: the earliest at once.

Both are heaps that are mended when they are looked at: an entry may be out of date, but never later than
what it stands for.
"""

from collections.abc import Iterable, Mapping
from heapq import heapify, heappop, heappush, heapreplace

from qlm_sim.core.groups import RequestGroup

_NEVER = float("inf")
MOST_FRESH = 64
"""So many groups are taken in together at most."""


class DeadlineIndex:
    """Some of the groups of a table; one that is emptied leaves the index by itself."""

    __slots__ = ("_fresh", "_groups", "_heap")

    def __init__(self, groups: Mapping[int, RequestGroup]) -> None:
        """``groups``: the table's, by id."""
        self._groups = groups
        self._heap: list[tuple[float, int]] = []
        self._fresh: list[RequestGroup] = []
        """Added since the last look. Most groups are gone by then, where nothing waits for long."""

    def add(self, group: RequestGroup) -> None:
        """Take the group in, or note that its first deadline is earlier than before."""
        self._fresh.append(group)
        if len(self._fresh) > MOST_FRESH:
            self._take_in()

    def _take_in(self) -> None:
        heap, groups = self._heap, self._groups
        for group in self._fresh:
            if group.id in groups:
                heappush(heap, (group.first_deadline, group.id))
        self._fresh.clear()
        if len(heap) > 2 * len(groups) + 64:
            alive = {id_ for _, id_ in heap if id_ in groups}
            heap[:] = [(groups[id_].first_deadline, id_) for id_ in sorted(alive)]
            heapify(heap)

    def __len__(self) -> int:
        """Entries kept, those out of date included."""
        return len(self._heap) + len(self._fresh)

    @property
    def next_at(self) -> float:
        """No first deadline is earlier; infinity where there is no group."""
        if self._fresh:
            self._take_in()
        return self._heap[0][0] if self._heap else _NEVER

    def earliest(self) -> RequestGroup | None:
        """The group with the earliest first deadline, the oldest of equals."""
        if self._fresh:
            self._take_in()
        heap, groups = self._heap, self._groups
        while heap:
            deadline, id_ = heap[0]
            group = groups.get(id_)
            if group is None:
                heappop(heap)
            elif group.items[0].deadline > deadline:
                heapreplace(heap, (group.items[0].deadline, id_))
            else:
                return group
        return None


class Alarms:
    """One time for each name; the earliest of them is next."""

    __slots__ = ("_at", "_heap", "next_at")

    def __init__(self) -> None:
        self._at: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []
        self.next_at = _NEVER
        """The earliest of them; infinity where there is none."""

    def set(self, name: str, at: float) -> None:
        """Ask for ``name`` at that time, and at no other; infinity for never."""
        if self._at.get(name, _NEVER) == at:
            return
        heap = self._heap
        if at == _NEVER:
            del self._at[name]
        else:
            self._at[name] = at
            heappush(heap, (at, name))
            if len(heap) > 2 * len(self._at) + 64:
                heap[:] = [(at, name) for name, at in self._at.items()]
                heapify(heap)
        while heap and self._at.get(heap[0][1]) != heap[0][0]:
            heappop(heap)
        self.next_at = heap[0][0] if heap else _NEVER

    def __len__(self) -> int:
        """Entries kept, those out of date included."""
        return len(self._heap)

    def due(self, now: float) -> Iterable[str]:
        """Names whose time has come, in the order of their times. They stay until they are set anew."""
        return [name for at, name in sorted((at, name) for name, at in self._at.items() if at <= now)]
