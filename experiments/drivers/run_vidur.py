"""Runs a Mooncake trace through Vidur, in its environment, and prints one line of JSON.

    python run_vidur.py TRACE '{"replicas": 4, "num_blocks": 7440, "step_times": "step_times.json"}'

Vidur trains its step times on tables that it downloads from Hugging Face: none are in the package, and there
are none for Llama-2-7B on A100. So it gets QLM's, in place of its trained predictions, and neither
training nor building the tables counts. Round robin over replicas, Sarathi's chunked prefill: of its
schedulers the nearest to vLLM V1's.
"""

import csv
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

trace, settings = Path(sys.argv[1]).resolve(), json.loads(sys.argv[2])
times = json.loads(Path(settings["step_times"]).read_text())
os.chdir(tempfile.mkdtemp())  # it writes its caches and outputs to where it is
os.environ["HF_HUB_OFFLINE"] = "1"

from vidur.config import SimulationConfig  # type: ignore[import-not-found] # noqa: E402
from vidur.execution_time_predictor.sklearn_execution_time_predictor import (  # type: ignore[import-not-found] # noqa: E402
    SklearnExecutionTimePredictor,
)
from vidur.simulator import Simulator  # type: ignore[import-not-found] # noqa: E402

logging.disable(logging.INFO)
GRANULARITY, LAYERS, LONGEST = 16, 32, 4096


def predictions(self: object) -> dict[str, dict[tuple[int, ...], float]]:
    """Milliseconds of one layer, keyed as the trained models' are."""
    tokens = range(1, len(times["base_ms"]))
    free = {(n,): 0.0 for n in tokens}
    names = (
        "attn_pre_proj attn_post_proj mlp_down_proj mlp_act attn_rope attn_kv_cache_save "
        "input_layernorm post_attention_layernorm add"
    )
    contexts = range(0, LONGEST + GRANULARITY, GRANULARITY)
    return dict.fromkeys(names.split(), free) | {
        "mlp_up_proj": {(n,): times["base_ms"][n] / LAYERS for n in tokens},
        "attn_decode": {
            (batch, context): batch * (times["seq_ms"] + times["kv_token_ms"] * context) / LAYERS
            for batch in range(1, settings["max_num_seqs"] + 1)
            for context in contexts
        },
        "attn_prefill": {
            (context, chunk): times["prefill_pair_ms"] * chunk * max(context - chunk / 2, chunk / 2) / LAYERS
            for context in contexts
            for chunk in range(32, settings["max_num_batched_tokens"] + 32, 32)
        },
    }


SklearnExecutionTimePredictor._load_predictions_from_hf = predictions

with trace.open() as lines, open("trace.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["Date", "Time", "PromptTokenCount", "CompletionTokenCount"])
    for line in lines:
        row = json.loads(line)
        writer.writerow(["2026-01-01", row["timestamp"] / 1e3, row["input_length"], row["output_length"]])
flags = {
    "cluster_config_num_replicas": settings["replicas"],
    "replica_config_model_name": "meta-llama/Llama-2-7b-hf",
    "replica_config_num_pipeline_stages": 1,
    "replica_config_tensor_parallel_size": 1,
    "cache_config_block_size": 16,
    "cache_config_num_blocks": settings["num_blocks"],
    "global_scheduler_config_type": "round_robin",
    "replica_scheduler_config_type": "sarathi",
    "sarathi_scheduler_config_batch_size_cap": settings["max_num_seqs"],
    "sarathi_scheduler_config_chunk_size": settings["max_num_batched_tokens"],
    "request_generator_config_type": "trace_replay",
    "trace_request_generator_config_trace_file": "trace.csv",
    "trace_request_generator_config_date": "2026-01-01",
    "trace_request_generator_config_prefill_scale_factor": 1,
    "trace_request_generator_config_time_scale_factor": 1,
    "execution_time_predictor_config_type": "random_forrest",
    "random_forrest_execution_time_predictor_config_kv_cache_prediction_granularity": GRANULARITY,
    "random_forrest_execution_time_predictor_config_prediction_max_tokens_per_request": LONGEST,
}
switches = ["no-metrics_config_write_metrics", "no-metrics_config_store_plots"]
sys.argv[1:] = [f"--{name}={value}" for name, value in flags.items()] + [f"--{name}" for name in switches]
config = SimulationConfig.create_from_cli_args()
simulator = Simulator(config)
requests = [event._request for _, event in simulator._event_queue]
began = perf_counter()
simulator.run()
loop_s = perf_counter() - began
ttft = np.array([request.prefill_completed_at - request.arrived_at for request in requests])
e2e = np.array([request.completed_at - request.arrived_at for request in requests])
last = max(request.completed_at for request in requests)
with open("/proc/self/status") as status:
    peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(
    json.dumps(
        {
            "loop_s": loop_s,
            "peak_mib": peak_kib / 1024,
            "finished": sum(request.completed for request in requests),
            "throughput_rps": len(requests) / (last - min(request.arrived_at for request in requests)),
            "ttft_mean_s": ttft.mean(),
            "ttft_p99_s": np.percentile(ttft, 99),
            "e2e_mean_s": e2e.mean(),
            "e2e_p99_s": np.percentile(e2e, 99),
        }
    )
)
