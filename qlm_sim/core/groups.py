"""Request groups: waiting requests that share model, SLO class and token distribution.

Inside a group the order is first come, first served, which is deadline order too. Deadlines are
absolute and never change. A group that is emptied is gone at once, from every index.
"""

from collections import deque
from typing import NamedTuple

from qlm_sim.core.lifecycle import Tracked


class GroupKey(NamedTuple):
    """What the requests of a group have in common."""

    model: str
    slo_class: str
    band: int
    """Of lengths, so that mega-prompts are apart (``ServiceEstimator.band``)."""
    served: bool = False
    """Evicted after their first token: what is left is decoding."""
    late: bool = False
    """Their deadline passed while they waited."""

    @property
    def decided(self) -> bool:
        """Whether their SLO can no longer be met or missed by what is done now."""
        return self.served or self.late


class RequestGroup:
    """A waiting group. Changed by GroupTable alone."""

    __slots__ = ("context_tokens", "decided", "id", "instance", "items", "key", "limit", "model")

    def __init__(self, group_id: int, key: GroupKey, limit: int) -> None:
        self.id = group_id
        self.key = key
        self.model = key.model
        self.decided = key.decided
        """As the key has it: asked for often, and slow to read of a named tuple."""
        self.limit = limit
        self.items: deque[Tracked] = deque()
        self.context_tokens = 0
        self.instance = ""
        """The instance on whose virtual queue it stands."""

    @property
    def head(self) -> Tracked:
        return self.items[0]

    @property
    def first_deadline(self) -> float:
        """Absolute time at which the head's next awaited token is due."""
        return self.items[0].deadline

    @property
    def last_deadline(self) -> float:
        return self.items[-1].deadline

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"RequestGroup({self.id}, {self.key}, {len(self.items)} waiting, on {self.instance!r})"


class GroupTable:
    """Every group that has something waiting. Joining a group, and leaving it in turn, are constant time."""

    def __init__(self) -> None:
        self.groups: dict[int, RequestGroup] = {}
        self._open: dict[GroupKey, RequestGroup] = {}
        self._next_id = 0

    def join(self, item: Tracked, key: GroupKey, limit: int) -> tuple[RequestGroup, bool]:
        """Put ``item`` at the end of the open group of its key; True if that group is new.

        A new group is closed once so many as ``limit`` wait in it.
        """
        group = self._open.get(key)
        new = group is None
        if group is None:
            group = self._open[key] = self._new(key, limit)
        items = group.items
        items.append(item)
        group.context_tokens += item.request.prompt_tokens + item.output_tokens
        item.group = group
        if len(items) >= group.limit:
            del self._open[key]
        return group, new

    def open_group(self, key: GroupKey) -> RequestGroup | None:
        """The group that the next request of that key would join; None if it would make a new one."""
        return self._open.get(key)

    def leave(self, item: Tracked) -> RequestGroup:
        """Take ``item`` out of its group. The group is dropped when that empties it."""
        group = item.group
        assert group is not None, f"{item!r} waits in no group"
        items = group.items
        if items[0] is item:
            items.popleft()
        else:
            items.remove(item)
        group.context_tokens -= item.request.prompt_tokens + item.output_tokens
        item.group = None
        if not items:
            self._drop(group)
        return group

    def split(self, group: RequestGroup, limit: int) -> RequestGroup:
        """Leave the first ``limit`` in ``group``. Returns a new group of the others, which is closed if
        ``group`` is, and stands on the same instance."""
        key = group.key
        rest = self._new(key, limit)
        rest.instance = group.instance
        keep = len(group.items) - limit
        moved = [group.items.pop() for _ in range(keep)]
        moved.reverse()
        for item in moved:
            item.group = rest
        rest.items.extend(moved)
        rest.context_tokens = sum(item.context_tokens for item in moved)
        group.context_tokens -= rest.context_tokens
        group.limit = limit
        if self._open.get(key) is group:
            del self._open[key]
            if keep < limit:
                self._open[key] = rest
        return rest

    def merge(self, group: RequestGroup, behind: RequestGroup) -> None:
        """Put those of ``behind``, which has the same key and is dropped, at the end of ``group``."""
        for item in behind.items:
            item.group = group
        group.items.extend(behind.items)
        group.context_tokens += behind.context_tokens
        key = group.key
        opened = self._open.get(key)
        self._drop(behind)
        if opened is behind and len(group.items) < group.limit:
            self._open[key] = group
        elif opened is group and len(group.items) >= group.limit:
            del self._open[key]

    def _new(self, key: GroupKey, limit: int) -> RequestGroup:
        group = RequestGroup(self._next_id, key, limit)
        self._next_id += 1
        self.groups[group.id] = group
        return group

    def _drop(self, group: RequestGroup) -> None:
        del self.groups[group.id]
        if self._open.get(group.key) is group:
            del self._open[group.key]
