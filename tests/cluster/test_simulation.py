"""The run around the engines: arrivals, timers, reports, refusals, and how it ends."""

from collections.abc import Sequence

import pytest
from cluster.lab import NEVER, Push, instance, run

from qlm_sim.cluster.simulation import SimulationEnd
from qlm_sim.core.actions import Action, Pull, Reject, Replan
from qlm_sim.core.events import Event, PlanReady, RequestArrived, TimerFired
from qlm_sim.core.plan import Plan, PlanProblem
from qlm_sim.errors import InputError
from qlm_sim.models.engine_config import EngineConfig


class Silent:
    """Does nothing, but may want to be woken."""

    def __init__(self, wake_at: float = NEVER, every_s: float = NEVER) -> None:
        self.wake_at = wake_at
        self.every_s = every_s

    def handle(self, now: float, events: Sequence[Event]) -> list[Action]:
        if any(type(event) is TimerFired for event in events):
            self.wake_at += self.every_s
        return []


def test_no_requests_end_at_once() -> None:
    assert run([], instance())[1] == SimulationEnd(ended_at=0.0, arrived=0, unfinished=0)


def test_arrivals_of_one_time_are_settled_together_in_order() -> None:
    log, _ = run([(1.0, 5, 1), (1.0, 5, 1), (1.5, 5, 1)], instance())
    assert [
        (now, [event.request.id for event in events if type(event) is RequestArrived])
        for now, events, _ in log.settles
        if any(type(event) is RequestArrived for event in events)
    ] == [(1.0, ["r0", "r1"]), (1.5, ["r2"])]


def test_arrival_and_end_of_an_iteration_at_one_time_are_settled_once() -> None:
    log, _ = run([(0.0, 5, 3), (3.0, 5, 1)], instance())
    assert [now for now, _, _ in log.settles].count(3.0) == 1


@pytest.mark.parametrize("engine", ["leap", "stepping"])
def test_run_stops_at_its_horizon_with_what_is_unfinished(engine: str) -> None:
    log, end = run([(0.0, 5, 4), (0.0, 5, 99), (50.0, 5, 1)], instance(), until_s=10.5, engine=engine)
    assert end == SimulationEnd(ended_at=10.5, arrived=2, unfinished=1)
    assert log.finishes() == {"r0": 4.0}
    at, last = log.reports()[-1]
    assert (at, last.running, last.kv_tokens, last.busy_s) == (10.5, 1, 5 + 9, 10.5)


def test_what_happens_at_the_horizon_still_counts() -> None:
    log, end = run([(0.0, 5, 4)], instance(), until_s=4.0)
    assert end.unfinished == 0
    assert log.finishes() == {"r0": 4.0}


def test_core_that_never_serves_ends_the_run_instead_of_hanging() -> None:
    assert run([(1.0, 5, 4)], instance(), core=Silent())[1] == SimulationEnd(1.0, 1, 1)


def test_core_that_does_nothing_but_wake_up_does_not_hang_either() -> None:
    _, end = run([(1.0, 5, 4)], instance(), core=Silent(wake_at=2.0, every_s=1.0))
    assert end.unfinished == 1


def test_timer_fires_when_the_core_wants_it_and_once_per_time() -> None:
    log, _ = run([(0.0, 5, 4)], instance(), core=Silent(wake_at=2.5), until_s=9.0)
    assert [now for now, _ in log.of(TimerFired)] == [2.5]
    log, _ = run([(0.0, 5, 4)], instance(), core=Silent(wake_at=2.5, every_s=2.0), until_s=9.0)
    assert [now for now, _ in log.of(TimerFired)] == [2.5, 4.5, 6.5, 8.5]
    log, _ = run([(0.0, 5, 4), (3.0, 5, 4)], instance(), core=Silent(wake_at=2.5, every_s=0.0), until_s=9.0)
    assert [now for now, _ in log.of(TimerFired)] == [2.5, 3.0], (
        "a core that forgets its timer is not asked twice"
    )


def test_rejected_requests_are_over() -> None:
    class Refuse(Push):
        def handle(self, now: float, events: Sequence[Event]) -> list[Action]:
            return [
                Reject(action.request_id, 9.0)
                if type(action) is Pull and action.request_id == "r1"
                else action
                for action in super().handle(now, events)
            ]

    one = instance()
    log, end = run([(0.0, 5, 4), (0.0, 5, 4)], one, core=Refuse([one]))
    assert end == SimulationEnd(4.0, 2, 0)
    assert log.finishes() == {"r0": 4.0}


def test_plan_comes_back_when_the_solver_is_done() -> None:
    class Solver:
        ready_at = NEVER

        def submit(self, now: float, problem: PlanProblem) -> None:
            self.ready_at = now + 0.75

        def collect(self) -> Plan:
            self.ready_at = NEVER
            return Plan(number=7, queues={}, cost=0.0, evaluations=1)

    class Planner(Push):
        def handle(self, now: float, events: Sequence[Event]) -> list[Action]:
            actions = super().handle(now, events)
            if any(type(event) is RequestArrived for event in events):
                actions.append(Replan(PlanProblem(number=7, groups=(), instances=(), current={})))
            return actions

    one = instance()
    log, _ = run([(0.5, 5, 4)], one, core=Planner([one]), solver=Solver())
    assert [(now, event.plan.number) for now, event in log.of(PlanReady)] == [(1.25, 7)]
    with pytest.raises(RuntimeError, match="no solver"):
        run([(0.5, 5, 4)], one, core=Planner([one]))


@pytest.mark.parametrize("engine", ["leap", "stepping"])
def test_reports_come_while_there_is_work_and_once_after(engine: str) -> None:
    """r0 runs from 0.25 s to 3.25 s, r1 from 20.25 s to 21.25 s. Prompts of 32 tokens in blocks of 16."""
    log, _ = run([(0.25, 32, 3), (20.25, 32, 1)], instance(kv_capacity_tokens=160), engine=engine)
    assert [
        (now, report.running, report.kv_tokens, report.kv_utilization, report.busy_s)
        for now, report in log.reports()
    ] == [
        (1.0, 1, 0, 0.2, 0.75),
        (2.0, 1, 32, 0.3, 1.75),
        (3.0, 1, 33, 0.3, 2.75),
        (4.0, 0, 0, 0.0, 3.0),
        (21.0, 1, 0, 0.2, 3.75),
        (21.25, 0, 0, 0.0, 4.0),
    ]


@pytest.mark.parametrize("engine", ["leap", "stepping"])
def test_report_at_the_end_of_an_iteration_counts_it_as_done(engine: str) -> None:
    log, _ = run([(0.0, 32, 9)], instance(kv_capacity_tokens=160), engine=engine, until_s=3.0)
    assert [(now, report.kv_tokens, report.kv_utilization) for now, report in log.reports()] == [
        (1.0, 32, 0.2),
        (2.0, 33, 0.3),
        (3.0, 34, 0.3),
    ]


@pytest.mark.parametrize("engine", ["leap", "stepping"])
def test_report_while_a_request_comes_in_counts_only_what_ran(engine: str) -> None:
    """At 3.5 s the first two have filled the KV cache; the third holds up the iteration that preempts."""
    log, _ = run(
        [(0.0, 8, 9), (0.0, 8, 9), (3.25, 8, 9)],
        instance(kv_capacity_tokens=20, intake_s=0.25),
        EngineConfig(block_size=1),
        engine=engine,
        report_interval_s=3.625,
    )
    at, report = log.reports()[0]
    assert (at, report.running, report.busy_s, report.preemptions) == (3.625, 1, 3.0, 1)


def test_progress_ends_with_all_requests_done() -> None:
    calls: list[tuple[int, int]] = []
    run([(0.0, 5, 4), (9.0, 5, 4)], instance(), progress=lambda done, of: calls.append((done, of)))
    assert calls[-1] == (2, 2)
    assert calls == sorted(calls)


def test_scheduling_policy_that_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match="scheduling_policy = 'lifo'; wanted"):
        run([], instance(), EngineConfig(scheduling_policy="lifo"))
