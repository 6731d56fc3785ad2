"""What requests are told of their wait under every policy: positions, laws, that asking changes nothing."""

import numpy as np
import pytest
from msgspec import structs

from qlm_sim.cluster.simulation import simulate
from qlm_sim.core.events import FirstToken, RequestArrived, RequestFinished
from qlm_sim.core.types import SloClass
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.policies import POLICIES, SchedulerSettings, make_core
from qlm_sim.solver.inline import InlineSolver
from qlm_sim.solver.search import solve
from qlm_sim.workload.workload import Workload

every_policy = pytest.mark.parametrize("policy", [name for name, each in POLICIES.items() if not each.told])


def core_of(policy, instances, requests, now=0.0):
    core = make_core(policy, instances, SchedulerSettings(forecasts=True))
    core.handle(now, [RequestArrived(request) for request in requests])
    return core


def start_all(core, now):
    running = [(item, ledger.id) for ledger in core.ledgers.values() for item in ledger.running.values()]
    core.handle(now, [FirstToken(item.request.id, item.attempt, name) for item, name in running])


@every_policy
def test_positions_count_up_in_the_order_of_arrival_of_like_requests(policy, make_instance, make_request):
    requests = [make_request(f"r{i:02}", at=0.01 * i) for i in range(20)]
    core = core_of(policy, [make_instance()], requests, 1.0)
    start_all(core, 2.0)
    told = [core.forecast(request.id, 2.0) for request in requests]
    waiting = [forecast for forecast in told if forecast is not None]
    assert [forecast.position for forecast in waiting] == list(range(len(waiting)))
    assert len(waiting) == (0 if policy in ("vllm", "priority") else 16)
    means = [forecast.mean_s for forecast in waiting]
    assert means == sorted(means)


@every_policy
def test_on_the_engine_without_a_first_token_it_still_waits(policy, make_instance, make_request):
    core = core_of(policy, [make_instance()], [make_request("r0"), make_request("r1")])
    assert [core.forecast(name, 0.0).position for name in ("r0", "r1")] == [0, 1]
    start_all(core, 0.1)
    assert core.forecast("r0", 0.1) is None


@every_policy
def test_nobody_is_told_of_requests_that_are_gone(policy, make_instance, make_request):
    core = core_of(policy, [make_instance()], [make_request("r0")])
    core.handle(1.0, [FirstToken("r0", 1, "i0")])
    core.handle(2.0, [RequestFinished("r0", 1, "i0", 10)])
    assert core.forecast("r0", 2.0) is None
    assert core.forecast("unheard of", 2.0) is None


@every_policy
def test_an_empty_engine_promises_the_prefill(policy, make_instance, make_request):
    core = core_of(policy, [make_instance()], [])
    request = make_request("r0", prompt=1000)
    told = core.forecast_new(request, 0.0)
    assert told.position == 0
    # 10 ms an iteration, 0.1 ms a token, 0.5 ms for the pairs.
    assert told.mean_s == pytest.approx(0.01 + 0.1 + 0.0005, rel=0.01)
    assert told.p_slo_met > 0.999


@every_policy
def test_a_new_request_is_told_what_it_is_told_once_it_has_come(policy, make_instance, make_request):
    core = core_of(policy, [make_instance()], [make_request(f"r{i:02}") for i in range(30)])
    start_all(core, 1.0)
    request = make_request("new", at=2.0)
    before = core.forecast_new(request, 2.0)
    core.handle(2.0, [RequestArrived(request)])
    after = core.forecast("new", 2.0)
    assert before.position == after.position
    assert before.mean_s == pytest.approx(after.mean_s, rel=0.1)
    assert after.p_slo_met == pytest.approx(before.p_slo_met, abs=0.1)


class Asking:
    """A recorder of all orders, which asks for waits in between."""

    def __init__(self, core, strangers):
        self.core = core
        self.strangers = strangers
        self.actions = []

    def record(self, now, events, actions):
        self.actions.append((now, tuple(map(str, actions))))
        for stranger in self.strangers:
            self.core.forecast_new(structs.replace(stranger, arrived_at=now), now)
        if self.strangers:
            for name in list(self.core.requests)[::5]:
                self.core.forecast(name, now)


@every_policy
def test_asking_changes_no_decision(policy, make_instance, make_request):
    rng = np.random.default_rng(5)
    count = 200
    work = Workload(
        ids=[f"r{i:03}" for i in range(count)],
        arrival_s=np.cumsum(rng.exponential(0.15, count)),
        prompt_tokens=rng.integers(1, 400, count),
        output_tokens=rng.integers(1, 120, count),
        max_tokens=np.full(count, 4096),
        models=("a", "b"),
        model_index=rng.integers(0, 2, count),
        slo_classes=(SloClass("tight", 5.0), SloClass("loose", 60.0)),
        slo_index=rng.integers(0, 2, count),
    )

    def run(strangers):
        instances = [make_instance("i0", ("a", "b")), make_instance("i1", ("a", "b"), resident="b")]
        core = make_core(policy, instances, SchedulerSettings(forecasts=True))
        asking = Asking(core, strangers)
        config = EngineConfig(max_num_seqs=4)
        simulate(work, instances, config, core, asking, solver=InlineSolver(solve), until_s=300.0)
        return asking.actions

    strangers = [make_request(f"s{m}", model=m, slo_class=c) for m in "ab" for c in ("tight", "loose")]
    assert run(strangers) == run([])


@pytest.mark.parametrize("policy", ["edf", "collate", "flow-control", "shepherd", "edf-batched", "static"])
def test_a_line_shared_by_two_instances_is_twice_as_fast(policy, make_instance, make_request):
    requests = [make_request(f"r{i:03}") for i in range(208)]

    def last(instances):
        core = core_of(policy, instances, requests)
        start_all(core, 0.1)
        return core.forecast(requests[-1].id, 0.1)

    one = last([make_instance("i0")])
    two = last([make_instance("i0"), make_instance("i1")])
    assert (one.position, two.position) == (203, 199)
    assert two.mean_s == pytest.approx(one.mean_s / 2, rel=0.05)
    assert two.quantile(0.9) - two.median_s < one.quantile(0.9) - one.median_s


def test_what_no_instance_serves_is_never_served(make_instance, make_request):
    core = core_of("static", [make_instance(models=("a", "b"))], [])
    told = core.forecast_new(make_request("r0", model="b"), 0.0)
    assert told.mean_s == float("inf")
    assert told.p_slo_met == 0.0


@pytest.mark.parametrize("policy", ["qlm", "edf", "collate", "shepherd", "vllm"])
def test_another_model_is_told_to_wait_for_the_swap(policy, make_instance, make_request):
    core = core_of(policy, [make_instance(models=("a", "b"), swap_in_s=5.0)], [])
    assert core.forecast_new(make_request("r0", model="b"), 0.0).mean_s > 5.0
    assert core.forecast_new(make_request("r0", model="a"), 0.0).mean_s < 1.0
