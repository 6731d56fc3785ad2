"""The simulated engine against vLLM's own scheduler, step by step.

The traces are what vLLM did (``experiments/vllm_scheduler_trace.py`` recorded them and tells their form).
"""

import gzip
import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from cluster.lab import instance, model, run

from qlm_sim.cluster.requests import SimRequest
from qlm_sim.cluster.scheduler import Scheduler
from qlm_sim.core.types import ModelOnInstance, SloClass
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.workload.workload import Workload

DATA = Path(__file__).parent / "data"
FOREVER = 1 << 62


@dataclass(frozen=True)
class Step:
    """What one iteration of vLLM did."""

    number: int
    tokens: dict[str, int]
    blocks: int
    waiting: int
    preemptions: int
    begun: list[str]
    """Requests that got their first token at its end."""
    finished: list[str]


@dataclass(frozen=True)
class Recorded:
    """A workload and what vLLM made of it."""

    profile: ModelOnInstance
    config: EngineConfig
    requests: Workload
    """Arrivals are steps; a request's deadline is its priority."""
    steps: list[Step]
    evictions: list[tuple[int, str, int]]
    """Step, request, and the step at which it comes back."""
    prefix_queries: int
    prefix_hits: int


def recorded(workload: dict[str, Any]) -> Recorded:
    size = workload["block_size"]
    arrival, prompt, output, priority = np.array(workload["requests"]).T
    slos, slo_index = np.unique(priority - arrival, return_inverse=True)
    return Recorded(
        profile=model(
            # vLLM keeps one block for itself.
            kv_capacity_tokens=(workload["num_gpu_blocks"] - 1) * size,
            max_num_seqs=workload["max_num_seqs"],
            max_num_batched_tokens=workload["max_num_batched_tokens"],
            max_model_len=workload["max_model_len"],
        ),
        config=EngineConfig(
            block_size=size,
            scheduling_policy=workload["policy"],
            scheduler_reserve_full_isl=workload["scheduler_reserve_full_isl"],
            watermark=workload.get("watermark", 0.0),
            enable_prefix_caching=workload.get("enable_prefix_caching", False),
        ),
        requests=Workload(
            ids=[f"r{number:02}" for number in range(len(arrival))],
            arrival_s=arrival.astype(np.float64),
            prompt_tokens=prompt,
            output_tokens=output,
            max_tokens=output,
            models=("m",),
            model_index=np.zeros(len(arrival), dtype=np.int64),
            slo_classes=tuple(SloClass(str(slo), ttft_s=float(slo)) for slo in slos),
            slo_index=slo_index.astype(np.int64),
            content=workload.get("content"),
        ),
        steps=[Step(*step) for step in workload["steps"]],
        evictions=[(step, f"r{row:02}", back_at) for step, row, back_at in workload.get("evictions", ())],
        prefix_queries=workload.get("prefix_queries", 0),
        prefix_hits=workload.get("prefix_hits", 0),
    )


def workloads(file: str) -> list[Recorded]:
    return [recorded(each) for each in json.loads(gzip.decompress((DATA / file).read_bytes()))["workloads"]]


WORKLOADS = workloads("vllm_scheduler_traces.json.gz")
ALIKE = workloads("vllm_prefix_caching_traces.json.gz")
"""Requests that begin alike, with prefix caching."""
each_workload = pytest.mark.parametrize("vllm", WORKLOADS, ids=range(len(WORKLOADS)))
each_workload_and_those_alike = pytest.mark.parametrize(
    "vllm",
    WORKLOADS + ALIKE,
    ids=[*map(str, range(len(WORKLOADS))), *(f"alike{number}" for number in range(len(ALIKE)))],
)


def replay(vllm: Recorded, longest: int) -> tuple[list[Step], Scheduler]:
    """What our scheduler does with the same requests, in leaps of at most ``longest`` iterations."""
    scheduler = Scheduler(vllm.profile, vllm.config)
    requests = [SimRequest(request, output) for request, output in vllm.requests.requests()]
    for seq, content in zip(requests, vllm.requests.contents(), strict=True):
        seq.content = content
    arriving = [(int(seq.request.arrived_at), seq) for seq in requests]
    evictions = vllm.evictions[:]
    present: dict[str, SimRequest] = {}
    steps: list[Step] = []
    number = 0
    while arriving or present:
        if not present:
            number = max(number, arriving[0][0])
        while evictions and evictions[0][0] <= number:
            _, name, back_at = evictions.pop(0)
            if name in present:
                seq = present.pop(name)
                if name in scheduler.running:
                    scheduler.stop(seq)
                else:
                    scheduler.withdraw(seq)
                arriving.append((back_at, seq))
        arriving.sort(key=lambda each: each[0])
        while arriving and arriving[0][0] <= number:
            seq = arriving.pop(0)[1]
            present[seq.request.id] = seq
            seq.announced = False
            scheduler.add(seq)
        if not present:
            continue
        until = [at - number for at, *_ in arriving + evictions if at > number]
        before = scheduler.preemptions
        iterations = scheduler.schedule(min(longest, *until, FOREVER))
        leap = [
            Step(
                number + done,
                scheduler.scheduled(),
                scheduler.used_blocks(done, under_way=True),
                len(scheduler.waiting),
                scheduler.preemptions - before if done == 0 else 0,
                [],
                [],
            )
            for done in range(iterations)
        ]
        begun, finished = scheduler.complete(iterations)
        leap[-1].begun.extend(sorted(seq.request.id for seq in begun if not seq.announced))
        for seq in begun:
            seq.announced = True
        leap[-1].finished.extend(sorted(seq.request.id for seq in finished))
        for seq in finished:
            del present[seq.request.id]
        steps += leap
        number += iterations
    return steps, scheduler


@each_workload_and_those_alike
@pytest.mark.parametrize("longest", [1, 7, FOREVER], ids=["stepping", "leaps-of-7", "leap"])
def test_every_iteration_schedules_what_vllm_does(vllm: Recorded, longest: int) -> None:
    steps, scheduler = replay(vllm, longest)
    for ours, theirs in zip(steps, vllm.steps, strict=True):
        assert ours == theirs
    if scheduler.cache is not None:
        assert scheduler.cache.queried_tokens == vllm.prefix_queries
        assert scheduler.cache.hit_tokens == vllm.prefix_hits


@each_workload
@pytest.mark.parametrize("engine", ["stepping", "leap"])
def test_a_whole_run_has_vllms_times_and_its_state_in_between(
    vllm: Recorded, engine: Literal["stepping", "leap"]
) -> None:
    """Iterations take one second, so a step's number is its start; reports come in its middle too."""
    log, _ = run(
        vllm.requests,
        instance(models={"m": vllm.profile}),
        vllm.config,
        engine=engine,
        report_interval_s=0.5,
    )
    steps = vllm.steps
    assert log.first_tokens() == {each: step.number + 1.0 for step in steps for each in step.begun}
    assert log.finishes() == {each: step.number + 1.0 for step in steps for each in step.finished}
    blocks = vllm.profile.kv_capacity_tokens // vllm.config.block_size
    preemptions = accumulate(step.preemptions for step in steps)
    assert {
        now: (round(report.kv_utilization * blocks), report.waiting, report.preemptions)
        for now, report in log.reports()
        if now % 1.0 and report.running
    } == {
        step.number + 0.5: (step.blocks, step.waiting, preempted)
        for step, preempted in zip(steps, preemptions, strict=True)
    }


def test_the_traces_cover_what_the_rules_are_about() -> None:
    """Both policies preempt, prompts come in chunks, requests are cut short by the longest context."""
    for policy in ("fcfs", "priority"):
        steps = [step for each in WORKLOADS if each.config.scheduling_policy == policy for step in each.steps]
        assert sum(step.preemptions for step in steps) > 100
        chunked = (name for step in steps for name, tokens in step.tokens.items() if tokens > 1)
        prompts = sum(len(step.begun) for step in steps)
        assert sum(1 for _ in chunked) > 2 * prompts
    assert any(
        np.max(each.requests.prompt_tokens + each.requests.output_tokens) > each.profile.max_model_len
        for each in WORKLOADS
    )


def test_those_alike_cover_prefix_caching() -> None:
    """Under both policies prefixes are found, requests are preempted, and aborted ones come back."""
    for policy in ("fcfs", "priority"):
        those = [each for each in ALIKE if each.config.scheduling_policy == policy]
        assert sum(each.prefix_hits for each in those) > 0.1 * sum(each.prefix_queries for each in those)
        assert sum(step.preemptions for each in those for step in each.steps) > 50
        assert sum(len(each.evictions) for each in those) > 100
    assert {each.config.watermark for each in ALIKE} == {0.0, 0.05}
