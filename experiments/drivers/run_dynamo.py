"""Runs a Mooncake trace through Dynamo's replay, in its environment, and prints one line of JSON.

    python run_dynamo.py TRACE '{"replicas": 4, "engine": {...}}'

``loop_s`` is Dynamo's own ``wall_time_ms``: reading the trace does not count.
"""

import json
import sys

from dynamo.replay import run_trace_replay  # type: ignore[import-not-found]

path, settings = sys.argv[1], json.loads(sys.argv[2])
report = run_trace_replay(
    path, extra_engine_args={"engine": settings["engine"]}, num_workers=settings["replicas"]
)
summary = report.summary
with open("/proc/self/status") as status:
    peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(
    json.dumps(
        {
            "loop_s": summary["wall_time_ms"] / 1e3,
            "peak_mib": peak_kib / 1024,
            "finished": summary["completed_requests"],
            "throughput_rps": summary["request_throughput_rps"],
            "ttft_mean_s": summary["mean_ttft_ms"] / 1e3,
            "ttft_p99_s": summary["p99_ttft_ms"] / 1e3,
            "e2e_mean_s": summary["mean_e2e_latency_ms"] / 1e3,
            "e2e_p99_s": summary["p99_e2e_latency_ms"] / 1e3,
        }
    )
)
