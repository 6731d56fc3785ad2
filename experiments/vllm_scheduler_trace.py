"""Records what vLLM's own V1 scheduler does on small random workloads: the oracle of the simulated engine.

Run from the repository's root with the Python of an environment that has vLLM 0.32 (the CPU build does;
no GPU, no weights):

    python experiments/vllm_scheduler_trace.py tests/cluster/data/vllm_scheduler_traces.json.gz
    python experiments/vllm_scheduler_trace.py --prefix-caching \
        tests/cluster/data/vllm_prefix_caching_traces.json.gz

No model runs. Each workload gets a fresh ``Scheduler``; requests are added at their steps, ``schedule()``
composes the step, and ``update_from_output`` receives one made-up token for each request whose tokens are
then all computed. Scheduling is synchronous, without speculation or KV connectors. A step in which vLLM
computes nothing, because all that could run was preempted, counts as part of the next.
The same vLLM gives the same bytes.

With --prefix-caching requests begin alike: system prompts, conversations whose turns hold the turns before,
their answers too, and prompts that come twice. Some are aborted in the midst of it and come back with what
they have generated as a part of their prompt.

The file: ``vllm`` (version), ``seed``, and ``workloads``, each with the vLLM settings (``num_gpu_blocks``
includes the one block that vLLM keeps for itself), ``requests`` as rows of step of arrival (also the
arrival time), prompt tokens, output tokens and priority, and ``steps``, each [step, {request: tokens},
KV blocks in use, requests that wait, preemptions, [requests with their first token], [finished]]. Steps
at which no request is there are absent. The request of row 7 is "r07".

With --prefix-caching a workload also has ``content`` (see qlm_sim.workload.content) of each request,
``evictions`` as rows of step, row and the step at which it comes back (ignored where it is not there), and
``prefix_queries`` and ``prefix_hits`` in tokens, as vLLM counts them.
"""

import argparse
import gzip
import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import torch  # type: ignore[import-not-found]
import vllm  # type: ignore[import-not-found]
from vllm.config import (  # type: ignore[import-not-found]
    CacheConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams  # type: ignore[import-not-found]
from vllm.utils.hashing import sha256  # type: ignore[import-not-found]
from vllm.v1.core.kv_cache_utils import (  # type: ignore[import-not-found]
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.scheduler import Scheduler  # type: ignore[import-not-found]
from vllm.v1.kv_cache_interface import (  # type: ignore[import-not-found]
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.outputs import ModelRunnerOutput  # type: ignore[import-not-found]
from vllm.v1.request import Request, RequestStatus  # type: ignore[import-not-found]
from vllm.v1.structured_output import StructuredOutputManager  # type: ignore[import-not-found]

Hasher = Any
"""A function of vLLM's that computes the hashes of a request's full blocks."""

SEED = 20260
WORKLOADS = 60
BLOCK_SIZE = 16
TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "vocab_size": 128,
    "torch_dtype": "float32",
}


def draw_workload(rng: np.random.Generator, number: int) -> dict[str, Any]:
    """Settings and requests. Two of three workloads are short of KV blocks, every second is by priority."""
    max_model_len = int(rng.choice([256, 384, 512]))
    max_num_seqs = int(rng.integers(2, 17))
    count = int(rng.integers(5, 31))
    prompts = rng.integers(1, min(300, max_model_len - 1) + 1, count)
    if rng.random() < 0.3:
        prompts = rng.integers(1, 49, count)
    outputs = rng.integers(1, 81, count)
    pace = float(rng.choice([0.0, 1.0, 5.0, 20.0]))
    arrivals = np.cumsum(rng.poisson(pace, count))
    priorities = rng.integers(0, int(rng.integers(1, 6)), count)
    contexts = np.minimum(prompts + outputs, max_model_len)
    least = -(-int(contexts.max()) // BLOCK_SIZE)
    blocks = least + int(rng.integers(0, least // 2 + 1)) if number % 3 else 1000
    return {
        "policy": "fcfs" if number % 2 else "priority",
        "scheduler_reserve_full_isl": bool(rng.integers(2)),
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max(max_num_seqs, int(rng.integers(16, 257))),
        "block_size": BLOCK_SIZE,
        "num_gpu_blocks": blocks + 1,
        "requests": np.column_stack([arrivals, prompts, outputs, priorities]).tolist(),
    }


def draw_alike(rng: np.random.Generator, number: int) -> dict[str, Any]:
    """A workload whose requests begin alike, short of KV blocks in three of four cases."""
    workload = draw_workload(rng, number)
    max_model_len = workload["max_model_len"]
    systems = rng.integers(8, 120, 3)
    lengths = [0] * int(rng.integers(2, 8))
    """Of each conversation until now."""
    content = []
    for row in workload["requests"]:
        system = int(rng.integers(3))
        talk = int(rng.integers(len(lengths)))
        kind = rng.random()
        text = ""
        if kind < 0.4:
            text = f"talk{talk}"
        elif kind < 0.7:
            row[1] = min(row[1] + int(systems[system]), max_model_len - 1)
            text = f"system{system}:{systems[system]}"
            if rng.random() < 0.5:
                text += f" talk{talk}"
        if kind < 0.4:
            row[1] = min(lengths[talk] + int(rng.integers(1, 60)), max_model_len - 1)
            lengths[talk] = row[1] + row[2]
            if rng.random() < 0.2:
                lengths[talk] = 0
        content.append(text)
    arrival, prompts, outputs, _ = np.array(workload["requests"]).T
    contexts = np.minimum(prompts + outputs, max_model_len)
    least = -(-int(contexts.max()) // BLOCK_SIZE)
    blocks = least + int(rng.integers(0, least // 4 + 1)) if number % 4 else 1000
    last = int(arrival.max()) + 100
    evictions = [
        [step, int(rng.integers(len(content))), step + int(rng.choice([0, 1, 5, 30]))]
        for step in sorted(rng.integers(0, last, int(rng.integers(0, 25))).tolist())
    ]
    return workload | {
        "num_gpu_blocks": blocks + 1,
        "watermark": float(rng.choice([0.0, 0.0, 0.05])),
        "enable_prefix_caching": True,
        "content": content,
        "evictions": evictions,
    }


def token_ids(request_id: str, content: str, count: int) -> list[int]:
    """The first tokens of a request: those of its streams, then its own."""
    ids: list[int] = []
    for word in [*content.split(), request_id]:
        stream, _, length = word.partition(":")
        left = count - len(ids)
        taken = min(left, int(length)) if length else left
        start = zlib.crc32(stream.encode()) & 0x3FFFFFFF
        ids += range(start, start + taken)
    return ids


def scheduler_for(workload: dict[str, Any], model_dir: str) -> Scheduler:
    config = VllmConfig(
        model_config=ModelConfig(
            model=model_dir,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=workload["max_model_len"],
        ),
        scheduler_config=SchedulerConfig(
            max_model_len=workload["max_model_len"],
            is_encoder_decoder=False,
            policy=workload["policy"],
            max_num_seqs=workload["max_num_seqs"],
            max_num_batched_tokens=workload["max_num_batched_tokens"],
            scheduler_reserve_full_isl=workload["scheduler_reserve_full_isl"],
            watermark=workload.get("watermark", 0.0),
            enable_chunked_prefill=True,
            async_scheduling=False,
        ),
        cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching="content" in workload),
    )
    config.cache_config.num_gpu_blocks = workload["num_gpu_blocks"]
    attention = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=4, head_size=16, dtype=torch.float32)
    return Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=workload["num_gpu_blocks"],
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], attention)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        log_stats=True,
    )


def new_request(workload: dict[str, Any], number: int, generated: int, hasher: Hasher | None) -> Request:
    """The request of that row, the tokens that it has generated already in its prompt."""
    arrival, prompt, output, priority = workload["requests"][number]
    content = workload["content"][number] if hasher else ""
    return Request(
        request_id=f"r{number:02}",
        prompt_token_ids=token_ids(f"r{number:02}", content, prompt + generated),
        sampling_params=SamplingParams(max_tokens=output - generated, ignore_eos=True),
        pooling_params=None,
        arrival_time=float(arrival),
        priority=priority,
        block_hasher=hasher,
    )


def trace(workload: dict[str, Any], scheduler: Scheduler) -> list[list[Any]]:
    """The steps that the scheduler takes until all requests are finished."""
    hasher = get_request_block_hasher(BLOCK_SIZE, sha256) if "content" in workload else None
    arriving = [(row[0], number, 0) for number, row in enumerate(workload["requests"])]
    evictions = list(workload.get("evictions", ()))
    tokens = [
        token_ids(f"r{number:02}", workload["content"][number] if hasher else "", row[1] + row[2])
        for number, row in enumerate(workload["requests"])
    ]
    pool = scheduler.kv_cache_manager.block_pool
    steps: list[list[Any]] = []
    step = queries = hits = 0
    while arriving or scheduler.has_unfinished_requests():
        if not scheduler.has_unfinished_requests():
            step = max(step, arriving[0][0])
        while evictions and evictions[0][0] <= step:
            _, number, back_at = evictions.pop(0)
            request = scheduler.requests.get(f"r{number:02}")
            if request is not None:
                prompt = workload["requests"][number][1]
                arriving.append((back_at, number, request.num_tokens - prompt))
                scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
        arriving.sort(key=lambda each: each[0])
        while arriving and arriving[0][0] <= step:
            _, number, generated = arriving.pop(0)
            scheduler.add_request(new_request(workload, number, generated, hasher))
        if not scheduler.has_unfinished_requests():
            continue
        preemptions = 0
        while True:
            scheduled = scheduler.schedule()
            preemptions += len(scheduled.preempted_req_ids)
            if scheduled.num_scheduled_tokens:
                break
            scheduler.update_from_output(scheduled, ModelRunnerOutput(req_ids=[], req_id_to_index={}))
        # One block of the pool is never given to a request.
        used = workload["num_gpu_blocks"] - 1 - pool.get_num_free_blocks()
        waiting = scheduler.get_request_counts()[1]
        chunks = scheduled.num_scheduled_tokens
        ids = sorted(chunks)
        sampled = [each for each in ids if not scheduler.requests[each].is_prefill_chunk]
        begun = [each for each in sampled if scheduler.requests[each].num_output_tokens == 0]
        output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=[
                [tokens[int(each[1:])][scheduler.requests[each].num_tokens]] if each in sampled else []
                for each in ids
            ],
        )
        results = scheduler.update_from_output(scheduled, output)
        finished = [
            each.request_id
            for outputs in results.values()
            for each in outputs.outputs
            if each.finish_reason is not None
        ]
        for outputs in results.values():
            if hasher and outputs.scheduler_stats is not None:
                queries += outputs.scheduler_stats.prefix_cache_stats.queries
                hits += outputs.scheduler_stats.prefix_cache_stats.hits
        in_order = {request_id: chunks[request_id] for request_id in ids}
        steps.append([step, in_order, used, waiting, preemptions, begun, sorted(finished)])
        step += 1
    if hasher:
        workload |= {"prefix_queries": queries, "prefix_hits": hits}
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path, help="the .json.gz to write")
    parser.add_argument(
        "--prefix-caching", action="store_true", help="requests that begin alike, and evictions"
    )
    args = parser.parse_args()
    file: Path = args.file
    draw = draw_alike if args.prefix_caching else draw_workload
    init_none_hash(sha256)
    rng = np.random.default_rng(SEED)
    workloads = []
    with tempfile.TemporaryDirectory() as model_dir:
        Path(model_dir, "config.json").write_text(json.dumps(TINY_LLAMA), encoding="utf-8")
        for number in range(WORKLOADS):
            workload = draw(rng, number)
            workload["steps"] = trace(workload, scheduler_for(workload, model_dir))
            workloads.append(workload)
    content = {"vllm": vllm.__version__, "seed": SEED, "workloads": workloads}
    text = json.dumps(content, separators=(",", ":"))
    file.write_bytes(gzip.compress(text.encode(), mtime=0))
    steps = [step for workload in workloads for step in workload["steps"]]
    print(
        f"{len(workloads)} workloads, {len(steps)} steps, {sum(step[4] for step in steps)} preemptions, "
        f"{len(file.read_bytes())} bytes"
    )


if __name__ == "__main__":
    main()
