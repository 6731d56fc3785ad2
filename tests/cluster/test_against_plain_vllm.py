"""The engine against vLLM V1's scheduling loop written out plainly: lists, one block table, one step at
a time, nothing shared with the engine."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.lab import Push, Step, instance, run, workload
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_sim.models.engine_config import EngineConfig


@dataclass(eq=False)
class Plain:
    name: str
    arrival: float
    priority: float
    prompt: int
    output: int
    tokens: int = 0
    """Prompt and generated."""
    computed: int = 0
    blocks: int = 0
    decoding: bool = False
    first: float = -1.0
    finished: float = -1.0

    def rank(self) -> tuple[float, float, str]:
        return self.priority, self.arrival, self.name


def plain_vllm(
    requests: Sequence[Plain],
    step: Step,
    *,
    total_blocks: int,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    by_priority: bool,
    reserve_full_isl: bool,
) -> int:
    """Sets first and finished of each request; returns how many preemptions there were."""
    coming = sorted(requests, key=lambda r: r.arrival)
    waiting: list[Plain] = []
    running: list[Plain] = []
    now = 0.0
    preemptions = 0

    def blocks_for(tokens: int) -> int:
        return (tokens + block_size - 1) // block_size

    def free_blocks() -> int:
        return total_blocks - sum(r.blocks for r in running)

    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, coming[0].arrival)
        while coming and coming[0].arrival <= now:
            request = coming.pop(0)
            request.tokens = request.prompt
            waiting.append(request)

        budget = max_num_batched_tokens
        scheduled: dict[str, int] = {}
        preempted = False
        index = 0
        while index < len(running) and budget > 0:
            request = running[index]
            new = min(request.tokens - request.computed, budget)
            needed = blocks_for(request.computed + new) - request.blocks
            fits = True
            while needed > free_blocks():
                preempted = True
                preemptions += 1
                if by_priority:
                    victim = max(running, key=lambda r: (r.priority, r.arrival))
                    running.remove(victim)
                    if victim.name in scheduled:
                        budget += scheduled.pop(victim.name)
                        index -= 1
                else:
                    victim = running.pop()
                victim.blocks = victim.computed = 0
                victim.decoding = False
                waiting.insert(0, victim)
                if victim is request:
                    fits = False
                    break
            if not fits:
                break
            request.blocks += needed
            scheduled[request.name] = new
            budget -= new
            index += 1
        while waiting and not preempted and budget > 0 and len(running) < max_num_seqs:
            if by_priority:
                waiting.sort(key=Plain.rank)
            request = waiting[0]
            new = min(request.tokens, budget)
            if blocks_for(request.tokens if reserve_full_isl else new) > free_blocks():
                break
            running.append(waiting.pop(0))
            request.blocks = blocks_for(new)
            scheduled[request.name] = new
            budget -= new

        if not scheduled:
            continue
        tokens = sequences = kv_tokens = pairs = 0
        for request in running:
            new = scheduled.get(request.name, 0)
            tokens += new
            sequences += new > 0
            if request.decoding and new:
                kv_tokens += request.computed + 1
            else:
                pairs += sum(range(request.computed + 1, request.computed + new + 1))
        now += (
            step.base_s(tokens)
            + step.seq_s * sequences
            + step.kv_token_s * kv_tokens
            + step.prefill_pair_s * pairs
        )
        for request in running[:]:
            request.computed += scheduled.get(request.name, 0)
            if request.computed == request.tokens and request.name in scheduled:
                request.tokens += 1
                request.decoding = True
                if request.first < 0:
                    request.first = now
                if request.tokens == request.prompt + request.output:
                    request.finished = now
                    running.remove(request)
    return preemptions


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3000).map(lambda n: n / 1024), st.integers(1, 90), st.integers(1, 90)),
        min_size=1,
        max_size=16,
    ).map(sorted),
    slos=st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=16, max_size=16),
    block_size=st.sampled_from([1, 4, 16]),
    kv_tokens=st.integers(200, 500),
    max_num_seqs=st.integers(1, 8),
    max_num_batched_tokens=st.integers(8, 64),
    by_priority=st.booleans(),
    reserve_full_isl=st.booleans(),
)
def test_same_times_and_preemptions(
    rows: list[tuple[float, int, int]],
    slos: list[float],
    block_size: int,
    kv_tokens: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    by_priority: bool,
    reserve_full_isl: bool,
) -> None:
    step = Step()
    width = len(str(len(rows) - 1))
    requests = [
        Plain(f"r{i:0{width}}", arrival, arrival + slo, prompt, output)
        for i, ((arrival, prompt, output), slo) in enumerate(zip(rows, slos, strict=False))
    ]
    preemptions = plain_vllm(
        requests,
        step,
        total_blocks=kv_tokens // block_size,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        by_priority=by_priority,
        reserve_full_isl=reserve_full_isl,
    )
    spec = instance(
        step=step,
        kv_capacity_tokens=kv_tokens,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    config = EngineConfig(
        block_size=block_size,
        scheduling_policy="priority" if by_priority else "fcfs",
        scheduler_reserve_full_isl=reserve_full_isl,
    )
    log, _ = run(workload(rows, slo_s=slos[: len(rows)]), spec, config, Push([spec]))
    assert log.first_tokens() == {r.name: r.first for r in requests}
    assert log.finishes() == {r.name: r.finished for r in requests}
    assert log.reports()[-1][1].preemptions == preemptions
