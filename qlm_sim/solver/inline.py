"""Solves plans in place, for simulations: the latency is modelled, not measured.

A wall-clock limit would make a simulation depend on the machine. So the solver gets a budget of
work, and its answer is ready after the time that such work takes on one core.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from msgspec.structs import replace as replace_struct

from qlm_sim.core.plan import GroupService, InstanceState, Plan, PlanProblem, WaitingGroup

FIXED_S = 0.002
"""Modelled seconds to take a snapshot, send it to the solver's process and get the plan back."""
EVALUATION_S = 1.5e-6
"""Modelled seconds per group that is followed through a queue, as measured on one core."""
DIGITS = 9
"""Decimals of the seconds and shares that a problem is rounded to."""


class InlineSolver:
    """Runtime's solver port for simulations."""

    def __init__(self, solve: Callable[[PlanProblem], Plan]) -> None:
        self._solve = solve
        self._plan: Plan | None = None
        self.ready_at = float("inf")

    def submit(self, now: float, problem: PlanProblem) -> None:
        self._plan = self._solve(rounded(problem))
        self.ready_at = now + FIXED_S + EVALUATION_S * self._plan.evaluations

    def collect(self) -> Plan:
        plan = self._plan
        assert plan is not None, "collect() without a submitted problem"
        self._plan = None
        self.ready_at = float("inf")
        return plan


def rounded(problem: PlanProblem) -> PlanProblem:
    """The problem without the digits that the engine's leaps sum up otherwise than its single steps.

    A search that compares to the last bit would make other plans of them, and then all goes otherwise. (What
    lies within a last digit of a rounding edge still may; that is rarer by seven orders of magnitude.)
    """
    # By id: groups of one kind share their table, and the problem holds it meanwhile.
    known: dict[int, Mapping[str, GroupService]] = {}
    return replace(
        problem,
        groups=tuple([_group(group, known) for group in problem.groups]),
        instances=tuple([_instance(each) for each in problem.instances]),
    )


def _group(group: WaitingGroup, known: dict[int, Mapping[str, GroupService]]) -> WaitingGroup:
    service = known.get(id(group.service))
    if service is None:
        service = known[id(group.service)] = {
            kind: GroupService(
                round(each.prefill_s, DIGITS),
                round(each.decode_s, DIGITS),
                round(each.decode_sd_s, DIGITS),
                round(each.batch, DIGITS),
            )
            for kind, each in group.service.items()
        }
    return WaitingGroup(
        group.id,
        group.model,
        group.slo_class,
        group.requests,
        group.weight,
        group.decided,
        round(group.first_deadline_s, DIGITS),
        round(group.last_deadline_s, DIGITS),
        service,
    )


def _instance(each: InstanceState) -> InstanceState:
    return replace_struct(
        each,
        ready_s=round(each.ready_s, DIGITS),
        free=round(each.free, DIGITS),
        leave_s=round(each.leave_s, DIGITS),
        running_s=round(each.running_s, DIGITS),
    )
