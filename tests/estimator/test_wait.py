"""Waiting times: laws of the distribution, limits that have closed forms, and a plain Monte Carlo."""

import math

import numpy as np
import pytest

from qlm_sim.core.groups import GroupKey, GroupTable
from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lifecycle import State, Tracked
from qlm_sim.core.policy import Standing
from qlm_sim.estimator.intake import FULLNESS_SPREAD, SPEED_SPREAD, Bound
from qlm_sim.estimator.lengths import LengthKind
from qlm_sim.estimator.service import ServiceEstimator
from qlm_sim.estimator.steps import decode_step_s, prefill_s
from qlm_sim.estimator.wait import WaitEstimator
from qlm_sim.policies.lines import count_ahead, stretches

MEAN = 200


@pytest.fixture(scope="module")
def lengths_learnt():
    """2,000 geometric lengths, as requests of prompt 100 in the class "interactive" had them."""
    service = ServiceEstimator()
    kind = LengthKind("a", "interactive", 7, 0)

    class Running:
        def tokens(self):
            return 1.0

    for tokens in np.random.default_rng(0).geometric(1 / MEAN, size=2000).tolist():
        service.lengths.began("r", kind, Running())
        service.lengths.ended("r", kind, tokens, finished=True)
    return service.lengths


class Scene:
    """One instance with a running batch and a queue, all requests alike."""

    def __init__(
        self, spec, make_request, lengths, *, running, waiting, sent=0, models=("a",), prompts=(100,)
    ):
        self.ledger = InstanceLedger(spec)
        self.service = ServiceEstimator()
        self.service.lengths = lengths
        for i in range(running + sent):
            item = Tracked(make_request(f"run{i}-{id(self)}"))
            item.state, item.instance = State.RUNNING, spec.id
            self.ledger.pulled(item, 0.0)
            if i < running:
                self.service.first_token(self.ledger, item, 0.0)
                self.ledger.began_decoding(item, 0.0)
        table = self.table = GroupTable()
        self.items = [
            Tracked(
                make_request(
                    f"q{i}", model=models[i * len(models) // waiting], prompt=prompts[i % len(prompts)]
                )
            )
            for i in range(waiting)
        ]
        for item in self.items:
            table.join(item, GroupKey(item.request.model, "interactive", 0), 64)
        self.groups = list(table.groups.values())
        self.estimator = WaitEstimator(self.service)

    def line(self, now=0.0):
        return self.estimator.line(self.ledger, self.groups, now)

    def waits(self, now=0.0):
        line = self.line(now)
        return [line.wait(item.request.model, i, 100, now) for i, item in enumerate(self.items)]

    def forecast(self, item, now=0.0):
        standing = None
        if item.state is State.WAITING:
            standing = Standing((self.ledger.id,), count_ahead(self.groups, item))
        return self.estimator.forecast(
            item, standing, {self.ledger.id: self.ledger}, lambda ledger, now: self.groups, now
        )

    def clear(self):
        """The batch must leave no trace in the lengths that the tests share."""
        for item in list(self.ledger.running.values()):
            self.service.left(self.ledger, item, 0.0, None)


@pytest.fixture
def make_scene(make_instance, make_request, lengths_learnt):
    scenes = []

    def make(*, models=("a",), running, waiting, sent=0, prompts=(100,), **instance):
        spec = make_instance(models=tuple(dict.fromkeys(("a", *models))), **instance)
        line = {"running": running, "waiting": waiting, "sent": sent, "models": models, "prompts": prompts}
        scenes.append(Scene(spec, make_request, lengths_learnt, **line))
        return scenes[-1]

    yield make
    for scene in scenes:
        scene.clear()


def full_batch(make_scene, waiting=200, **more):
    return make_scene(running=16, waiting=waiting, kv_capacity_tokens=10**6, max_num_seqs=16, **more)


def test_an_idle_engine_starts_at_once(make_scene):
    scene = make_scene(running=0, waiting=1)
    (wait,) = scene.waits()
    assert wait.mean_s == pytest.approx(prefill_s(scene.ledger.profile, 100), rel=0.01)


def test_with_room_only_prefills_ahead_count(make_scene):
    """Eight requests in a free engine share one iteration; the paper's Σ O / Θ would say minutes."""
    scene = make_scene(running=4, waiting=8, kv_capacity_tokens=10**6, max_num_seqs=64)
    profile = scene.ledger.profile
    step_s = decode_step_s(profile, 4, 4 * 101)
    for wait in scene.waits():
        assert wait.mean_s == pytest.approx(0.5 * step_s + step_s + prefill_s(profile, 800, 4), rel=0.1)


def test_waits_grow_along_the_queue(make_scene):
    means = [wait.mean_s for wait in full_batch(make_scene).waits()]
    assert means == sorted(means)
    assert means[0] > 0


def test_quantiles_are_ordered_and_invert_the_probability(make_scene):
    for wait in full_batch(make_scene).waits()[::20]:
        quantiles = [wait.quantile(p) for p in (0.05, 0.25, 0.5, 0.75, 0.9, 0.99)]
        assert quantiles == sorted(quantiles)
        for p in (0.25, 0.5, 0.9):
            assert wait.within(wait.quantile(p)) == pytest.approx(p, abs=0.01)
        assert wait.within(1e9) == pytest.approx(1.0)
        assert wait.quantile(0.25) < wait.mean_s < wait.quantile(0.9)


def test_a_long_queue_waits_as_the_paper_says(make_scene):
    """Far back W grows by E[O] / Θ per request, and its spread like the square root (CLT)."""
    scene = full_batch(make_scene, waiting=2000)
    waits = scene.waits()
    profile = scene.ledger.profile
    step_s = decode_step_s(profile, 16, 16 * (100 + MEAN))
    per_request_s = MEAN * step_s / 16 + prefill_s(profile, 100, 16)
    slope = (waits[1999].mean_s - waits[999].mean_s) / 1000
    assert slope == pytest.approx(per_request_s, rel=0.03)
    spread = [waits[i].quantile(0.84) - waits[i].quantile(0.5) for i in (99, 399)]
    assert 2 < spread[1] / spread[0] < 3
    # 2,000 lengths, how full the engine is and its speed leave the mean itself uncertain.
    decoding = MEAN * step_s / 16 / per_request_s
    known = math.hypot(1 / math.sqrt(2016), FULLNESS_SPREAD[Bound.SLOTS])
    random_s = math.sqrt(400) * decoding * per_request_s
    unknown_s = 400 * math.hypot(decoding * known, SPEED_SPREAD) * per_request_s
    assert spread[1] == pytest.approx(math.hypot(random_s, unknown_s), rel=0.15)


def test_a_few_long_prompts_count_in_full(make_scene):
    """Far back the wait grows by the mean of all prompts, however few of them bring most of the tokens."""
    prompts = (*[20] * 31, 8_000)
    scene = full_batch(make_scene, waiting=512, prompts=prompts)
    waits, profile = scene.waits(), scene.ledger.profile
    slope = (waits[511].mean_s - waits[255].mean_s) / 256
    decode_s = MEAN * decode_step_s(profile, 16, 16 * (270 + MEAN)) / 16
    assert slope == pytest.approx(decode_s + np.mean([prefill_s(profile, p, 16) for p in prompts]), rel=0.02)


def test_a_full_batch_of_slots_agrees_with_monte_carlo(make_scene):
    """Geometric lengths in 16 slots, drawn and refilled one by one, against the closed calculation."""
    scene = full_batch(make_scene, waiting=64)
    rng = np.random.default_rng(3)
    profile = scene.ledger.profile
    step_s = decode_step_s(profile, 16, 16 * (100 + MEAN / 2))
    drawn = []
    for _ in range(800):
        ends = np.sort(rng.geometric(1 / MEAN, size=16)).astype(float)
        starts = []
        for _ in range(64):
            starts.append(ends[0])
            ends[0] += rng.geometric(1 / MEAN)
            ends.sort()
        drawn.append(starts)
    added_s = prefill_s(profile, 100, 16)
    for i, wait in list(enumerate(scene.waits()))[3::20]:
        # The iteration under way is half over; the prefill is part of one more.
        seconds = (np.array(drawn)[:, i] + 0.5) * step_s + (i + 1) * added_s
        assert wait.mean_s == pytest.approx(seconds.mean(), rel=0.06)
        assert wait.quantile(0.9) == pytest.approx(np.quantile(seconds, 0.9), rel=0.1)


def test_memory_limits_the_intake_where_slots_do_not(make_scene):
    """With room for a quarter of the slots the queue moves about a quarter as fast."""
    kv_tokens = 16 * 320
    slots = full_batch(make_scene).waits()
    memory = make_scene(running=12, waiting=200, kv_capacity_tokens=kv_tokens, max_num_seqs=256).waits()
    assert memory[150].mean_s > slots[150].mean_s
    few = make_scene(running=4, waiting=200, kv_capacity_tokens=kv_tokens // 2, max_num_seqs=256).waits()
    assert few[150].mean_s > 1.5 * memory[150].mean_s


def test_what_has_run_long_is_known_to_leave_by_its_cap(make_scene, make_request):
    scene = full_batch(make_scene, waiting=8)
    fresh = scene.waits()[4].mean_s
    later = scene.waits(now=5.0)[4].mean_s
    # Geometric lengths have no memory: five seconds on, the batch is as good as new.
    assert later == pytest.approx(fresh, rel=0.1)


def test_a_forecast_ages_by_the_time_that_passed(make_scene):
    """A request that nobody overtakes waits one second less when one second has passed."""
    scene = full_batch(make_scene)
    line = scene.line()
    first = line.wait("a", 150, 100, 0.0)
    admitted = round(line.admitted(2.0))
    assert line.wait("a", 150 - admitted, 100, 2.0).mean_s == pytest.approx(first.mean_s - 2.0, abs=0.2)


def test_requests_on_the_engine_come_before_the_queue(make_scene):
    scene = make_scene(running=2, sent=3, waiting=1, kv_capacity_tokens=10**6, max_num_seqs=64)
    last = scene.forecast(scene.items[0])
    sent = [scene.forecast(item) for item in list(scene.ledger.running.values())[2:]]
    assert [forecast.position for forecast in (*sent, last)] == [0, 1, 2, 3]
    means = [forecast.mean_s for forecast in (*sent, last)]
    assert means == sorted(means)


def test_a_prompt_under_way_is_waited_for_no_longer_than_it_takes(make_scene, make_request):
    """Ten chunks of prompt were sent 0.5 s ago: what is left of them is told, not all of them."""
    scene = make_scene(running=2, waiting=1, kv_capacity_tokens=10**6, max_num_seqs=64)
    profile = scene.ledger.profile
    item = Tracked(make_request("long", prompt=10 * profile.max_num_batched_tokens))
    item.state, item.instance = State.RUNNING, scene.ledger.id
    scene.ledger.pulled(item, 1.0)
    # Each of the iterations decodes as well.
    full_s = prefill_s(profile, item.context_tokens, 2) + 10.5 * decode_step_s(profile, 2, 202)
    assert scene.forecast(item, 1.0).mean_s == pytest.approx(full_s, rel=0.02)
    assert scene.forecast(item, 1.5).mean_s == pytest.approx(full_s - 0.5, rel=0.02)
    # Others that leave meanwhile do not begin it anew.
    scene.service.left(scene.ledger, next(iter(scene.ledger.running.values())), 1.9, None)
    assert scene.forecast(item, 2.0).mean_s == pytest.approx(full_s - 1.0, rel=0.02)


def test_what_each_request_holds_the_engine_up_is_waited_for(make_scene):
    waits, held_up = (
        full_batch(make_scene, waiting=512, intake_s=intake_s).waits() for intake_s in (0.0, 0.05)
    )
    for ahead in (0, 63, 511):
        longer_s = held_up[ahead].mean_s - waits[ahead].mean_s
        assert longer_s == pytest.approx(0.05 * (ahead + 1), rel=0.05)


def test_who_is_on_the_engine_has_held_it_up_already(make_scene):
    """All but those who came since its last iteration began, who hold up the next one."""
    scenes = [full_batch(make_scene, waiting=1, sent=99, intake_s=intake_s) for intake_s in (0.0, 0.05)]
    for now, holding in ((0.0, 99), (1.0, 0)):
        first, held_up = (scene.line(now).wait("a", 1, 100, now).mean_s for scene in scenes)
        assert held_up - first == pytest.approx(0.05 * holding, abs=1e-9)
        last, held_up = (scene.line(now).wait("a", 99, 100, now).mean_s for scene in scenes)
        assert held_up - last == pytest.approx(0.05 * (holding + 1), abs=0.01)


def test_where_engines_go_by_deadline_so_do_forecasts(make_scene):
    scene = make_scene(running=2, sent=3, waiting=1, kv_capacity_tokens=10**6, max_num_seqs=64)
    scene.estimator = WaitEstimator(scene.service, engines_by_deadline=True)
    sent = list(scene.ledger.running.values())[2:]
    sent[2].deadline = -1.0
    assert [scene.forecast(item).position for item in sent] == [1, 2, 0]
    scene.items[0].deadline = 0.5
    assert scene.forecast(scene.items[0]).position == 1


def test_another_model_waits_for_the_first_and_the_swap(make_scene):
    scene = make_scene(running=4, waiting=20, models=("a", "b"), max_num_seqs=4, swap_in_s=5.0)
    waits = scene.waits()
    assert [item.request.model for item in scene.items[9:11]] == ["a", "b"]
    assert waits[10].mean_s >= waits[9].mean_s + 5.0


def test_an_aged_forecast_is_made_anew_and_a_fresh_one_kept(make_scene):
    scene = full_batch(make_scene)
    item = scene.items[150]
    first = scene.forecast(item)
    kept = scene.forecast(item, 0.1)
    assert kept.mean_s == pytest.approx(first.mean_s, rel=0.02)
    made = []
    scene.estimator.line = lambda *args: made.append(args) or WaitEstimator.line(scene.estimator, *args)
    scene.forecast(item, 0.2)
    assert not made
    scene.forecast(item, 0.5 * first.mean_s)
    assert len(made) == 1


def test_a_queue_that_outgrew_its_forecast_gets_a_new_one(make_scene, make_request):
    """A thousand arrivals in one moment: the last is not told the wait of the first."""
    scene = full_batch(make_scene, waiting=1)
    first = scene.forecast(scene.items[0]).mean_s
    waits = []
    for i in range(1000):
        item = Tracked(make_request(f"late{i}"))
        scene.table.join(item, GroupKey("a", "interactive", 0), 64)
        scene.groups = list(scene.table.groups.values())
        waits.append(scene.forecast(item).mean_s)
    fresh = scene.line().wait("a", 1000, 100, 0.0)
    assert waits[-1] == pytest.approx(fresh.mean_s, rel=0.05)
    assert waits[-1] > 100 * first


def test_where_models_alternate_visits_behind_the_followed_ones_are_as_long(make_scene):
    """Fifty pairs of models, one request each: every one waits for a swap more."""
    scene = make_scene(running=0, waiting=100, models=("a", "b") * 50, swap_in_s=5.0)
    scene.groups = stretches(scene.items)
    waits = scene.waits()
    for i in (20, 31, 60, 99):
        assert waits[i].mean_s == pytest.approx(5.0 * i, rel=0.15)
        assert waits[i].quantile(0.1) <= waits[i].mean_s <= waits[i].quantile(0.9)


def test_an_empty_instance_loads_the_model_first(make_scene):
    scene = make_scene(running=0, waiting=1, resident=None, swap_in_s=5.0)
    assert scene.waits()[0].mean_s > 5.0


def test_an_engine_that_was_seen_to_hold_less_is_forecast_slower(make_scene):
    """The model thinks that sixteen decode; twelve were seen to, for long."""
    scene = full_batch(make_scene, waiting=400)
    modelled = scene.waits()[300]
    profile = scene.ledger.profile
    pace = scene.service.clock(scene.ledger).pace
    for _ in range(2000):
        pace.decoded(10, 10 * decode_step_s(profile, 12, 12 * 300), 12, 12 * 300)
        pace.ended()
        pace.check(True, 1)
    observed = scene.waits()[300]
    slower = decode_step_s(profile, 12, 12 * 300) / 12 / (decode_step_s(profile, 16, 16 * 300) / 16)
    decoding = 1 - 16 * prefill_s(profile, 100, 16) / (
        16 * prefill_s(profile, 100, 16) + MEAN * decode_step_s(profile, 16, 16 * 300)
    )
    assert observed.mean_s / modelled.mean_s == pytest.approx(1 + decoding * (slower - 1), rel=0.02)
    assert modelled.quantile(0.9) / modelled.mean_s > observed.quantile(0.9) / observed.mean_s


def test_samples_of_a_long_group_stand_for_all_of_it(make_scene, make_request, monkeypatch):
    scene = full_batch(make_scene, waiting=1)
    rng = np.random.default_rng(5)
    for i, prompt in enumerate(rng.integers(20, 2000, size=4000).tolist()):
        item = Tracked(make_request(f"more{i}", prompt=prompt))
        scene.table.join(item, GroupKey("a", "interactive", 1), 10**6)
    scene.groups = list(scene.table.groups.values())
    sampled = [scene.line().wait("a", ahead, 100, 0.0).mean_s for ahead in (600, 2000, 4000)]
    monkeypatch.setattr("qlm_sim.estimator.wait.SINGLE_ENTRIES", 10**6)
    singly = [scene.line().wait("a", ahead, 100, 0.0).mean_s for ahead in (600, 2000, 4000)]
    assert sampled == pytest.approx(singly, rel=0.02)


def test_what_was_forecast_serves_as_long_as_it_is_to(make_scene):
    scene = full_batch(make_scene, waiting=2)
    made = []
    forecast_line = scene.estimator.line
    scene.estimator.line = lambda *told: made.append(told) or forecast_line(*told)
    for now in (0.0, 10.0):
        scene.forecast(scene.items[0], now)
    assert len(made) == 2
    scene.estimator.fresh_s = 5.0
    for now in (14.0, 16.0):
        scene.forecast(scene.items[0], now)
    assert len(made) == 3
