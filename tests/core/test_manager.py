"""The core on lists alone: events in, orders out."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_sim.core.actions import Evict, Pull, Replan, SwapModel
from qlm_sim.core.events import (
    EngineReported,
    FirstToken,
    InstanceDown,
    InstanceUp,
    ModelSwapped,
    RequestArrived,
    RequestCancelled,
    RequestEvicted,
    RequestFinished,
)
from qlm_sim.core.types import Lso
from qlm_sim.policies import POLICIES, SchedulerSettings, make_core

SWAPPING = [name for name in POLICIES if name != "static"]


def core_of(instances, policy="qlm", **settings):
    told = defaultdict(lambda: 200) if POLICIES[policy].told else None
    return make_core(policy, instances, SchedulerSettings(output_tokens=told, **settings))


def orders(actions, kind):
    return [action for action in actions if type(action) is kind]


@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_request_that_fits_is_pulled_when_it_arrives(policy, make_instance, make_request):
    core = core_of([make_instance()], policy)
    actions = core.handle(0.0, [RequestArrived(make_request("r1"))])
    assert orders(actions, Pull) == [Pull("r1", 1, "i0")]


@pytest.mark.parametrize("policy", ["edf", "qlm"])
def test_no_more_is_pulled_than_fits(policy, make_instance, make_request):
    core = core_of([make_instance(max_num_seqs=2)], policy)
    actions = core.handle(0.0, [RequestArrived(make_request(f"r{i}")) for i in range(5)])
    assert orders(actions, Pull) == [Pull("r0", 1, "i0"), Pull("r1", 1, "i0")]
    core.handle(1.0, [FirstToken("r0", 1, "i0"), FirstToken("r1", 1, "i0")])
    actions = core.handle(2.0, [RequestFinished("r0", 1, "i0", 10)])
    assert orders(actions, Pull) == [Pull("r2", 1, "i0")]


def test_without_pulling_everything_goes_to_the_engine(make_instance, make_request):
    core = core_of([make_instance(max_num_seqs=2)], without=frozenset({Lso.PULLING}))
    actions = core.handle(0.0, [RequestArrived(make_request(f"r{i}")) for i in range(5)])
    assert len(orders(actions, Pull)) == 5


def test_kv_capacity_bounds_what_is_pulled(make_instance, make_request):
    core = core_of([make_instance(kv_capacity_tokens=1500, max_num_seqs=64)])
    actions = core.handle(0.0, [RequestArrived(make_request(f"r{i}", prompt=500)) for i in range(5)])
    # Two prompts fill 1000 tokens; a third and what all of them generate would not fit.
    assert len(orders(actions, Pull)) == 2


@pytest.mark.parametrize("policy", SWAPPING)
def test_an_idle_instance_swaps_to_the_model_that_waits(policy, make_instance, make_request):
    core = core_of([make_instance(models=("a", "b"))], policy)
    actions = core.handle(0.0, [RequestArrived(make_request("r1", model="b"))])
    assert orders(actions, SwapModel) == [SwapModel("i0", "b")]
    assert not orders(actions, Pull)
    actions = core.handle(1.0, [ModelSwapped("i0", "b", 1.0)])
    assert orders(actions, Pull) == [Pull("r1", 1, "i0")]


def test_a_deadline_evicts_another_models_batch(make_instance, make_request):
    core = core_of([make_instance(models=("a", "b"))])
    batch = [RequestArrived(make_request(f"a{i}", slo_class="batch", slo_s=3600)) for i in range(4)]
    core.handle(0.0, batch)
    core.handle(0.5, [FirstToken(f"a{i}", 1, "i0") for i in range(4)])
    actions = core.handle(1.0, [RequestArrived(make_request("b0", model="b", slo_s=2.0, at=1.0))])
    assert {action.request_id for action in orders(actions, Evict)} == {"a0", "a1", "a2", "a3"}
    actions = core.handle(1.1, [RequestEvicted(f"a{i}", 1, "i0", 5, True) for i in range(4)])
    assert orders(actions, SwapModel) == [SwapModel("i0", "b")]


def test_without_eviction_the_batch_runs_out_before_the_swap(make_instance, make_request):
    core = core_of([make_instance(models=("a", "b"))], without=frozenset({Lso.EVICTION}))
    core.handle(0.0, [RequestArrived(make_request("a0", slo_s=3600))])
    core.handle(0.5, [FirstToken("a0", 1, "i0")])
    actions = core.handle(1.0, [RequestArrived(make_request("b0", model="b", slo_s=2.0, at=1.0))])
    assert not orders(actions, Evict)
    actions = core.handle(9.0, [RequestFinished("a0", 1, "i0", 80)])
    assert orders(actions, SwapModel) == [SwapModel("i0", "b")]


@pytest.mark.parametrize("balancing", [True, False])
def test_without_balancing_nothing_is_planned_and_nobody_helps(balancing, make_instance, make_request):
    """Two engines of one request each, and a third request, which waits for one of them."""
    without = frozenset() if balancing else frozenset({Lso.BALANCING})
    core = core_of([make_instance(name, max_num_seqs=1) for name in ("i0", "i1")], without=without)
    orders = core.handle(0.0, [RequestArrived(make_request(f"r{number}")) for number in range(3)])
    assert any(isinstance(order, Replan) for order in orders) == balancing
    (waiting,) = (item for item in core.requests.values() if item.group is not None)
    home = waiting.group.instance
    other = next(order for order in orders if isinstance(order, Pull) and order.instance != home)
    core.handle(1.0, [FirstToken(other.request_id, 1, other.instance)])
    freed = core.handle(2.0, [RequestFinished(other.request_id, 1, other.instance, 10)])
    assert (Pull(waiting.request.id, 1, other.instance) in freed) == balancing


def test_without_swapping_the_model_stays(make_instance, make_request):
    core = core_of([make_instance(models=("a", "b"))], without=frozenset({Lso.SWAPPING}))
    assert not orders(core.handle(0.0, [RequestArrived(make_request("b0", model="b"))]), SwapModel)


def test_an_urgent_request_evicts_a_looser_class_when_the_batch_is_full(make_instance, make_request):
    core = core_of([make_instance(max_num_seqs=2)])
    core.handle(0.0, [RequestArrived(make_request(f"b{i}", slo_class="batch", slo_s=3600)) for i in range(2)])
    core.handle(0.5, [FirstToken(f"b{i}", 1, "i0") for i in range(2)])
    actions = core.handle(1.0, [RequestArrived(make_request("r", slo_s=0.5, at=1.0))])
    assert len(orders(actions, Evict)) == 1
    evicted = orders(actions, Evict)[0].request_id
    actions = core.handle(1.1, [RequestEvicted(evicted, 1, "i0", 5, True)])
    assert orders(actions, Pull)[0] == Pull("r", 1, "i0")
    core.handle(1.2, [FirstToken("r", 1, "i0")])
    actions = core.handle(2.0, [RequestFinished("r", 1, "i0", 3)])
    assert orders(actions, Pull) == [Pull(evicted, 2, "i0")]


def test_requests_of_a_lost_instance_run_elsewhere(make_instance, make_request):
    core = core_of([make_instance("i0"), make_instance("i1")])
    actions = core.handle(0.0, [RequestArrived(make_request("r1"))])
    home = orders(actions, Pull)[0].instance
    other = {"i0": "i1", "i1": "i0"}[home]
    actions = core.handle(1.0, [InstanceDown(home)])
    assert orders(actions, Pull) == [Pull("r1", 2, other)]
    assert core.handle(2.0, [RequestFinished("r1", 1, home, 9)]) == []
    assert core.stale_events == 1
    core.handle(3.0, [RequestFinished("r1", 2, other, 9)])
    assert not core.requests


def test_a_cancelled_request_is_not_resumed_when_its_instance_is_lost(make_instance, make_request):
    core = core_of([make_instance("i0"), make_instance("i1")])
    actions = core.handle(0.0, [RequestArrived(make_request("r1"))])
    core.handle(1.0, [RequestCancelled("r1")])
    assert core.handle(2.0, [InstanceDown(orders(actions, Pull)[0].instance)]) == []
    assert not core.requests


def test_a_cancelled_request_leaves_wherever_it_is(make_instance, make_request):
    core = core_of([make_instance(max_num_seqs=1)])
    core.handle(0.0, [RequestArrived(make_request("r1")), RequestArrived(make_request("r2"))])
    assert core.handle(1.0, [RequestCancelled("r2")]) == []
    assert core.handle(1.0, [RequestCancelled("r1")]) == [Evict("r1", 1, "i0", keep_kv=False)]
    core.handle(1.1, [RequestEvicted("r1", 1, "i0", 0, False)])
    assert not core.requests


def test_an_overdue_request_lets_one_pass_that_can_still_be_met(make_instance, make_request):
    core = core_of([make_instance(max_num_seqs=1)])
    core.handle(0.0, [RequestArrived(make_request("busy"))])
    core.handle(0.1, [FirstToken("busy", 1, "i0")])
    core.handle(0.2, [RequestArrived(make_request("old", slo_s=5, at=0.2))])
    core.handle(6.0, [RequestArrived(make_request("new", slo_s=5, at=6.0))])
    actions = core.handle(7.0, [RequestFinished("busy", 1, "i0", 50)])
    assert orders(actions, Pull) == [Pull("new", 1, "i0")]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 5),
            st.sampled_from("ab"),
            st.sampled_from([2.0, 60.0, 3600.0]),
            st.integers(1, 3000),
        ),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from(SWAPPING),
    st.randoms(use_true_random=False),
)
def test_every_request_is_served_exactly_once(arrivals, policy, chance):
    """A law: whatever the order of an engine's answers, nothing is lost and nothing runs twice."""
    make_instance = _plain_instance
    core = core_of([make_instance("i0"), make_instance("i1")], policy)
    pending = [(at, index, model, slo, prompt) for index, (at, model, slo, prompt) in enumerate(arrivals)]
    pending.sort()
    running: dict[str, tuple[int, str, bool]] = {}
    finished: list[str] = []
    swaps: dict[str, str] = {}
    now = 0.0
    events: list[object] = []
    for _ in range(4000):
        if pending and (chance.random() < 0.5 or not (running or swaps or events)):
            at, index, model, slo, prompt = pending.pop(0)
            now = max(now, at)
            events.append(RequestArrived(_plain_request(f"r{index}", model, slo, now, prompt)))
        elif swaps and chance.random() < 0.5:
            name = chance.choice(sorted(swaps))
            events.append(ModelSwapped(name, swaps.pop(name), 1.0))
        elif running and not events:
            name = chance.choice(sorted(running))
            attempt, instance, decoding = running[name]
            if not decoding:
                running[name] = (attempt, instance, True)
                events.append(FirstToken(name, attempt, instance))
            else:
                del running[name]
                finished.append(name)
                events.append(RequestFinished(name, attempt, instance, chance.randint(1, 400)))
        now += 0.01
        if core.wake_at <= now and not events:
            now += 0.5
        actions = core.handle(now, events)
        events = []
        for action in actions:
            if type(action) is Pull:
                assert action.request_id not in running
                assert action.request_id not in finished
                running[action.request_id] = (action.attempt, action.instance, False)
            elif type(action) is Evict:
                attempt, instance, _ = running.pop(action.request_id)
                assert (attempt, instance) == (action.attempt, action.instance)
                events.append(RequestEvicted(action.request_id, attempt, instance, 1, action.keep_kv))
            elif type(action) is SwapModel:
                assert not any(instance == action.instance for _, instance, _ in running.values())
                swaps[action.instance] = action.model
        if not (pending or running or swaps or events) and len(finished) == len(arrivals):
            break
    assert sorted(finished) == sorted(f"r{i}" for i in range(len(arrivals)))
    assert not core.requests


def _plain_instance(name):
    from dataclasses import dataclass

    from qlm_sim.core.types import InstanceSpec, ModelOnInstance

    @dataclass(frozen=True)
    class Step:
        seq_s: float = 0.0
        kv_token_s: float = 1e-8
        prefill_pair_s: float = 1e-9

        def base_s(self, tokens: int) -> float:
            return 0.01 + 1e-4 * tokens

    profile = ModelOnInstance(Step(), 10_000, 4, 2048, 8192, 10**9, 10**5, 1.0, 10.0, 1e-6)
    return InstanceSpec(name, {"a": profile, "b": profile}, "a", 10**11, ("a", "b"))


def _plain_request(name, model, slo_s, at, prompt):
    from qlm_sim.core.types import Request

    return Request(name, model, f"slo{slo_s:g}", slo_s, at, prompt, 4096)


def test_work_for_a_model_that_nobody_serves_now_waits_for_an_instance(make_instance, make_request):
    core = core_of([make_instance("i0")])
    core.handle(0.0, [RequestArrived(make_request("r1"))])
    core.handle(0.1, [FirstToken("r1", 1, "i0")])
    assert core.handle(1.0, [InstanceDown("i0")]) == []
    assert core.handle(2.0, [RequestArrived(make_request(f"r{i}", at=2.0)) for i in (2, 3)]) == []
    core.handle(2.5, [RequestCancelled("r2")])
    pulls = orders(core.handle(3.0, [InstanceUp(make_instance("i1"))]), Pull)
    assert {(pull.request_id, pull.instance) for pull in pulls} == {("r1", "i1"), ("r3", "i1")}


def test_what_an_engine_still_says_when_it_is_gone_is_dropped(make_instance, make_request):
    core = core_of([make_instance("i0"), make_instance("i1")])
    report = EngineReported("i0", 0, 0, 0, 0.0, 0.0, 0)
    assert core.handle(1.0, [InstanceDown("i0"), ModelSwapped("i0", "a", 1.0), report]) == []
    assert core.stale_events == 2


def test_a_measured_swap_counts_more_than_the_profile(make_instance):
    core = core_of([make_instance(models=("a", "b"), swap_in_s=1.0)])
    ledger = core.ledgers["i0"]
    core.handle(1.0, [ModelSwapped("i0", "b", 5.0)])
    assert (ledger.swap_s("b"), ledger.swap_s("a")) == (5.0, 1.0)
    core.handle(9.0, [ModelSwapped("i0", "b", 3.0)])
    assert 3.0 < ledger.swap_s("b") < 5.0


def test_what_was_pulled_after_a_swap_is_not_swapped_away_before_its_first_token(make_instance, make_request):
    core = core_of([make_instance(models=("a", "b"), max_num_seqs=4, swap_in_s=0.05)])
    batch = [RequestArrived(make_request(f"a{i}", slo_class="batch", slo_s=3600)) for i in range(3)]
    core.handle(0.0, batch)
    core.handle(0.1, [FirstToken(f"a{i}", 1, "i0") for i in range(3)])
    core.handle(0.2, [RequestArrived(make_request("b0", model="b", slo_s=0.5, at=0.2))])
    core.handle(0.3, [RequestEvicted(f"a{i}", 1, "i0", 5, False) for i in range(3)])
    actions = core.handle(0.4, [ModelSwapped("i0", "b", 0.05)])
    assert orders(actions, Pull) == [Pull("b0", 1, "i0")]
    assert not orders(actions, Evict)
