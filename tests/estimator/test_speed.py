"""The engine clock on a hand-made engine: speed and tokens are recovered from what engines tell."""

import pytest

from qlm_sim.core.events import EngineReported
from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lifecycle import State, Tracked
from qlm_sim.estimator.service import ServiceEstimator
from qlm_sim.estimator.steps import decode_step_s, prefill_s


class HandMadeEngine:
    """Decodes a batch step by step, ``slowness`` times as slow as its profile, and tells the estimator."""

    def __init__(self, spec, make_request, slowness):
        self.ledger = InstanceLedger(spec)
        self.estimator = ServiceEstimator()
        self.now = 0.0
        self.items = {}
        self._make_request = make_request
        self._slowness = slowness

    def start(self, name, prompt=100):
        item = Tracked(self._make_request(name, prompt=prompt))
        item.state = State.RUNNING
        self.ledger.pulled(item, self.now)
        self.estimator.first_token(self.ledger, item, self.now)
        self.ledger.began_decoding(item, self.now)
        self.items[name] = (item, 1)

    def decode(self, steps, names=None):
        names = list(names or self.items)
        for _ in range(steps):
            kv_tokens = sum(item.pulled_context + tokens for item, tokens in map(self.items.get, names))
            self.now += self._slowness * decode_step_s(self.ledger.profile, len(names), kv_tokens)
            for name in names:
                item, tokens = self.items[name]
                self.items[name] = (item, tokens + 1)

    def finish(self, name):
        item, tokens = self.items.pop(name)
        self.estimator.finished(self.ledger, item, self.now, tokens)
        self.ledger.left(item)

    def report(self, running, preemptions=0):
        kv_tokens = sum(item.pulled_context + self.items[item.request.id][1] for item in running)
        waiting = len(self.items) - len(running)
        self.ledger.reported = EngineReported(
            "i0", len(running), waiting, kv_tokens, 0.5, self.now, preemptions
        )
        self.estimator.reported(self.ledger, self.now)

    @property
    def generated(self):
        return sum(tokens for _, tokens in self.items.values())


@pytest.fixture
def make_engine(make_instance, make_request):
    return lambda slowness=1.0, **more: HandMadeEngine(make_instance(**more), make_request, slowness)


def test_without_events_the_clock_knows_what_was_generated(make_engine):
    engine = make_engine()
    engine.start("a")
    engine.decode(40)
    engine.start("b")
    engine.decode(60)
    # The prefill of b, which the hand-made engine does in no time, is allowed for.
    assert engine.estimator.generated_tokens(engine.ledger, engine.now) == pytest.approx(
        engine.generated, abs=6
    )


@pytest.mark.parametrize("slowness", [0.8, 1.0, 1.2, 2.0])
def test_the_speed_of_an_engine_is_recovered(make_engine, slowness):
    engine = make_engine(slowness)
    for i in range(60):
        engine.start(str(i))
        engine.decode(100)
        engine.finish(str(i))
    assert engine.estimator.slowness(engine.ledger, "a") == pytest.approx(slowness, rel=0.02)


def test_what_requests_hold_an_engine_up_does_not_make_it_look_slow(make_engine):
    engine = make_engine(intake_s=0.05)
    for i in range(100):
        engine.now += 0.05 + prefill_s(engine.ledger.profile, 100, len(engine.items))
        engine.start(str(i))
        engine.decode(10)
        if i >= 2:
            engine.finish(str(i - 2))
    assert engine.estimator.slowness(engine.ledger, "a") == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("steps", [1, 25, 100])
def test_what_was_held_does_not_depend_on_how_often_requests_come_and_go(make_engine, steps):
    engine = make_engine()
    held = 0.0
    engine.start("long")
    for i in range(400 // steps):
        engine.now += prefill_s(engine.ledger.profile, 100, 1)
        engine.start(str(i))
        for _ in range(steps):
            held += sum(item.pulled_context + tokens for item, tokens in engine.items.values())
            engine.decode(1)
        engine.finish(str(i))
    pace = engine.estimator.clock(engine.ledger).pace
    pace.check(waited=True, running=0)
    assert pace.sequence_steps == pytest.approx(800, rel=0.02)
    assert pace.kv_steps == pytest.approx(held, rel=0.02)


def test_a_report_puts_the_tokens_right(make_engine):
    """Before a slow engine's speed is known, its report tells how far its requests have come."""
    engine = make_engine(slowness=2.0)
    engine.start("a")
    engine.decode(200)
    guess = engine.estimator.generated_tokens(engine.ledger, engine.now)
    assert guess > 1.5 * engine.generated
    engine.report([item for item, _ in engine.items.values()])
    assert engine.estimator.generated_tokens(engine.ledger, engine.now) == pytest.approx(engine.generated)


def test_errors_of_the_count_do_not_gather_while_no_report_tells_of_it(make_engine):
    """An engine that goes slower and faster than expected, one request after the other, never empty."""
    engine = make_engine(slowness=2.0)
    for i in range(100):
        engine.start(str(i))
        engine.decode(30)
        if i >= 4:
            engine.finish(str(i - 4))
    entries = engine.estimator.clock(engine.ledger).decoding
    for name, (_, tokens) in engine.items.items():
        assert entries[name].tokens() == pytest.approx(tokens, rel=0.3), name


def test_preempted_requests_neither_generate_nor_make_the_engine_look_slow(make_engine):
    engine = make_engine()
    for name in "ab":
        engine.start(name)
    engine.decode(50)
    engine.report([engine.items["a"][0]], preemptions=1)
    engine.decode(100, names="a")
    # Up to the work of computing b again, which it cannot see being put off.
    assert engine.estimator.generated_tokens(engine.ledger, engine.now) == pytest.approx(
        engine.generated, abs=10
    )
    engine.decode(100, names="b")
    engine.finish("b")
    assert engine.estimator.slowness(engine.ledger, "a") == pytest.approx(1.0, rel=0.02)


def test_what_is_known_of_a_model_serves_a_second_instance(make_instance, make_engine, make_request):
    engine = make_engine(slowness=1.5)
    for i in range(60):
        engine.start(str(i))
        engine.decode(100)
        engine.finish(str(i))
    other = InstanceLedger(make_instance("i1"))
    assert engine.estimator.slowness(other, "a") == pytest.approx(1.5, rel=0.02)


def test_a_report_tells_what_preempted_requests_left_behind(make_engine):
    """Of four requests two lost their KV cache: the tokens of the others are known all the same."""
    engine = make_engine()
    for i in range(4):
        engine.start(f"r{i}")
    engine.decode(100)
    engine.decode(60, names=["r0", "r1"])
    running = [engine.items[name][0] for name in ("r0", "r1")]
    engine.report(running, preemptions=2)
    clock = engine.estimator.clock(engine.ledger)
    assert clock.generated(engine.now) == pytest.approx(4 * 161, rel=0.01)


def test_an_engine_that_has_preempted_all_it_had_can_be_reported(make_engine):
    """Between two iterations nothing may be on the GPU at all."""
    engine = make_engine()
    engine.start("a")
    engine.decode(50)
    engine.report([], preemptions=1)
    assert engine.estimator.generated_tokens(engine.ledger, engine.now) == pytest.approx(51, rel=0.1)
