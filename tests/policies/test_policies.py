"""What holds of every policy, in the simulated cluster."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlm_sim.cluster.simulation import simulate
from qlm_sim.core.actions import Evict, Pull, Reject, SwapModel
from qlm_sim.core.events import InstanceDown, PlanReady, RequestArrived, TimerFired
from qlm_sim.core.plan import Plan
from qlm_sim.core.types import Lso, SloClass
from qlm_sim.errors import InputError
from qlm_sim.metrics.recorder import RunRecorder
from qlm_sim.metrics.summary import summarise
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.policies import POLICIES, SchedulerSettings, make_core
from qlm_sim.solver.inline import InlineSolver
from qlm_sim.solver.search import solve
from qlm_sim.workload.workload import Workload

SLOS = (SloClass("interactive", 5.0), SloClass("batch", 600.0))


def workload(requests, rate_rps, *, models=("a",), classes=SLOS, seed=0):
    rng = np.random.default_rng(seed)
    return Workload(
        ids=[f"r{i:05}" for i in range(requests)],
        arrival_s=np.cumsum(rng.exponential(1 / rate_rps, requests)),
        prompt_tokens=rng.integers(1, 400, requests),
        output_tokens=rng.integers(1, 120, requests),
        max_tokens=np.full(requests, 4096),
        models=models,
        model_index=rng.integers(0, len(models), requests),
        slo_classes=classes,
        slo_index=rng.integers(0, len(classes), requests),
    )


def run(policy, work, instances, **settings):
    recorder = RunRecorder(instances)
    config = EngineConfig(max_num_seqs=4, scheduling_policy=POLICIES[policy].engine_scheduling or "fcfs")
    if POLICIES[policy].told:
        settings["output_tokens"] = work.output_by_id()
    core = make_core(policy, instances, SchedulerSettings(**settings))
    end = simulate(work, instances, config, core, recorder, solver=InlineSolver(solve), until_s=3e4)
    return summarise(recorder.requests(), recorder, work.slo_classes, end.ended_at)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    rate_rps=st.floats(0.05, 0.6),
    instances=st.integers(1, 3),
    slo=st.sampled_from(SLOS),
)
def test_without_contention_all_policies_serve_the_same_requests(
    make_instance, seed, rate_rps, instances, slo
):
    """One model, one class, no overload: no policy has anything to choose, and none loses a request."""
    specs = [make_instance(f"i{number}", max_num_seqs=16) for number in range(instances)]
    work = workload(40, rate_rps, classes=(slo,), seed=seed)
    for policy in POLICIES:
        summary = run(policy, work, specs)
        assert (policy, summary["finished"]) == (policy, len(work))
        assert (policy, summary["slo_attainment"]["overall"]) == (policy, 1.0)


def test_who_is_told_the_lengths_does_better(make_instance):
    """The same solver, in overload of heavy-tailed lengths: told them, it meets more deadlines."""
    instances = [make_instance("i0", kv_capacity_tokens=4_000)]
    attained = dict.fromkeys(("qlm", "clairvoyant"), 0.0)
    for seed in range(4):
        lengths = np.clip(np.random.default_rng(seed).lognormal(5, 1, 250), 1, 3000).astype(int)
        work = replace(workload(250, 3.0, seed=seed), output_tokens=lengths)
        for policy in attained:
            attained[policy] += run(policy, work, instances)["slo_attainment"]["overall"] / 4
    assert attained["clairvoyant"] > attained["qlm"]


@pytest.mark.parametrize("policy", ["qlm", "edf"])
def test_in_overload_refusing_helps_those_who_are_let_in(policy, make_instance):
    """More of the others are met, and more of them per second, than where everybody is let in."""
    instances = [make_instance("i0")]
    work = workload(400, 24.0)
    everybody, some = (run(policy, work, instances, admission=admission) for admission in (None, 0.5))
    assert everybody["refused"] == 0 < some["refused"]
    assert some["slo_attainment"]["admitted"] > everybody["slo_attainment"]["overall"] + 0.05
    assert some["goodput_rps"] > everybody["goodput_rps"]


def test_a_class_is_evicted_for_its_own_only_where_it_has_all_that_it_was_promised(make_instance):
    """Under overload of one class: whose first token is out makes room, unless it was promised more."""
    instances = [make_instance("i0")]
    work = workload(300, 12.0, classes=SLOS[:1])
    promised_more, no_more = (
        run("qlm", work, instances, first_token_only=classes)
        for classes in (frozenset(), frozenset({"interactive"}))
    )
    assert promised_more["evictions"] == 0 < no_more["evictions"]
    attained = [each["slo_attainment"]["overall"] for each in (promised_more, no_more)]
    assert attained[1] > attained[0] + 0.05


def test_who_will_be_in_time_is_not_refused(make_instance):
    summary = run("qlm", workload(100, 0.5), [make_instance("i0")], admission=0.9)
    assert summary["refused"] == 0
    assert summary["finished"] == 100


def test_the_refused_are_told_how_long_they_would_have_waited(make_instance, make_request):
    """Twenty at once for an engine that runs four: the last would wait for four rounds or so."""
    core = make_core("edf", [make_instance("i0")], SchedulerSettings(admission=0.5))
    requests = [make_request(f"r{number:02}", slo_s=2.0) for number in range(20)]
    orders = core.handle(0.0, [RequestArrived(request) for request in requests])
    refused = [order for order in orders if isinstance(order, Reject)]
    assert refused
    assert all(order.estimated_wait_s > 1.0 for order in refused)
    assert not {order.request_id for order in refused} & set(core.requests)


def test_lengths_are_not_guessed_where_they_must_be_told(make_instance):
    with pytest.raises(InputError, match="clairvoyant"):
        make_core("clairvoyant", [make_instance()], SchedulerSettings())


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("rate_rps", [0.5, 4.0])
def test_requests_are_finished_unfinished_or_rejected(policy, rate_rps, make_instance):
    models = ("a", "b", "c")
    work = workload(300, rate_rps, models=models)
    instances = [make_instance(name, models) for name in ("i0", "i1")]
    summary = run(policy, work, instances)
    assert summary["requests"] == len(work)
    assert summary["requests"] == summary["finished"] + summary["unfinished"] + summary["rejected"]


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "static"])
def test_overload_of_many_models_is_worked_off(policy, make_instance):
    """No policy may swap for ever without serving anybody."""
    models = ("a", "b", "c", "d", "e")
    work = workload(250, 5.0, models=models)
    summary = run(policy, work, [make_instance("i0", models)])
    assert summary["finished"] == len(work)


def test_static_never_swaps(make_instance):
    models = ("a", "b")
    instances = [make_instance("i0", models), make_instance("i1", models, resident="b")]
    summary = run("static", workload(100, 1.0, models=models), instances)
    assert summary["swaps"] == 0
    assert summary["finished"] == 100


@pytest.mark.parametrize("lso", list(Lso))
def test_each_operation_can_be_switched_off(lso, make_instance):
    models = ("a", "b")
    instances = [make_instance("i0", models), make_instance("i1", models, resident="b")]
    summary = run("qlm", workload(200, 4.0, models=models), instances, without=frozenset({lso}))
    assert summary["finished"] == 200
    if lso is Lso.EVICTION:
        assert summary["evictions"] == 0
    if lso is Lso.SWAPPING:
        assert summary["swaps"] == 0


def test_qlm_meets_more_deadlines_than_every_baseline_when_models_share_a_gpu(make_instance):
    models = ("a", "b", "c")
    work = workload(400, 1.6, models=models)
    instances = [make_instance("i0", models, kv_capacity_tokens=20_000, max_num_seqs=16)]
    attained = {
        name: run(name, work, instances)["slo_attainment"]["overall"]
        for name in POLICIES
        if name != "clairvoyant"
    }
    assert attained["qlm"] == max(attained.values())


def test_an_instance_stays_with_a_model_that_would_call_it_back(make_instance):
    """Two models at home on an instance each, urgent requests for both, and a file of batch work for one of
    them: swapping to and fro would cost more than it helps, and first come, first served is late."""
    rng, models = np.random.default_rng(3), ("a", "b")
    steady, batch = 360, 300
    arrival_s = np.concatenate((np.sort(rng.uniform(0, 60, steady)), np.full(batch, 10.0)))
    order = np.argsort(arrival_s, kind="stable")
    count = steady + batch
    work = Workload(
        ids=[f"r{i:05}" for i in range(count)],
        arrival_s=arrival_s[order],
        prompt_tokens=rng.integers(1, 60, count),
        output_tokens=rng.integers(1, 60, count),
        max_tokens=np.full(count, 4096),
        models=models,
        model_index=np.concatenate((rng.integers(0, 2, steady), np.zeros(batch, dtype=int)))[order],
        slo_classes=(SloClass("interactive", 2.0), SloClass("batch", 120.0)),
        slo_index=np.repeat((0, 1), (steady, batch))[order],
    )
    instances = [make_instance("i0", models, resident="a"), make_instance("i1", models, resident="b")]
    ours, theirs = (run(policy, work, instances) for policy in ("qlm", "vllm"))
    attained = [each["slo_attainment"]["by_class"]["interactive"] for each in (ours, theirs)]
    assert attained[0] > 0.95 > 0.8 > attained[1]
    assert ours["slo_attainment"]["by_class"]["batch"] == 1.0
    assert ours["swaps"] < 20
    assert ours["e2e_s"]["mean"] < 1.5 * theirs["e2e_s"]["mean"]


class VisitLog:
    """A recorder that notes how long a model had served when its batch was evicted for another one."""

    def __init__(self, core):
        self._ledgers = core.ledgers
        self._pulled = set()
        self.cut_short = []
        """(seconds served, seconds that loading took) of each model that was left with work."""
        self.swaps = self.wasted = 0
        """All swaps, and those after which nothing was served before the next one."""

    def record(self, now, events, actions):
        for action in actions:
            ledger = self._ledgers.get(getattr(action, "instance", None))
            if isinstance(action, Pull):
                self._pulled.add(action.instance)
            elif isinstance(action, Evict) and ledger.leaving_for is not None:
                self.cut_short.append((now - ledger.loaded_at, ledger.swap_s(ledger.model)))
            elif isinstance(action, SwapModel):
                self.swaps += 1
                self.wasted += ledger.loaded_at > 0 and action.instance not in self._pulled
                self._pulled.discard(action.instance)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), rate_rps=st.floats(0.5, 8.0), swap_s=st.floats(0.2, 5.0))
def test_a_model_with_work_stays_at_least_as_long_as_loading_it_took(make_instance, seed, rate_rps, swap_s):
    """So swaps never take more than half of the time, however tight the deadlines are."""
    models = ("a", "b", "c")
    instances = [make_instance(name, models, swap_in_s=swap_s) for name in ("i0", "i1")]
    core = make_core("qlm", instances, SchedulerSettings())
    log = VisitLog(core)
    work = workload(150, rate_rps, models=models, seed=seed)
    end = simulate(work, instances, EngineConfig(max_num_seqs=4), core, log, solver=InlineSolver(solve))
    assert end.unfinished == 0
    assert all(served_s >= loading_s - 1e-6 for served_s, loading_s in log.cut_short)
    assert log.wasted <= 0.1 * log.swaps


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.sampled_from(list(POLICIES)))
def test_a_run_repeats_exactly(make_instance, seed, policy):
    models = ("a", "b")
    instances = [make_instance("i0", models), make_instance("i1", models)]
    work = workload(60, 3.0, models=models, seed=seed)
    assert run(policy, work, instances) == run(policy, work, instances)


@pytest.mark.parametrize("slo_s", [1.2, 2.0, 2.5, 3.0])
def test_no_target_is_so_tight_that_its_eviction_comes_too_late(slo_s, make_instance):
    """An instance is looked at with each report, at least once a second: as much is kept in hand."""
    batch, asked = 40, 30
    work = Workload(
        ids=[f"r{i:02}" for i in range(batch + asked)],
        arrival_s=np.concatenate([np.zeros(batch), 5.123 + 3.31 * np.arange(asked)]),
        prompt_tokens=np.full(batch + asked, 100),
        output_tokens=np.repeat([2000, 5], [batch, asked]),
        max_tokens=np.full(batch + asked, 4096),
        models=("a",),
        model_index=np.zeros(batch + asked, dtype=int),
        slo_classes=(SloClass("interactive", slo_s), SloClass("batch", 36_000.0)),
        slo_index=np.repeat([1, 0], [batch, asked]),
    )
    summary = run("qlm", work, [make_instance("i0")], without=frozenset({Lso.BALANCING}))
    assert summary["evictions"] > 0
    assert summary["slo_attainment"]["by_class"]["interactive"] == 1.0


def test_plans_that_change_nothing_come_less_often(make_instance, make_request):
    """Each after twice as long as the one before, up to four intervals; after a change or where another class
    comes, one again."""
    instances = [make_instance(name, max_num_seqs=1) for name in ("i0", "i1")]
    core = make_core("qlm", instances, SchedulerSettings(replan_interval_s=1.0))
    arrivals = [RequestArrived(make_request(f"r{n}")) for n in range(4)]
    *_, replan = core.handle(0.0, arrivals)
    now, intervals = 0.0, []
    for changed in (False, False, False, True, False):
        queues = replan.problem.current
        if changed:
            queues = {"i0": queues["i1"], "i1": queues["i0"]}
        core.handle(now, [PlanReady(Plan(replan.problem.number, queues, 0.0, evaluations=0))])
        intervals.append(core.wake_at - now)
        now = core.wake_at
        (replan,) = core.handle(now, [TimerFired()])
    assert intervals == [2.0, 4.0, 4.0, 1.0, 2.0]
    core.handle(now, [PlanReady(Plan(replan.problem.number, queues, 0.0, evaluations=0))])
    assert core.wake_at == now + 4.0
    core.handle(now + 0.5, [RequestArrived(make_request("r4", slo_class="tight", slo_s=2.0, at=now + 0.5))])
    assert core.wake_at == now + 1.0


def test_a_plan_from_before_an_instance_left_is_not_put_in_force(make_instance, make_request):
    """Its groups are no more, though new ones may have their numbers."""
    served = {"i0": ("a",), "i1": ("a", "b"), "i2": ("a",)}
    core = make_core(
        "qlm", [make_instance(*each, max_num_seqs=1) for each in served.items()], SchedulerSettings()
    )
    *_, replan = core.handle(0.0, [RequestArrived(make_request(f"r{n}")) for n in range(6)])
    plan = Plan(replan.problem.number, {"i0": tuple(range(20)), "i1": ()}, 0.0, evaluations=0)
    late = [RequestArrived(make_request(f"s{n}", model="b", at=0.5)) for n in range(3)]
    core.handle(0.5, [InstanceDown("i2"), *late, PlanReady(plan)])
    assert {group.key.model for group in core.policy.order(core.ledgers["i0"], 0.5)} <= {"a"}
