"""Eviction, resumption and model swaps on one engine, computed by hand: iterations take one second."""

from collections.abc import Sequence

import pytest
from cluster.lab import NEVER, Log, SharedQueue, instance, model, run, workload

from qlm_sim.core.actions import Action, Evict, Pull, SwapModel
from qlm_sim.core.events import (
    Event,
    FirstToken,
    ModelSwapped,
    RequestArrived,
    RequestEvicted,
    RequestFinished,
    TimerFired,
)
from qlm_sim.core.types import InstanceSpec
from qlm_sim.models.engine_config import EngineConfig


class Told:
    """Pulls arrivals to i0 unless told otherwise, and gives the orders of a timetable."""

    def __init__(self, timetable: dict[float, list[Action]], pull_arrivals: bool = True) -> None:
        self.timetable = dict(sorted(timetable.items()))
        self.pull_arrivals = pull_arrivals

    @property
    def wake_at(self) -> float:
        return next(iter(self.timetable), NEVER)

    def handle(self, now: float, events: Sequence[Event]) -> list[Action]:
        actions: list[Action] = []
        for event in events:
            if type(event) is RequestArrived and self.pull_arrivals:
                actions.append(Pull(event.request.id, 1, "i0"))
            elif type(event) is TimerFired:
                actions += self.timetable.pop(self.wake_at)
        return actions


def told(
    rows: list[tuple[float, int, int]],
    timetable: dict[float, list[Action]],
    *instances: InstanceSpec,
    engine: str = "leap",
    **changes: float,
) -> Log:
    log, _ = run(rows, instances or [instance(**changes)], core=Told(timetable), engine=engine)
    return log


def evicted(log: Log) -> list[tuple[float, int, bool]]:
    return [(now, event.output_tokens, event.kv_on_host) for now, event in log.of(RequestEvicted)]


@pytest.fixture(params=["leap", "stepping"])
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


def test_eviction_takes_effect_at_the_end_of_the_iteration(engine: str) -> None:
    log = told([(0.0, 10, 99)], {5.5: [Evict("r0", 1, "i0", False)]}, engine=engine)
    assert evicted(log) == [(6.0, 6, False)]


def test_an_order_that_takes_its_time_misses_an_iteration(engine: str) -> None:
    one = instance()
    rows = [(0.0, 10, 9), (0.0, 10, 3), (0.0, 10, 2)]
    at_once, _ = run(rows, one, core=SharedQueue([one], most=2), engine=engine)
    assert at_once.first_tokens() == {"r0": 1.0, "r1": 1.0, "r2": 4.0}
    later, _ = run(rows, one, core=SharedQueue([one], most=2), engine=engine, order_s=0.25)
    assert later.first_tokens() == {"r0": 1.25, "r1": 1.25, "r2": 5.25}
    assert later.finishes() == {"r0": 9.25, "r1": 3.25, "r2": 6.25}


def test_a_request_holds_its_engine_up_before_the_next_iteration(engine: str) -> None:
    """Two that come together, then one in mid-iteration, whether it can start or not."""
    trace = [(0.0, 5, 3), (0.0, 5, 3), (1.0, 5, 1)]
    for seats, last in ((3, 3.0), (2, 5.0)):
        spec = instance(models={"m": model(intake_s=0.25, max_num_seqs=seats)})
        log, _ = run(trace, spec, engine=engine)
        assert log.finishes() == {"r0": 3.75, "r1": 3.75, "r2": last - 0.25}


def test_resumed_without_kv_it_is_computed_anew_and_goes_on_where_it_was(engine: str) -> None:
    timetable = {5.5: [Evict("r0", 1, "i0", False)], 8.5: [Pull("r0", 2, "i0")]}
    log = told([(0.0, 10, 20)], timetable, engine=engine)
    assert log.times(FirstToken)["r0"] == [1.0, 9.5], "one per attempt"
    # 6 tokens before; the recompute gives the seventh at 9.5 s.
    assert log.finishes()["r0"] == 9.5 + 13
    assert log.of(RequestFinished)[0][1] == RequestFinished("r0", 2, "i0", 20)


def test_resumed_with_kv_it_pays_for_the_way_out_and_back_and_decodes_on(engine: str) -> None:
    """At 6 s 15 tokens (10 + 6, less the last) have KV. Half a second each way per 8 tokens: 0.9375 s."""
    timetable = {5.5: [Evict("r0", 1, "i0", True)], 8.0: [Pull("r0", 2, "i0")]}
    log = told([(0.0, 10, 20)], timetable, kv_restore_token_s=0.0625, engine=engine)
    assert evicted(log) == [(6.0, 6, True)]
    assert log.times(FirstToken)["r0"] == [1.0, 8.0 + 0.9375 + 1]
    assert log.finishes()["r0"] == 8.0 + 0.9375 + 14


def test_a_prompt_whose_kv_comes_back_holds_blocks_meanwhile(engine: str) -> None:
    """Evicted at 2 s with 16 of 20 prompt tokens done; they are copied out until 4 s, back until 6 s."""
    timetable = {1.5: [Evict("r0", 1, "i0", True)], 4.0: [Pull("r0", 2, "i0")]}
    changes = {"max_num_seqs": 8, "max_num_batched_tokens": 8, "kv_capacity_tokens": 160}
    log = told([(0.0, 20, 9)], timetable, kv_restore_token_s=0.125, engine=engine, **changes)
    told_of = {now: (report.kv_tokens, report.kv_utilization) for now, report in log.reports()}
    assert told_of[5.0] == told_of[6.0] == (16, 0.1)


def test_others_wait_while_kv_is_copied_out(engine: str) -> None:
    timetable: dict[float, list[Action]] = {5.5: [Evict("r0", 1, "i0", True)]}
    log = told([(0.0, 10, 99), (0.0, 10, 9)], timetable, kv_restore_token_s=0.0625, engine=engine)
    assert log.finishes()["r1"] == 9.0 + 0.9375


def test_kv_is_dropped_where_host_memory_has_no_room() -> None:
    """15 bytes of KV; the weights that host memory holds leave 14."""
    timetable: dict[float, list[Action]] = {5.5: [Evict("r0", 1, "i0", True)]}
    small = instance(host_bytes=1014, host_models=("m",))
    assert evicted(told([(0.0, 10, 99)], timetable, small)) == [(6.0, 6, False)]
    enough = instance(host_bytes=1015, host_models=("m",))
    assert evicted(told([(0.0, 10, 99)], timetable, enough)) == [(6.0, 6, True)]


def test_kv_on_one_host_is_of_no_use_to_another_instance() -> None:
    timetable: dict[float, list[Action]] = {
        5.5: [Evict("r0", 1, "i0", True)],
        8.0: [Pull("r0", 2, "i1")],
        9.5: [Evict("r0", 2, "i1", False)],
        30.0: [Pull("r0", 3, "i0")],
    }
    changes = {"kv_restore_token_s": 1.0}
    log = told([(0.0, 10, 9)], timetable, instance("i0", **changes), instance("i1", **changes))
    # Two seconds on i1 give tokens 7 and 8; back on i0 its old KV is gone: one iteration, no copying.
    assert log.times(FirstToken)["r0"] == [1.0, 9.0, 31.0]
    assert log.finishes() == {"r0": 31.0}


def test_eviction_of_one_that_still_waits_is_immediate() -> None:
    log = told([(0.0, 10, 99), (0.0, 10, 9)], {5.5: [Evict("r1", 1, "i0", True)]}, max_num_seqs=1)
    assert evicted(log) == [(5.5, 0, False)]


def test_those_behind_an_evicted_head_get_their_chance_in_mid_leap(engine: str) -> None:
    """r0 has 5 of 8 blocks; r1, first in line, needs 4, and r2 behind it but one."""
    rows = [(0.0, 70, 9), (0.0, 60, 9), (0.0, 10, 9)]
    timetable: dict[float, list[Action]] = {5.5: [Evict("r1", 1, "i0", False)]}
    log = told(rows, timetable, kv_capacity_tokens=128, engine=engine)
    assert log.first_tokens() == {"r0": 1.0, "r2": 7.0}


def test_orders_for_what_is_over_are_ignored() -> None:
    timetable: dict[float, list[Action]] = {
        2.5: [Evict("r0", 1, "i0", False)],
        6.5: [Evict("r1", 7, "i0", False)],
    }
    log = told([(0.0, 10, 2), (0.0, 10, 9)], timetable)
    assert evicted(log) == []
    assert log.finishes() == {"r0": 2.0, "r1": 9.0}


def test_one_that_finishes_before_its_eviction_takes_effect_is_finished(engine: str) -> None:
    log = told([(0.0, 10, 6)], {5.5: [Evict("r0", 1, "i0", False)]}, engine=engine)
    assert evicted(log) == []
    assert log.finishes() == {"r0": 6.0}


TWO = {"m": model(), "n": model()}


def test_swap_takes_the_longer_from_storage_than_from_host() -> None:
    for host_models, swap_s in (((), 8.0), (("n",), 2.0)):
        rows = workload([(0.0, 10, 1), (30.0, 10, 1)], ["m", "n"])
        log, _ = run(
            rows,
            instance(models=TWO, host_models=host_models),
            core=Told({4.0: [SwapModel("i0", "n")]}),
        )
        assert log.of(ModelSwapped) == [(4.0 + swap_s, ModelSwapped("i0", "n", swap_s))]


def test_weights_stay_in_host_memory_for_the_next_swap() -> None:
    rows = workload([(0.0, 10, 1), (99.0, 10, 1)], ["m", "m"])
    timetable: dict[float, list[Action]] = {
        10.0: [SwapModel("i0", "n")],
        30.0: [SwapModel("i0", "m")],
        50.0: [SwapModel("i0", "n")],
        70.0: [SwapModel("i0", "m")],
    }
    log, _ = run(rows, instance(models=TWO, host_bytes=2000), core=Told(timetable))
    assert [event.swap_s for _, event in log.of(ModelSwapped)] == [8.0, 8.0, 2.0, 2.0]


def test_swap_waits_until_the_engine_has_run_empty_and_requests_of_the_new_model_wait_for_it(
    engine: str,
) -> None:
    rows = workload([(0.0, 10, 6), (0.0, 10, 4), (3.5, 10, 2)], ["m", "m", "n"])
    timetable: dict[float, list[Action]] = {
        2.5: [SwapModel("i0", "n")],
        4.5: [Pull("r2", 1, "i0")],
    }

    class Later(Told):
        def handle(self, now: float, events: Sequence[Event]) -> list[Action]:
            return [
                action
                for action in super().handle(now, events)
                if not (type(action) is Pull and action.request_id == "r2" and now < 4.0)
            ]

    log, _ = run(rows, instance(models=TWO), core=Later(timetable), engine=engine)
    assert log.finishes() == {"r0": 6.0, "r1": 4.0, "r2": 6.0 + 8.0 + 2.0}


def test_swap_ordered_right_behind_evictions_follows_them(engine: str) -> None:
    rows = workload([(0.0, 10, 99), (0.0, 10, 99)], ["m", "m"])
    timetable: dict[float, list[Action]] = {
        2.5: [Evict("r0", 1, "i0", True), Evict("r1", 1, "i0", True), SwapModel("i0", "n")]
    }
    log, end = run(
        rows,
        instance(models={"m": model(kv_restore_token_s=0.0625), "n": model()}),
        core=Told(timetable),
        engine=engine,
        until_s=40.0,
    )
    # Twelve tokens' KV each are copied out behind the third iteration.
    assert log.of(ModelSwapped) == [(3.0 + 24 * 0.0625 + 8.0, ModelSwapped("i0", "n", 8.0))]
    assert end.unfinished == 2


def test_evicted_kv_gives_way_to_weights() -> None:
    """Host memory for one model and a little KV: loading another takes the KV's room."""
    rows = workload([(0.0, 10, 20)], ["m"])
    timetable: dict[float, list[Action]] = {
        2.5: [Evict("r0", 1, "i0", True), SwapModel("i0", "n")],
        20.0: [SwapModel("i0", "m")],
        40.0: [Pull("r0", 2, "i0")],
    }
    models = {"m": model(kv_restore_token_s=0.0625), "n": model()}
    for host_bytes, first_token_s in ((1005, 1.0), (2500, 1.0 + 12 * 0.0625)):
        log, _ = run(rows, instance(models=models, host_bytes=host_bytes), core=Told(timetable))
        assert evicted(log)[0][2]
        assert log.times(FirstToken)["r0"][1] == 40.0 + first_token_s


def test_broken_invariants_tell_the_requests_story() -> None:
    with pytest.raises(RuntimeError, match=r"Pull to i0, which serves m.*SimRequest\('r0', model='n'"):
        run(workload([(0.0, 10, 2)], ["n"]), instance(models=TWO))
    with pytest.raises(RuntimeError, match=r"an engine has it already.*attempt=1"):
        told([(0.0, 10, 9)], {2.0: [Pull("r0", 2, "i0")]})
    with pytest.raises(RuntimeError, match=r"'r9'.*never arrived"):
        told([(0.0, 10, 9)], {2.0: [Pull("r9", 1, "i0")]})
    with pytest.raises(RuntimeError, match="SwapModel to m on i0, which serves m, is loading n"):
        run(
            workload([(0.0, 10, 9)], ["m"]),
            instance(models=TWO),
            core=Told({2.0: [SwapModel("i0", "n"), SwapModel("i0", "m")]}),
        )


def test_priority_orders_resumed_requests_by_deadline_too() -> None:
    rows = workload([(0.0, 10, 30), (1.0, 10, 30), (2.0, 10, 2)], slo_s=[5.0, 90.0, 50.0])
    log, _ = run(
        rows,
        instance(max_num_seqs=1),
        EngineConfig(scheduling_policy="priority"),
        Told({5.5: [Evict("r0", 1, "i0", False)], 7.5: [Pull("r0", 2, "i0")]}),
    )
    # r2 (due at 52 s) before r1 (91 s), and r0 (5 s) before r1 when it is back.
    assert log.times(FirstToken) == {"r0": [1.0, 9.0], "r2": [7.0], "r1": [33.0]}
