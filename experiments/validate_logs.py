"""Holds the simulated engine against every real request log at hand, and prints a table.

    python experiments/validate_logs.py --data ../shared > experiments/results/validation.md

One log of vLLM 0.11 on H100 (blis/), two of LightLLM on A10G (vtc_a10g/), for which vLLM 0.4 stands in. Each
is also fitted to, as ``qlm-sim profile fit`` does it: what remains is not the profile's doing.
"""

import argparse
import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlm_sim.calibration.fit import Target, fit_factors
from qlm_sim.calibration.observations import Observation
from qlm_sim.models.deployment import deploy
from qlm_sim.models.engine_config import EngineConfig, default_limits
from qlm_sim.models.engines import load_engine
from qlm_sim.models.hardware import load_gpu
from qlm_sim.models.specs import load_model
from qlm_sim.validation.comparison import compare
from qlm_sim.validation.request_log import RequestLog, read_request_log
from qlm_sim.validation.simulated_log import simulate_log

TITLES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "E2E"}
BLIS = "blis/vllm0.11_h100_jan21-llama7b-train-1_requests.csv"
VTC = "vtc_a10g/FCFS_all_results_{}.jsonl.gz"
VTC_KV_TOKENS = 10_000
VTC_SEQUENCES = VTC_KV_TOKENS // 512
"""LightLLM admits a request only where its whole prompt and output (256 + 256) will fit beside others'."""


@dataclass(frozen=True)
class Case:
    title: str
    log: RequestLog
    gpu: str
    model: str
    engine: str
    settings: dict[str, int]


def cases(profiles: Path) -> Iterator[Case]:
    yield Case(
        "H100, Llama-2-7B, vLLM 0.11",
        read_request_log(str(profiles / BLIS)),
        "H100",
        "llama-2-7b",
        "vllm-0.11",
        {},
    )
    for kind in ("proportional", "overload"):
        yield Case(
            f"A10G, Llama-7B, LightLLM, {kind}",
            vtc_log(profiles / VTC.format(kind)),
            "A10G",
            "llama-2-7b",
            "vllm-0.4",
            {"num_gpu_blocks": VTC_KV_TOKENS // 16, "max_num_seqs": VTC_SEQUENCES},
        )


def vtc_log(path: Path) -> RequestLog:
    """One run of the VTC artifact: arrival, lengths, first token and end of every request."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        responses = json.loads(file.readline())["result"]["responses"]
    responses.sort(key=lambda each: each["req_time"])

    def column(name: str) -> np.ndarray:
        return np.array([each[name] for each in responses])

    ttft, e2e, output = (column(name) for name in ("first_token_latency", "request_latency", "output_len"))
    arrival = column("req_time")
    return RequestLog(
        path=path.name,
        arrival_s=arrival - arrival[0],
        prompt_tokens=column("prompt_len"),
        output_tokens=output,
        measured={"ttft_s": ttft, "tpot_s": (e2e - ttft) / (output - 1), "e2e_s": e2e},
    )


def target(case: Case) -> Target:
    model, gpu, version = load_model(case.model), load_gpu(case.gpu), load_engine(case.engine)
    config = EngineConfig(**(default_limits(gpu.title, gpu.memory_bytes.value) | case.settings))
    placed = deploy(model, gpu, 1, config, engine=version.name, storage_bytes_per_s=2e9)
    return Target(model, gpu, 1, version, config, placed)


def rows(case: Case) -> Iterator[str]:
    engine = target(case)
    fit = fit_factors(engine, [Observation(case.log)])
    server_s = engine.version.request_s.value
    shipped = simulate_log(case.log, engine.placed, engine.config, request_s=server_s)
    fitted = simulate_log(
        case.log, engine.with_factors(fit.factors), engine.config, request_s=server_s * fit.factors.request
    )
    for name, title in TITLES.items():
        ours = compare(case.log.measured[name], shipped.times[name])
        best = compare(case.log.measured[name], fitted.times[name])
        assert ours is not None
        assert best is not None
        figures = " | ".join(
            f"{ours['real'][each]:.4g} | {ours['error'][each]:+.1%}" for each in ("mean", "p50", "p90", "p99")
        )
        what = f"{case.title} ({len(case.log):,})" if title == "TTFT" else ""
        saturated = "yes" if shipped.saturated and title == "TTFT" else ""
        yield (
            f"| {what} | {saturated} | {title} | {figures} | {ours['mape']:.1%} "
            f"| {best['error']['mean']:+.1%} | {best['mape']:.1%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QLM_DATA", "../shared")))
    profiles = parser.parse_args().data / "profiles"
    print("# The simulated engine against real request logs\n")
    print(
        "Made by `python experiments/validate_logs.py > experiments/results/validation.md`. Seconds; errors"
    )
    print("errors of the simulation as shipped; the last two columns after a fit to the very log.\n")
    names = " | ".join(f"{each} | error" for each in ("mean", "p50", "p90", "p99"))
    print(f"| log (requests) | saturated | metric | {names} | MAPE | fitted: mean | fitted: MAPE |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for case in cases(profiles):
        print("\n".join(rows(case)), flush=True)
    print(NOTES)


NOTES = """
## Errors above 10 %

* H100: none. TTFT of single requests is off by 7.6 %: one that arrives waits for the iteration under way,
  and in which it comes is chance. The first request (274 ms, a warm-up) is in the log and in the figures.
* A10G: LightLLM is no vLLM. It runs 19 requests at once (10,000 KV tokens, 512 reserved for each), which
  max_num_seqs says to the simulation. Its own offline cost profile of this shape and GPU is met within 1 % in
  decoding and 9 % in prefill (profiles.md), yet its server takes 43.0 to 43.7 ms per token where we have
  40.3: what its router and HTTP processes add is in no engine version of ours. Arrivals outrun the server in
  both logs, so that an error in throughput becomes one in waiting. In `proportional` 2.25 requests/s arrive
  and 1.67 are served; the queue grows with the difference, and 9 % too much throughput shortens it by a
  third. After a fit TPOT is met within 3 %, E2E within 8 %.

No log of an RTX 4090 or of an A100 is at hand.
"""


if __name__ == "__main__":
    main()
