"""QLM and other simulators, each run in a process and an environment of its own.

What the experiments that compare them share: the yardstick's requests, the environments, and one run of one
simulator. Environments are made once, under $XDG_CACHE_HOME/qlm (default ~/.cache/qlm); nothing of
another project is copied into this one.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlm_sim.config import load_scenario
from qlm_sim.config.instances import instances
from qlm_sim.core.types import ModelOnInstance
from qlm_sim.errors import InputError
from qlm_sim.workload.readers import read_trace

DRIVERS = Path(__file__).parent / "drivers"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qlm"
LONGEST = 4096
"""Most tokens of prompt and output together: Llama-2's context."""
MODEL = "llama-2-7b"
DYNAMO = "1.6.1"
VIDUR = "0.0.26"
INSTALL_TIMEOUT_S = 900
RUN_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Outcome:
    """One run of one simulator, in a process of its own."""

    process_s: float
    """Wall-clock seconds of the whole process: start, imports, trace, run, summary."""
    cpu_s: float
    """Processor seconds of the same."""
    loop_s: float
    """Wall-clock seconds of the simulation alone, as the simulator's driver tells it."""
    peak_mib: float
    finished: int
    throughput_rps: float
    """Requests per simulated second, from the first arrival to the last finish."""
    ttft_mean_s: float
    ttft_p99_s: float
    e2e_mean_s: float
    e2e_p99_s: float


class Unavailable(InputError):
    """A simulator that could not be installed or did not run, and why, in one line."""


@dataclass(frozen=True)
class Simulator:
    """How to run one: title, interpreter, driver, and the driver's settings."""

    title: str
    python: str
    driver: str
    settings: Mapping[str, Any]
    most_rounds: int = 99
    """How often it is worth the wait."""

    def run(self, trace: Path) -> Outcome:
        """The outcome on this trace. Raises Unavailable."""
        command = [self.python, str(DRIVERS / self.driver), str(trace), json.dumps(self.settings)]
        # Modules are compiled once, as those of an installed package are.
        left_out = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
        environment = {name: value for name, value in os.environ.items() if name not in left_out}
        if self.driver == "run_qlm.py":
            environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        before, began = os.times(), time.perf_counter()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, env=environment
            )
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{self.title}: not done after {RUN_TIMEOUT_S:,} s") from None
        process_s, after = time.perf_counter() - began, os.times()
        if done.returncode:
            raise Unavailable(f"{self.title}, on {trace.stem}: {last_line(done.stderr)}")
        told = json.loads(done.stdout.splitlines()[-1])
        cpu_s = sum(after[2:4]) - sum(before[2:4])
        return Outcome(process_s=process_s, cpu_s=cpu_s, **told)


def qlm(policy: str, replicas: int) -> Simulator:
    """This checkout, under one of its policies."""
    return Simulator(f"QLM, {policy}", sys.executable, "run_qlm.py", {"policy": policy, "replicas": replicas})


def dynamo(replicas: int, step_times: Path | None = None) -> Simulator:
    """Dynamo's offline replay with the engine settings and KV capacity of QLM's scenario.

    Its own step times are a polynomial that knows no model and no GPU; ``step_times`` (see
    ``write_step_times``) gives it QLM's. Raises Unavailable.
    """
    model = yardstick_model()
    engine: dict[str, Any] = {
        "num_gpu_blocks": model.kv_capacity_tokens // 16,
        "block_size": 16,
        "max_num_seqs": model.max_num_seqs,
        "max_num_batched_tokens": model.max_num_batched_tokens,
        "max_model_len": LONGEST,
        "enable_prefix_caching": False,
    }
    if step_times is not None:
        profile = {"provider": "dynamo_profile", "config": {"path": str(step_times)}}
        engine["timing_model"] = {"type": "external"} | profile
    # --no-deps: its other dependencies are of its servers, and some are not on PyPI.
    packages = [f"ai-dynamo=={DYNAMO}", f"ai-dynamo-runtime=={DYNAMO}", "typing-extensions"]
    python = environment(f"dynamo-{DYNAMO}", ["--no-deps", *packages])
    title = f"Dynamo {DYNAMO}, " + ("its own step times" if step_times is None else "QLM's step times")
    return Simulator(title, python, "run_dynamo.py", {"replicas": replicas, "engine": engine})


def vidur(replicas: int, step_times: Path) -> Simulator:
    """Vidur with QLM's step times (see ``write_step_times``), settings and KV capacity.

    Its own are trained on tables that its package does not hold. Raises Unavailable.
    """
    model = yardstick_model()
    settings = {
        "replicas": replicas,
        "num_blocks": model.kv_capacity_tokens // 16,
        "max_num_seqs": model.max_num_seqs,
        "max_num_batched_tokens": model.max_num_batched_tokens,
        "step_times": str(step_times.with_suffix(".json")),
    }
    python = environment(f"vidur-{VIDUR}", [f"vidur=={VIDUR}"])
    return Simulator(f"Vidur {VIDUR}, QLM's step times", python, "run_vidur.py", settings, most_rounds=1)


def environment(name: str, packages: Sequence[str]) -> str:
    """The interpreter of a virtual environment that holds the packages. Raises Unavailable."""
    folder = CACHE / name
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", *packages],
        ):
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise Unavailable(f"{name}: not installed after {INSTALL_TIMEOUT_S} s") from None
            except subprocess.CalledProcessError as error:
                raise Unavailable(f"{name}: not installed: {last_line(error.stderr)}") from None
        done.touch()
    return str(python)


def last_line(text: str) -> str:
    """What a tool says went wrong; of a failed assertion that says nothing, the assertion."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" ^~")]
    if lines and lines[-1] == "AssertionError":
        return lines[-2]
    return (lines or ["no word of why"])[-1]


def yardstick_model() -> ModelOnInstance:
    """Llama-2-7B on an A100-80, as QLM's profile knows it."""
    scenario = load_scenario(
        "multi-model",
        {
            "cluster": [{"gpu": "A100-80", "count": 1, "models": [MODEL]}],
            "mix": [{"model": MODEL, "slo_class": "interactive", "share": 1.0}],
            "engine.max_model_len": LONGEST,
        },
    )
    return instances(scenario)[0].models[MODEL]


def azure_trace() -> Path:
    shared = Path(os.environ.get("QLM_DATA", Path(__file__).parents[2] / "shared"))
    return shared / "data/azure_llm_2023/AzureLLMInferenceTrace_conv.csv"


def source_of_lengths() -> str:
    if azure_trace().exists():
        return "lengths of the Azure conversation trace"
    return "lognormal lengths of nearly the Azure conversation trace's means"


def write_requests(path: Path, count: int, rate_rps: float, seed: int) -> None:
    """A Mooncake trace of Poisson arrivals at ``rate_rps``, in which no two prompts share a block."""
    rng = np.random.default_rng(seed)
    if not azure_trace().exists():
        prompt = np.clip(rng.lognormal(np.log(959) - 0.5, 1.0, count), 8, 3500).astype(int)
        output = np.clip(rng.lognormal(np.log(283) - 0.32, 0.8, count), 2, LONGEST - prompt).astype(int)
    else:
        azure = read_trace(str(azure_trace()), warn=lambda note: None)
        pool = np.column_stack([azure.prompt_tokens, azure.output_tokens])
        pool = pool[pool.sum(axis=1) <= LONGEST]
        prompt, output = pool[rng.integers(len(pool), size=count)].T
    arrival_ms = np.cumsum(rng.exponential(1e3 / rate_rps, count))
    block = 0
    with path.open("w") as file:
        for at, tokens, answer in zip(arrival_ms.tolist(), prompt.tolist(), output.tolist(), strict=True):
            blocks = -(-tokens // 512)
            row = {"timestamp": at, "input_length": tokens, "output_length": answer}
            file.write(json.dumps(row | {"hash_ids": list(range(block, block + blocks))}) + "\n")
            block += blocks


def write_step_times(path: Path) -> None:
    """QLM's step times as lookup tables, for Dynamo (.npz) and beside them for Vidur (.json).

    Dynamo prices a step as a table of the prompt tokens it computes plus a table of its decodes (KV tokens
    in all, mean context). The first is what the prompt adds to a step that decodes 64 sequences, for under
    load nearly every step has both; a step that only computes prompts comes out 11 ms short.
    """
    model = yardstick_model()
    step, beside = model.step, 64
    prompt = np.arange(1, model.max_num_batched_tokens + 1)
    prefill_ms = [
        1e3
        * (
            step.base_s(tokens + beside)
            - step.base_s(beside)
            + step.seq_s
            + step.prefill_pair_s * tokens * (tokens + 1) / 2
        )
        for tokens in prompt.tolist()
    ]
    kv_tokens, context = np.linspace(1, model.kv_capacity_tokens, 200), np.linspace(1, LONGEST, 256)
    decode_ms = [
        [
            1e3 * (step.base_s(sequences) + step.seq_s * sequences + step.kv_token_s * tokens)
            for sequences in np.clip(np.rint(tokens / context), 1, model.max_num_seqs).astype(int).tolist()
        ]
        for tokens in kv_tokens
    ]
    coefficients = {
        "base_ms": [0.0] + [1e3 * step.base_s(tokens) for tokens in range(1, 2 * prompt[-1])],
        "seq_ms": 1e3 * step.seq_s,
        "kv_token_ms": 1e3 * step.kv_token_s,
        "prefill_pair_ms": 1e3 * step.prefill_pair_s,
    }
    path.with_suffix(".json").write_text(json.dumps(coefficients))
    np.savez(
        path,
        prefill_isl=prompt.astype(float),
        prefill_ttft_ms=np.array(prefill_ms),
        decode_active_kv_tokens=kv_tokens,
        decode_context_length=context,
        decode_itl=np.array(decode_ms),
    )
