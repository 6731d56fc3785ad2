"""What waiting costs: the work that waits and the work that a swap cuts short, in whatever order."""

from itertools import permutations

import pytest
from msgspec import structs

from qlm_sim.core.plan import GroupService, InstanceState, WaitingGroup
from qlm_sim.solver.cost import WAIT_PER_S2, queue_cost

FULL = InstanceState("i0", "k0", "a", 0.0, 0.0, 10, 0.1, {"a": 1.0, "b": 2.0}, running_s=3.0)


def group(number, requests, decode_s, model="a"):
    service = {"k0": GroupService(0.05, decode_s, decode_s, 20.0)}
    return WaitingGroup(number, model, "batch", requests, 1.0, False, 3600.0, 3600.0, service)


def test_no_order_of_a_visit_is_dearer_than_another():
    groups = [group(0, 200, 0.1), group(1, 5, 0.1), group(2, 30, 0.4)]
    through_s = sum(each.requests * (0.05 + each.service["k0"].decode_s) for each in groups)
    for order in permutations(groups):
        assert queue_cost(FULL, order) == pytest.approx(WAIT_PER_S2 * through_s**2)


def test_a_swap_costs_the_work_that_it_cuts_short():
    other = [group(0, 10, 0.1, model="b")]
    through_s = 0.1 + 2.0 + 10 * 0.05
    dearer = queue_cost(FULL, other) - queue_cost(structs.replace(FULL, running_s=0.0), other)
    assert dearer == pytest.approx(WAIT_PER_S2 * ((through_s + 3.0) ** 2 - through_s**2))


def test_crossing_over_full_instances_gains_nothing():
    """Each has the other's model to serve: to leave gives room for as much work as it cuts short."""
    full = structs.replace(FULL, running=20, running_s=20 * 0.15)
    stay = queue_cost(full, [group(0, 80, 0.1), group(1, 80, 0.1, model="b")])
    leave = queue_cost(full, [group(1, 80, 0.1, model="b"), group(0, 80, 0.1)])
    assert stay < leave
