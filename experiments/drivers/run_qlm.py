"""Runs a Mooncake trace through QLM and prints one line of JSON: seconds, MiB, and what it predicts.

    python run_qlm.py TRACE '{"policy": "vllm", "replicas": 4}'

``loop_s`` is ``replay()`` on a trace that is read: building the requests and the summary count.
"""

import json
import sys
from time import perf_counter

from qlm_sim.config import load_scenario
from qlm_sim.replay import replay
from qlm_sim.workload.readers import read_trace

path, settings = sys.argv[1], json.loads(sys.argv[2])
scenario = load_scenario(
    "multi-model",
    {
        "cluster": [{"gpu": "A100-80", "count": settings["replicas"], "models": ["llama-2-7b"]}],
        "mix": [{"model": "llama-2-7b", "slo_class": "interactive", "share": 1.0}],
        "engine.max_model_len": 4096,
        "scheduler.policies": [settings["policy"]],
        "workload.arrivals": "trace",
        "workload.rate_rps": None,
        "workload.requests": None,
    },
)
trace = read_trace(path, warn=lambda note: None)
began = perf_counter()
(run,) = replay(scenario, trace=trace)
loop_s = perf_counter() - began
summary = run.summary
with open("/proc/self/status") as status:
    peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(
    json.dumps(
        {
            "loop_s": loop_s,
            "peak_mib": peak_kib / 1024,
            "finished": summary["finished"],
            "throughput_rps": summary["throughput_rps"],
            "ttft_mean_s": summary["ttft_s"]["mean"],
            "ttft_p99_s": summary["ttft_s"]["p99"],
            "e2e_mean_s": summary["e2e_s"]["mean"],
            "e2e_p99_s": summary["e2e_s"]["p99"],
        }
    )
)
