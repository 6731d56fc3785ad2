"""Records what vLLM's own V1 scheduler does on small random workloads: the oracle of the simulated engine.

Run from the repository's root with the Python of an environment that has vLLM 0.32 (the CPU build does;
no GPU, no weights):

    python experiments/vllm_scheduler_trace.py tests/cluster/data/vllm_scheduler_traces.json.gz

No model runs. Each workload gets a fresh ``Scheduler``; requests are added at their steps, ``schedule()``
composes the step, and ``update_from_output`` receives one made-up token for each request whose tokens are
then all computed. Scheduling is synchronous, without prefix caching, speculation or KV connectors. A step
in which vLLM computes nothing, because all that could run was preempted, counts as part of the next.
The same vLLM gives the same bytes.

The file: ``vllm`` (version), ``seed``, and ``workloads``, each with the vLLM settings (``num_gpu_blocks``
includes the one block that vLLM keeps for itself), ``requests`` as rows of step of arrival (also the
arrival time), prompt tokens, output tokens and priority, and ``steps``, each [step, {request: tokens},
KV blocks in use, requests that wait, preemptions, [requests with their first token], [finished]]. Steps
at which no request is there are absent. The request of row 7 is "r07".
"""

import argparse
import gzip
import json
import os
import tempfile
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
from vllm.v1.core.sched.scheduler import Scheduler  # type: ignore[import-not-found]
from vllm.v1.kv_cache_interface import (  # type: ignore[import-not-found]
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.outputs import ModelRunnerOutput  # type: ignore[import-not-found]
from vllm.v1.request import Request  # type: ignore[import-not-found]
from vllm.v1.structured_output import StructuredOutputManager  # type: ignore[import-not-found]

SEED = 20260
WORKLOADS = 60
BLOCK_SIZE = 16
TOKEN = 7
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
            enable_chunked_prefill=True,
            async_scheduling=False,
        ),
        cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=False),
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
    )


def trace(workload: dict[str, Any], scheduler: Scheduler) -> list[list[Any]]:
    """The steps that the scheduler takes until all requests are finished."""
    arriving = [
        (
            arrival,
            Request(
                request_id=f"r{number:02}",
                prompt_token_ids=[TOKEN] * prompt,
                sampling_params=SamplingParams(max_tokens=output, ignore_eos=True),
                pooling_params=None,
                arrival_time=float(arrival),
                priority=priority,
            ),
        )
        for number, (arrival, prompt, output, priority) in enumerate(workload["requests"])
    ]
    arriving.reverse()
    pool = scheduler.kv_cache_manager.block_pool
    steps: list[list[Any]] = []
    step = 0
    while arriving or scheduler.has_unfinished_requests():
        if not scheduler.has_unfinished_requests():
            step = max(step, arriving[-1][0])
        while arriving and arriving[-1][0] <= step:
            scheduler.add_request(arriving.pop()[1])
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
        tokens = scheduled.num_scheduled_tokens
        ids = sorted(tokens)
        sampled = [each for each in ids if not scheduler.requests[each].is_prefill_chunk]
        begun = [each for each in sampled if scheduler.requests[each].num_output_tokens == 0]
        output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=[[TOKEN] if each in sampled else [] for each in ids],
        )
        results = scheduler.update_from_output(scheduled, output)
        finished = [
            each.request_id
            for outputs in results.values()
            for each in outputs.outputs
            if each.finish_reason is not None
        ]
        chunks = {request_id: tokens[request_id] for request_id in ids}
        steps.append([step, chunks, used, waiting, preemptions, begun, sorted(finished)])
        step += 1
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path, help="the .json.gz to write")
    file: Path = parser.parse_args().file
    rng = np.random.default_rng(SEED)
    workloads = []
    with tempfile.TemporaryDirectory() as model_dir:
        Path(model_dir, "config.json").write_text(json.dumps(TINY_LLAMA), encoding="utf-8")
        for number in range(WORKLOADS):
            workload = draw_workload(rng, number)
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
