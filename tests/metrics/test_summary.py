"""Laws of the summary: counts add up, attainment is what a hand count gives, percentiles are numpy's."""

import math
from heapq import heappop, heappush

import numpy as np
import pytest

from qlm_sim.core.actions import Pull, Reject
from qlm_sim.core.events import EngineReported, FirstToken, RequestArrived, RequestFinished
from qlm_sim.core.types import InstanceSpec, Request, SloClass
from qlm_sim.metrics.recorder import RunRecorder
from qlm_sim.metrics.run import conclude
from qlm_sim.metrics.saturation import growing_presence, saturation
from qlm_sim.metrics.summary import summarise

QUICK = SloClass("quick", ttft_s=2.0, tpot_s=0.5)
SLOW = SloClass("slow", ttft_s=None, e2e_s=100.0)


def served(
    recorder: RunRecorder, name: str, slo: str, arrive: float, first: float, done: float, tokens: int
) -> None:
    """One request's whole life, the settles in order of time."""
    request = Request(name, "m", slo, 2.0, arrive, 10, 100)
    recorder.record(arrive, [RequestArrived(request)], [Pull(name, 1, "i0")])
    if not math.isnan(first):
        recorder.record(first, [FirstToken(name, 1, "i0")], [])
    if not math.isnan(done):
        recorder.record(done, [RequestFinished(name, 1, "i0", tokens)], [])


@pytest.fixture
def by_hand() -> RunRecorder:
    """Ten requests whose fate can be counted by hand: 4 of 10 met their SLO."""
    nan = float("nan")
    recorder = RunRecorder()
    served(recorder, "met", "quick", 0, 1, 3, 11)  # TTFT 1, TPOT 0.2
    served(recorder, "late", "quick", 0, 3, 4, 11)  # TTFT 3 > 2
    served(recorder, "sluggish", "quick", 0, 1, 10, 11)  # TPOT 0.9 > 0.5
    served(recorder, "one token", "quick", 0, 1, 1, 1)  # met: no TPOT to miss
    served(recorder, "running", "quick", 0, 1, nan, 0)  # first token in time, never finished
    served(recorder, "waiting", "quick", 0, nan, nan, 0)
    served(recorder, "patient", "slow", 0, 90, 99, 5)  # met: only E2E is promised
    served(recorder, "on the dot", "slow", 0, 50, 100, 5)  # met: a target is inclusive
    served(recorder, "too late", "slow", 0, 1, 101, 5)
    refused = Request("refused", "m", "slow", 2.0, 0.0, 10, 100)
    recorder.record(0.0, [RequestArrived(refused)], [Reject("refused", 500.0)])
    return recorder


def test_attainment_is_what_counting_by_hand_gives(by_hand):
    summary = summarise(by_hand.requests(), by_hand, (QUICK, SLOW), end_s=200.0)
    assert summary["slo_attainment"] == {
        "overall": 0.4,
        "admitted": 4 / 9,
        "by_class": {"quick": 2 / 6, "slow": 2 / 4},
    }
    assert summary["refused"] == summary["by_class"]["slow"]["refused"] == 1
    assert summary["goodput_rps"] == pytest.approx(4 / 200)
    assert summary["throughput_rps"] == pytest.approx(7 / 200)
    assert summary["output_tokens_per_s"] == pytest.approx((11 * 3 + 1 + 5 * 3) / 200)


def test_requests_are_finished_or_unfinished_or_rejected(by_hand):
    summary = summarise(by_hand.requests(), by_hand, (QUICK, SLOW), end_s=200.0)
    assert [summary[key] for key in ("requests", "finished", "unfinished", "rejected")] == [10, 7, 2, 1]
    for figures in (summary, *summary["by_class"].values()):
        assert figures["requests"] == figures["finished"] + figures["unfinished"] + figures["rejected"]


def test_unfinished_work_is_a_violation_and_stretches_the_makespan_to_the_end(by_hand):
    assert summarise(by_hand.requests(), by_hand, (QUICK, SLOW), end_s=200.0)["makespan_s"] == 200.0
    recorder = RunRecorder()
    served(recorder, "a", "quick", 5, 6, 7, 3)
    assert (
        summarise(recorder.requests(), recorder, (QUICK,), end_s=1000.0)["makespan_s"] == 2.0
    )  # first arrival to last finish


def test_a_class_without_requests_has_no_attainment(by_hand):
    nobody = SloClass("nobody", ttft_s=1.0)
    summary = summarise(by_hand.requests(), by_hand, (QUICK, SLOW, nobody), end_s=200.0)
    assert summary["by_class"]["nobody"]["requests"] == 0
    assert summary["by_class"]["nobody"]["slo_attainment"] is None
    assert summary["by_class"]["nobody"]["ttft_s"]["p99"] is None


def test_a_run_without_requests_has_figures_without_values():
    recorder = RunRecorder()
    summary = summarise(recorder.requests(), recorder, (QUICK,), end_s=10.0)
    assert summary["requests"] == 0
    assert summary["slo_attainment"]["overall"] is None
    assert summary["throughput_rps"] is None


def test_percentiles_are_numpys_on_the_rows():
    rng = np.random.default_rng(3)
    recorder = RunRecorder()
    waits, services = rng.exponential(2.0, 500), rng.exponential(5.0, 500)
    for n, (wait, service) in enumerate(zip(waits, services, strict=True)):
        served(recorder, f"r{n}", ("quick", "slow")[n % 2], 0.0, wait, wait + service, 11)
    summary = summarise(recorder.requests(), recorder, (QUICK, SLOW), end_s=1e9)
    for rows, figures in ((slice(None), summary), (slice(0, None, 2), summary["by_class"]["quick"])):
        for key, raw in (("ttft_s", waits), ("tpot_s", services / 10), ("e2e_s", waits + services)):
            assert figures[key]["mean"] == pytest.approx(raw[rows].mean())
            for q in (50, 90, 95, 99):
                assert figures[key][f"p{q}"] == pytest.approx(np.percentile(raw[rows], q))


def test_gpu_utilisation_is_busy_time_over_makespan_mean_of_instances():
    recorder = RunRecorder([InstanceSpec(name, {}, "m", 0, ()) for name in ("i0", "i1", "i2")])
    served(recorder, "a", "quick", 10.0, 11.0, 30.0, 3)  # makespan: 10 to 30 s
    for now, busy_s in ((10.0, 0.0), (20.0, 10.0), (30.0, 15.0), (40.0, 25.0)):
        recorder.record(now, [EngineReported("i0", 1, 0, 1, 0.4, busy_s, 0)], [])
        recorder.record(now, [EngineReported("i1", 1, 0, 1, 0.2, busy_s / 5, 0)], [])
    summary = summarise(recorder.requests(), recorder, (QUICK,), end_s=40.0)
    assert summary["gpu_utilization"] == pytest.approx((15 / 20 + 3 / 20 + 0) / 3)  # i2 never worked
    assert summary["kv_utilization"] == pytest.approx(0.3)


def single_server(load: float, requests: int, seed: int) -> RunRecorder:
    """An M/M/1 queue in order of arrival, by Lindley's recursion, mean service one second."""
    rng = np.random.default_rng(seed)
    arrive = np.cumsum(rng.exponential(1 / load, requests))
    recorder, free = RunRecorder(), 0.0
    for n, (at, service) in enumerate(zip(arrive.tolist(), rng.exponential(1.0, requests), strict=True)):
        start = max(at, free)
        free = start + float(service)
        served(recorder, f"r{n}", "quick", at, start, free, 2)
    return recorder


@pytest.mark.parametrize("seed", range(5))
def test_a_queue_is_called_saturated_when_its_load_is_above_one_and_not_when_below(seed):
    assert not saturation(single_server(0.7, 2000, seed).requests()).saturated
    assert saturation(single_server(1.25, 2000, seed).requests()).saturated


def shared_server(load: float, requests: int, seed: int) -> RunRecorder:
    """A server shared by all that are there, each of whom gets a first token at once: nobody ever waits."""
    rng = np.random.default_rng(seed)
    arrive = np.cumsum(rng.exponential(1 / load, requests)).tolist()
    work, ends = rng.exponential(1.0, requests).tolist(), [0.0] * requests
    now, done, number = 0.0, 0.0, 0
    present: list[tuple[float, int]] = []
    while number < requests or present:
        due = now + (present[0][0] - done) * len(present) if present else math.inf
        if number < requests and arrive[number] <= due:
            done += (arrive[number] - now) / len(present) if present else 0.0
            now = arrive[number]
            heappush(present, (done + work[number], number))
            number += 1
        else:
            done, leaving = heappop(present)
            now = ends[leaving] = due
    recorder = RunRecorder()
    for n, (at, end) in enumerate(zip(arrive, ends, strict=True)):
        served(recorder, f"r{n}", "quick", at, at, end, 2)
    return recorder


@pytest.mark.parametrize("seed", range(5))
def test_ever_more_are_present_where_a_server_takes_in_more_than_it_serves(seed):
    """What no backlog shows."""
    assert growing_presence(shared_server(0.7, 2000, seed).requests()) is None
    crowded = shared_server(1.25, 2000, seed).requests()
    assert not saturation(crowded).saturated
    assert growing_presence(crowded) is not None


def test_nothing_is_told_of_requests_that_stay_as_long_as_the_arrivals_last():
    recorder = RunRecorder()
    for n in range(200):
        served(recorder, f"r{n}", "quick", float(n), float(n), n + 150.0, 2)
    assert growing_presence(recorder.requests()) is None


def test_a_burst_is_saturated_however_short():
    recorder = RunRecorder()
    for n in range(50):
        served(recorder, f"r{n}", "quick", 0.0, 1.0 + n, 2.0 + n, 2)
    verdict = saturation(recorder.requests())
    assert verdict.saturated
    assert "50 of 50 requests waited" in verdict.sentence


def test_conclude_keeps_what_the_recorder_knew(by_hand):
    known = summarise(by_hand.requests(), by_hand, (QUICK, SLOW), end_s=200.0)
    run = conclude("qlm", by_hand, (QUICK, SLOW), end_s=200.0)
    assert run.summary == known
    assert len(run.requests) == 10


def test_a_few_that_have_just_come_are_no_burst():
    for requests in (1, 2, 9):
        recorder = RunRecorder()
        for number in range(requests):
            served(recorder, f"r{number}", "quick", 0.0, 1.0, 2.0, 2)
        assert not saturation(recorder.requests()).saturated
