"""Laws of the recorder: what it keeps follows from the event log, whatever the order of a settle."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_sim.core.actions import Pull, Reject
from qlm_sim.core.events import (
    EngineReported,
    FirstToken,
    InstanceDown,
    InstanceUp,
    ModelSwapped,
    Progress,
    RequestArrived,
    RequestCancelled,
    RequestEvicted,
    RequestFailed,
    RequestFinished,
)
from qlm_sim.core.types import InstanceSpec, Request
from qlm_sim.metrics.columns import State
from qlm_sim.metrics.recorder import RunRecorder
from qlm_sim.metrics.series import MOST_POINTS


def request(name: str, at: float = 0.0, slo_class: str = "interactive") -> Request:
    return Request(name, "m", slo_class, 20.0, at, prompt_tokens=10, max_tokens=100)


def report(instance: str, busy_s: float, kv: float = 0.5, preemptions: int = 0) -> EngineReported:
    return EngineReported(instance, 1, 0, 100, kv, busy_s, preemptions)


def test_one_request_is_timed_from_arrival_to_finish():
    recorder = RunRecorder()
    recorder.record(1.0, [RequestArrived(request("a", 1.0))], [Pull("a", 1, "i0")])
    recorder.record(3.0, [FirstToken("a", 1, "i0")], [])
    recorder.record(7.0, [RequestFinished("a", 1, "i0", output_tokens=5)], [])
    rows = recorder.requests()
    assert rows.ttft_s.tolist() == [2.0]
    assert rows.e2e_s.tolist() == [6.0]
    assert rows.tpot_s.tolist() == [1.0]  # (6 - 2) / (5 - 1)
    assert (list(rows.ids), rows.instances, rows.attempts.tolist()) == (["a"], ("i0",), [1])


def test_evicted_and_resumed_request_keeps_its_first_ttft():
    recorder = RunRecorder()
    recorder.record(0.0, [RequestArrived(request("a"))], [Pull("a", 1, "i0")])
    recorder.record(2.0, [FirstToken("a", 1, "i0")], [])
    recorder.record(3.0, [RequestEvicted("a", 1, "i0", 4, kv_on_host=True)], [Pull("a", 2, "i1")])
    recorder.record(9.0, [FirstToken("a", 2, "i1")], [])
    recorder.record(11.0, [RequestFinished("a", 2, "i1", 10)], [])
    rows = recorder.requests()
    assert rows.ttft_s.tolist() == [2.0]
    assert rows.e2e_s.tolist() == [11.0]
    assert (rows.attempts.tolist(), rows.evictions.tolist()) == ([2], [1])
    assert [rows.instances[i] for i in rows.instance_index] == ["i1"]


def test_first_token_and_finish_of_one_instant_count_in_settle_order():
    """A settle sorts RequestFinished before FirstToken."""
    recorder = RunRecorder()
    recorder.record(0.0, [RequestArrived(request("a"))], [Pull("a", 1, "i0")])
    recorder.record(2.0, [RequestFinished("a", 1, "i0", 1), FirstToken("a", 1, "i0")], [])
    rows = recorder.requests()
    assert rows.ttft_s.tolist() == [2.0]
    assert np.isnan(rows.tpot_s).all()  # one token has no next one
    recorder.record(10.0, [], [])
    assert recorder.load().running[-1] == 0
    assert recorder.load().waiting[-1].tolist() == [0]


def test_events_of_an_attempt_that_is_over_change_nothing():
    recorder = RunRecorder()
    recorder.record(0.0, [RequestArrived(request("a"))], [Pull("a", 1, "i0")])
    recorder.record(1.0, [RequestEvicted("a", 1, "i0", 0, kv_on_host=False)], [Pull("a", 2, "i1")])
    recorder.record(
        2.0,
        [
            RequestFinished("a", 1, "i0", 9),
            FirstToken("a", 1, "i0"),
            RequestEvicted("a", 1, "i0", 9, kv_on_host=False),
            Progress("a", 1, "i0", 9),
            RequestFailed("a", 1, "i0", "late"),
        ],
        [],
    )
    rows = recorder.requests()
    assert rows.unfinished.all()
    assert np.isnan(rows.first_token_s).all()
    assert (rows.output_tokens.tolist(), rows.evictions.tolist()) == ([0], [1])


def test_an_instance_that_goes_down_gives_its_requests_back():
    recorder = RunRecorder([InstanceSpec("i0", {}, "m", 0, ())])
    recorder.record(0.0, [RequestArrived(request("a"))], [Pull("a", 1, "i0")])
    recorder.record(1.0, [FirstToken("a", 1, "i0")], [])
    recorder.record(2.0, [InstanceDown("i0")], [])
    recorder.record(3.0, [RequestFinished("a", 1, "i0", 9)], [])
    recorder.record(4.0, [], [])
    assert recorder.requests().unfinished.all()
    assert recorder.load().waiting[-1].tolist() == [1]
    assert recorder.timelines()["i0"].models == ("m", "")


def test_refused_failed_and_cancelled_requests_leave_the_queue():
    recorder = RunRecorder()
    recorder.record(0.0, [RequestArrived(request(name)) for name in "abc"], [Reject("a", 99.0)])
    recorder.record(0.0, [], [Pull("b", 1, "i0")])
    recorder.record(1.0, [RequestFailed("b", 1, "i0", "prompt too long"), RequestCancelled("c")], [])
    recorder.record(2.0, [], [])
    rows = recorder.requests()
    assert rows.state.tolist() == [State.REJECTED, State.FAILED, State.FAILED]
    assert recorder.load().waiting[-1].tolist() == [0]


def test_requests_handed_over_are_those_read_before_and_held_once():
    recorder = RunRecorder()
    recorder.record(0.0, [RequestArrived(request(name)) for name in "abc"], [Pull("b", 1, "i0")])
    recorder.record(1.0, [FirstToken("b", 1, "i0")], [])
    before, after = recorder.requests(), recorder.hand_over()
    for field in dataclasses.fields(before):
        assert list(getattr(before, field.name)) == pytest.approx(
            list(getattr(after, field.name)), nan_ok=True
        )
    assert after.part(slice(1, 3)).ids == ["b", "c"]
    assert after.part(slice(1, 3)).state.tolist() == [State.RUNNING, State.WAITING]
    assert len(recorder.requests()) == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=400))
def test_every_request_that_arrived_is_in_exactly_one_state_and_the_series_agree(steps):
    """Random legal lives of up to 31 requests, in batches of any size."""
    recorder = RunRecorder()
    state: dict[str, State] = {}
    attempt: dict[str, int] = {}
    live = (State.WAITING, State.SENT, State.RUNNING)
    for now, (which, what) in enumerate(steps):
        name = f"r{which}"
        events, actions = [], []
        if name not in state:
            events.append(RequestArrived(request(name, float(now), slo_class=f"class-{which % 3}")))
            state[name], attempt[name] = State.WAITING, 0
        elif state[name] == State.WAITING and what < 4:
            attempt[name] += 1
            actions.append(Pull(name, attempt[name], "i0"))
            state[name] = State.SENT
        elif state[name] == State.WAITING:
            actions.append(Reject(name, 1.0))
            state[name] = State.REJECTED
        elif state[name] == State.SENT and what < 4:
            events.append(FirstToken(name, attempt[name], "i0"))
            state[name] = State.RUNNING
        elif state[name] in live and what < 2:
            events.append(RequestEvicted(name, attempt[name], "i0", 1, kv_on_host=False))
            state[name] = State.WAITING
        elif state[name] in live:
            events.append(RequestFinished(name, attempt[name], "i0", 3))
            state[name] = State.FINISHED
        recorder.record(float(now), events, actions)
    recorder.record(len(steps) + 1000.0, [], [])
    rows = recorder.requests()
    assert dict(zip(rows.ids, map(State, rows.state.tolist()), strict=True)) == state
    assert (rows.finished.astype(int) + rows.unfinished + rows.rejected == 1).all()
    load = recorder.load()
    if state:
        assert load.waiting[-1].sum() == sum(now in (State.WAITING, State.SENT) for now in state.values())
        assert load.running[-1] == sum(now is State.RUNNING for now in state.values())


def test_load_is_what_held_between_settles():
    recorder = RunRecorder()
    recorder.record(1.0, [RequestArrived(request("a", 1.0))], [])
    recorder.record(2.0, [], [Pull("a", 1, "i0")])
    recorder.record(3.0, [FirstToken("a", 1, "i0")], [])
    recorder.record(4.0, [RequestFinished("a", 1, "i0", 2)], [])
    recorder.record(5.0, [], [])
    load = recorder.load()
    between = {1.5: (1, 0), 2.5: (1, 0), 3.5: (0, 1), 4.5: (0, 0), 0.5: (0, 0)}
    for time, (waiting, running) in between.items():
        at = int(np.flatnonzero(load.time_s == time)[0])
        assert (load.waiting[at].sum(), load.running[at]) == (waiting, running)


@pytest.mark.parametrize("end_s", [10.0, 1e4, 1e7])
def test_series_stay_small_however_long_the_run(end_s):
    recorder = RunRecorder()
    for now in np.linspace(0, end_s, 5000):
        recorder.record(float(now), [report("i0", busy_s=float(now) / 2)], [])
    load, engine = recorder.load(), recorder.engines()["i0"]
    assert len(load.time_s) <= MOST_POINTS
    assert len(engine.time_s) <= MOST_POINTS
    assert load.time_s[-1] >= end_s * 0.99 - 0.2
    assert engine.time_s[-1] == end_s  # the newest report is always kept
    assert np.allclose(engine.busy_share(np.linspace(0, end_s, 7)), 0.5)


def test_engine_totals_go_on_across_a_restart():
    spec = InstanceSpec("i0", {}, "m", 0, ())
    recorder = RunRecorder([spec])
    recorder.record(10.0, [report("i0", busy_s=4.0, preemptions=3)], [])
    recorder.record(11.0, [InstanceDown("i0")], [])
    recorder.record(20.0, [InstanceUp(spec)], [])
    recorder.record(30.0, [report("i0", busy_s=5.0, preemptions=1)], [])
    assert recorder.engines()["i0"].busy_s.tolist() == [4.0, 9.0]
    assert recorder.preemptions() == 4


def test_timeline_holds_models_swaps_and_evictions():
    recorder = RunRecorder([InstanceSpec("i0", {}, "m", 0, ())])
    recorder.record(1.0, [RequestArrived(request("a"))], [Pull("a", 1, "i0")])
    recorder.record(2.0, [RequestEvicted("a", 1, "i0", 0, kv_on_host=False)], [])
    recorder.record(7.0, [ModelSwapped("i0", "n", swap_s=3.0)], [])
    timeline = recorder.timelines()["i0"]
    assert timeline.models == ("m", "n")
    assert timeline.loaded_s.tolist() == [0.0, 7.0]
    assert timeline.swap_s.tolist() == [0.0, 3.0]
    assert timeline.evicted_s.tolist() == [2.0]
    assert recorder.swaps() == 1


def test_reading_in_mid_run_changes_nothing():
    def run(peek: bool) -> tuple[list[int], list[float]]:
        recorder = RunRecorder()
        for n in range(1000):
            recorder.record(float(n), [RequestArrived(request(f"r{n}", float(n)))], [Pull(f"r{n}", 1, "i0")])
            if n >= 3:
                recorder.record(n + 0.5, [RequestFinished(f"r{n - 3}", 1, "i0", 5)], [])
            if peek:
                recorder.requests()
        rows = recorder.requests()
        return rows.state.tolist(), rows.finished_s[rows.finished].tolist()

    assert run(peek=True) == run(peek=False)
