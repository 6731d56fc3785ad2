"""Groups of a model are served in the order of their deadlines, unless something is at stake."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from msgspec import structs

from qlm_sim.core.plan import GroupService, InstanceState, PlanProblem, WaitingGroup
from qlm_sim.solver.cost import plan_cost, task
from qlm_sim.solver.queues import Queue
from qlm_sim.solver.search import solve
from qlm_sim.solver.turns import AT_STAKE, DEARER, behind_its_like, in_turn

INSTANCE = InstanceState("i0", "k0", "a", 0.0, 0.0, 10, 0.1, {"a": 1.0, "b": 1.0})


def group(number, deadline_s, *, model="a", slo_class="batch", prefill_s=0.05, requests=20):
    return WaitingGroup(
        id=number,
        model=model,
        slo_class=slo_class,
        requests=requests,
        weight=1.0,
        decided=False,
        first_deadline_s=deadline_s,
        last_deadline_s=deadline_s,
        service={"k0": GroupService(prefill_s, 0.1, 0.1, 20.0)},
    )


def problem(*groups):
    return PlanProblem(1, groups, (INSTANCE,), {"i0": ()})


def turned(groups, queue):
    return in_turn(problem(*groups), {"i0": queue})["i0"]


def test_shorter_work_of_the_same_class_does_not_pass_when_all_have_time():
    groups = [group(n, 3600.0 + n, prefill_s=0.05 - 0.0005 * n) for n in range(5)]
    planned = solve(problem(*groups)).queues["i0"]
    assert planned != (0, 1, 2, 3, 4)
    assert turned(groups, planned) == (0, 1, 2, 3, 4)


def test_much_work_is_not_put_on_the_slower_instance_for_the_sake_of_order():
    slow, fast = GroupService(0.5, 1.0, 1.0, 20.0), GroupService(0.05, 0.1, 0.1, 20.0)
    groups = [group(0, 3600.0, requests=200), group(1, 3601.0, requests=5), group(2, 3602.0, model="b")]
    groups = [structs.replace(each, service={"k0": slow, "k1": fast}) for each in groups]
    instances = (INSTANCE, structs.replace(INSTANCE, id="i1", kind="k1"))
    planned = {"i0": (1,), "i1": (0, 2)}
    assert in_turn(PlanProblem(1, tuple(groups), instances, {}), planned) == planned


def test_what_is_due_first_goes_first_whatever_its_class():
    groups = [group(n, 3600.0 + n, slo_class=("batch", "bulk")[n % 2]) for n in range(4)]
    assert turned(groups, (3, 2, 1, 0)) == (0, 1, 2, 3)


def test_where_that_is_too_dear_each_class_is_in_turn():
    """The first can no longer be met, and would make the others of the first class late as well."""
    groups = [group(0, 0.5, slo_class="bulk", requests=100), group(1, 4.0), group(2, 8.0)]
    assert turned(groups, (2, 1, 0)) == (1, 2, 0)


def test_no_group_is_moved_to_another_visit():
    groups = [group(0, 3600.0), group(1, 3601.0), group(2, 3602.0, model="b"), group(3, 3603.0)]
    assert turned(groups, (3, 1, 2, 0)) == (1, 3, 2, 0)


def test_who_is_late_anyway_does_not_go_first():
    """The first can no longer be met; before the second, it would make that late as well."""
    groups = [group(0, 0.5, requests=100), group(1, 4.0)]
    assert turned(groups, (1, 0)) == (1, 0)


def test_a_new_group_goes_behind_its_like_unless_it_would_be_late_there():
    queue = [group(0, 3600.0), group(1, 3601.0, slo_class="bulk"), group(2, 3602.0, model="b"), group(3, 1.0)]
    assert behind_its_like(INSTANCE, queue, group(9, 3700.0), 0) == 1
    assert behind_its_like(INSTANCE, queue, group(9, 3700.0, slo_class="bulk"), 0) == 2
    assert behind_its_like(INSTANCE, queue, group(9, 3700.0, model="b"), 2) == 3
    doomed = [group(0, 0.5, requests=100)]
    assert behind_its_like(INSTANCE, doomed, group(9, 4.0), 0) == 0


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_and_next_to_nothing_more_is_paid(seed, random_problem):
    asked = random_problem(np.random.default_rng(seed), 12, 3, 2)
    plan = solve(asked)
    queues = in_turn(asked, plan.queues)
    assert sorted(chain(*plan.queues.values())) == sorted(chain(*queues.values()))
    groups = {each.id: each for each in asked.groups}
    stakes = []
    for planned in (plan.queues, queues):
        stakes.append(0.0)
        for index, instance in enumerate(asked.instances):
            priced = Queue(instance, index)
            priced.replace([task(groups[g], instance.kind) for g in planned[instance.id]])
            stakes[-1] += priced.at_stake()
    assert stakes[1] <= stakes[0] + AT_STAKE * len(asked.instances) + 1e-9
    assert plan_cost(asked, queues) <= plan_cost(asked, plan.queues) * (1 + DEARER) + 1e-9


def test_an_older_group_goes_first_on_whichever_instance_it_waits():
    instances = (INSTANCE, structs.replace(INSTANCE, id="i1"))
    groups = (*(group(n, 3600.0 + n) for n in range(6)), group(6, 3606.0, model="b"))
    asked = PlanProblem(1, groups, instances, {"i0": (), "i1": ()})
    assert in_turn(asked, {"i0": (0, 1, 2, 6), "i1": (3, 4, 5)}) == {"i0": (0, 2, 4, 6), "i1": (1, 3, 5)}


def test_groups_that_came_since_are_none_of_its_business():
    asked = problem(group(0, 3600.0))
    assert in_turn(asked, {"i0": (0, 7)})["i0"] == (0,)
    assert in_turn(replace(asked, groups=()), {"i0": ()})["i0"] == ()
