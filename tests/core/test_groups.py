"""Request groups: nothing is lost or doubled by joining, leaving, splitting and merging."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_sim.core.deadlines import Alarms, DeadlineIndex
from qlm_sim.core.groups import GroupKey, GroupTable
from qlm_sim.core.lifecycle import Tracked
from qlm_sim.core.types import Request

KEY = GroupKey("m", "interactive", 0)


def waiting(number: int, at: float = 0.0, slo_class: str = "interactive") -> Tracked:
    return Tracked(Request(f"r{number}", "m", slo_class, 20.0, at, 100 + number, 4096))


def joined(table: GroupTable, count: int, limit: int) -> list[Tracked]:
    items = [waiting(number, float(number)) for number in range(count)]
    for item in items:
        table.join(item, KEY, limit)
    return items


def ids(group):
    return [item.request.id for item in group.items]


def test_a_group_that_is_full_is_closed() -> None:
    table = GroupTable()
    joined(table, 5, limit=2)
    assert [len(group) for group in table.groups.values()] == [2, 2, 1]


def test_split_keeps_the_order_and_the_open_end() -> None:
    table = GroupTable()
    joined(table, 10, limit=100)
    (group,) = table.groups.values()
    rest = table.split(group, 4)
    assert ids(group) == ["r0", "r1", "r2", "r3"]
    assert ids(rest) == [f"r{n}" for n in range(4, 10)]
    assert group.last_deadline <= rest.first_deadline
    late, new = table.join(waiting(10, 10.0), KEY, 100)
    assert new, "six of at most four: closed"
    assert late is not group


def test_merge_puts_the_later_behind_and_stays_open() -> None:
    table = GroupTable()
    joined(table, 5, limit=3)
    first, second = table.groups.values()
    table.leave(first.head)
    table.merge(first, second)
    assert ids(first) == ["r1", "r2", "r3", "r4"]
    assert list(table.groups) == [first.id]
    _, new = table.join(waiting(9), KEY, 3)
    assert new, "the merged group is above its limit: closed"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_waiting_request_is_in_exactly_one_group(data) -> None:
    table = GroupTable()
    index = DeadlineIndex(table.groups)
    alive: dict[str, Tracked] = {}
    for number in range(data.draw(st.integers(1, 60))):
        step = data.draw(st.sampled_from(["join", "join", "leave", "split", "merge"]))
        groups = list(table.groups.values())
        if step == "join":
            slo_class = data.draw(st.sampled_from(["a", "b"]))
            item = waiting(number, float(number), slo_class)
            group, new = table.join(item, GroupKey("m", slo_class, 0), data.draw(st.integers(1, 6)))
            alive[item.request.id] = item
            if new:
                index.add(group)
        elif step == "leave" and groups:
            item = data.draw(st.sampled_from(sorted(alive.values(), key=lambda i: i.request.id)))
            table.leave(item)
            del alive[item.request.id]
        elif step == "split" and groups:
            group = data.draw(st.sampled_from(groups))
            if len(group) > 1:
                index.add(table.split(group, data.draw(st.integers(1, len(group) - 1))))
        elif step == "merge" and groups:
            group = data.draw(st.sampled_from(groups))
            later = [g for g in groups if g.key == group.key and g.first_deadline > group.last_deadline]
            if later:
                table.merge(group, data.draw(st.sampled_from(later)))
        for group in table.groups.values():
            assert len(group) > 0
            assert all(item.group is group for item in group.items)
            assert group.context_tokens == sum(item.context_tokens for item in group.items)
        stand = sorted(name for group in table.groups.values() for name in ids(group))
        assert stand == sorted(alive)
        earliest = index.earliest()
        assert (earliest is None) == (not table.groups)
        if earliest is not None:
            assert earliest.first_deadline == min(g.first_deadline for g in table.groups.values())


def test_index_forgets_groups_that_are_gone() -> None:
    table = GroupTable()
    index = DeadlineIndex(table.groups)
    for number in range(1000):
        item = waiting(number, at=float(-number))
        group, _ = table.join(item, KEY, 1)
        index.add(group)
        table.leave(item)
    assert index.earliest() is None
    assert len(index) < 200


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([1.0, 2.0, 3.0, float("inf")]))))
def test_the_next_alarm_is_the_earliest_that_is_set(settings_made) -> None:
    alarms, expected = Alarms(), {}
    for name, at in settings_made:
        alarms.set(name, at)
        expected[name] = at
        assert alarms.next_at == min(expected.values())
        assert sorted(alarms.due(2.0)) == sorted(n for n, t in expected.items() if t <= 2.0)


def test_an_alarm_that_is_set_often_takes_no_room() -> None:
    alarms = Alarms()
    for number in range(10_000):
        alarms.set("a", 1e9 - number)
    assert alarms.next_at == pytest.approx(1e9 - 9_999)
    assert len(alarms) < 200
