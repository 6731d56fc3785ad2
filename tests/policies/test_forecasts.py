"""What requests are told of their wait under every policy: positions, laws, that asking changes nothing."""

import pytest

from qlm_sim.core.events import FirstToken, RequestArrived, RequestFinished
from qlm_sim.policies import POLICIES, SchedulerSettings, make_core

every_policy = pytest.mark.parametrize("policy", list(POLICIES))


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


@every_policy
def test_asking_changes_no_decision(policy, make_instance, make_request):
    def run(ask):
        instances = [make_instance("i0", ("a", "b")), make_instance("i1", ("a", "b"), resident="b")]
        core = make_core(policy, instances, SchedulerSettings(forecasts=True))
        actions = []
        for i in range(60):
            now = 0.05 * i
            request = make_request(f"r{i:02}", model="ab"[i % 2], at=now, slo_s=5.0 + 10 * (i % 3))
            if ask:
                core.forecast_new(request, now)
            actions += core.handle(now, [RequestArrived(request)])
            if ask:
                core.forecast(request.id, now)
        running = [item for ledger in core.ledgers.values() for item in ledger.running.values()]
        for item in running:
            actions += core.handle(4.0, [RequestFinished(item.request.id, 1, item.instance, 9)])
        return actions

    assert run(ask=True) == run(ask=False)


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
