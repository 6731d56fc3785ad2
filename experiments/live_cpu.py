"""Two real vLLM engines on CPU, two models: live and simulated, qlm against FCFS dispatch.

    make live-demo      # from nothing: installs real vLLM (2 GB), then this; under ten minutes on two cores

The models have 60 M parameters and random weights, made on the spot; each engine has a core to itself,
which it shares with its HTTP server, the gateway and the load generator. What these take of it for each
request is measured with the engines, and counts the less the larger the models are; much larger ones serve
too few requests in these minutes to learn their lengths from. Interactive requests come steadily for both
models, and at one time a file of batch work for each, so that both engines are at work, as they were when
measured: one alone is faster, as they share the memory's bandwidth. QLM_VLLM_PYTHON names another
interpreter that has vLLM, QLM_LIVE_SEEDS other seeds than 1 (``1,2``).
"""

import os
import platform
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from live_vllm import Burst, Setup, measure, write

ROOT = Path(__file__).parents[1]
MODELS = ("small-a", "small-b")
MAX_NUM_SEQS = 16
MAX_MODEL_LEN = 512
SHAPE = {
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "initializer_range": 0.02,
}
FLAGS = (
    *("--enforce-eager", "--distributed-executor-backend", "uni", "--kv-cache-memory-bytes", "512M"),
    *("--block-size", "32", "--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN)),
    *("--max-num-seqs", str(MAX_NUM_SEQS), "--max-num-batched-tokens", str(MAX_MODEL_LEN)),
    *("--worker-cls", "sleeping_worker.SleepingCPUWorker", "--disable-uvicorn-access-log"),
)
ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # for sleep
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT / "tests" / "real_vllm"),
}
KV_TOKENS = 17_472
"""As many as 512 MB hold."""
INTERACTIVE_S, BATCH_S = 5.0, 120.0
LOAD, BURST_ENGINE_S, SCALE = 0.1, 60.0, 0.08
"""A steady load that is small: waits in a backlog grow with an engine's slowness by the power 1 / (1 - LOAD),
and a virtual machine is not as fast from one minute to the next."""


def run(out: Path, quick: bool) -> None:
    """Write live_cpu.md and live_cpu.json to ``out``."""
    python = os.environ.get("QLM_VLLM_PYTHON", str(ROOT / ".venv-vllm/bin/python"))
    with tempfile.TemporaryDirectory(prefix="qlm-models-") as folder:
        models = {name: str(Path(folder) / name) for name in MODELS}
        code = "import sys; from pathlib import Path; from tiny_model import make_tiny_model\n"
        code += f"for seed, path in enumerate(sys.argv[1:]): make_tiny_model(Path(path), seed, **{SHAPE})"
        subprocess.run([python, "-c", code, *models.values()], env=os.environ | ENV, check=True)
        start = 12.0 if quick else 40.0
        burst_s = 10.0 if quick else BURST_ENGINE_S
        document = measure(
            Setup(
                python=python,
                models=models,
                engines={"e0": MODELS, "e1": MODELS[::-1]},
                cores={"e0": 0, "e1": 1} if (os.cpu_count() or 1) > 1 else None,
                flags=FLAGS,
                env=ENV,
                engine={
                    "max_num_seqs": MAX_NUM_SEQS,
                    "max_num_batched_tokens": MAX_MODEL_LEN,
                    "max_model_len": MAX_MODEL_LEN,
                    "block_size": 32,
                    "kv_tokens": KV_TOKENS,
                },
                slo=(
                    {"name": "interactive", "ttft_s": INTERACTIVE_S},
                    {"name": "batch", "ttft_s": BATCH_S},
                ),
                scale=SCALE,
                load=LOAD,
                steady=("interactive", "batch"),
                warm_up_s=start,
                warm_up_load=0.85,
                bursts=tuple(Burst(start + 3.0, name, "batch", burst_s) for name in MODELS),
                arriving_s=start + (20.0 if quick else 63.0),
                measuring_s=50.0,
                seeds=tuple(map(int, os.environ.get("QLM_LIVE_SEEDS", "1").split(","))),
            )
        )
    version = subprocess.run(
        [python, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    text = (
        f"Made by `make live-demo` on {datetime.now(UTC):%Y-%m-%d}: vLLM {version} on {os.cpu_count()} CPUs "
        f"({platform.machine()}). "
        "Two engines, each on a core of its own, each of which may serve two models of 60 M parameters; "
        f"ShareGPT lengths times {SCALE}, drawn so that outputs are as long in the warm-up as later. "
        f"{document['rate_rps']:.1f} requests/s come steadily, {LOAD} of what the engines can do by their "
        "profiles, half of them interactive "
        f"({INTERACTIVE_S:.0f} s to the first token), half batch ({BATCH_S:.0f} s), and at one time a file "
        f"of batch work for each model, {BURST_ENGINE_S:.0f} s of an engine each. Profiles from "
        "`qlm-live profile`, of both engines at the same time. Engines are simulated as fast as they were in "
        f"the first {start:.0f} s of each run, the warm-up, which is no part of the figures; nothing else is "
        "fitted to the runs."
    )
    write(out, "live_cpu", "Real vLLM on CPU, live and simulated", text, document)


if __name__ == "__main__":
    run(ROOT / "runs" / "live-demo", quick=False)
