"""Lines in serving order, for policies that keep groups without ordering them among each other."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from heapq import merge
from typing import Any

from qlm_sim.core.groups import GroupKey, RequestGroup
from qlm_sim.core.lifecycle import Tracked

Key = Callable[[Tracked], Any]
"""Ascends inside a group."""

_UNLIMITED = 2**62


def in_order(groups: Iterable[RequestGroup], key: Key) -> list[RequestGroup]:
    """All that waits in ``groups`` by ``key``, as a line of new groups of one model each."""
    return stretches(merge(*(group.items for group in groups), key=key))


def stretches(items: Iterable[Tracked]) -> list[RequestGroup]:
    """``items``, in their order, as new groups: one for each run of requests of the same model."""
    line: list[RequestGroup] = []
    for item in items:
        request = item.request
        if not line or line[-1].key.model != request.model:
            line.append(RequestGroup(-1, GroupKey(request.model, request.slo_class, band=0), _UNLIMITED))
        line[-1].items.append(item)
        line[-1].context_tokens += item.context_tokens
    return line


def count_before(groups: Iterable[RequestGroup], item: Tracked, key: Key) -> int:
    """How many requests of ``groups`` come before ``item`` by ``key``; of equal ones, the older groups'."""
    own = key(item)
    before = 0
    for group in groups:
        if group is item.group:
            before += seat(group, item)
        elif item.group is None or group.id < item.group.id:
            before += bisect_right(group.items, own, key=key)
        else:
            before += bisect_left(group.items, own, key=key)
    return before


def seat(group: RequestGroup, item: Tracked) -> int:
    """How many requests of its group are before ``item``."""
    items = group.items
    return len(items) - 1 if items[-1] is item else items.index(item)


def count_ahead(line: Sequence[RequestGroup], item: Tracked) -> int:
    """How many requests of ``line`` are before ``item``, which is in one of its groups."""
    ahead = 0
    for group in line:
        if group is item.group:
            return ahead + seat(group, item)
        ahead += len(group)
    raise AssertionError(f"{item!r} stands in none of the groups")
