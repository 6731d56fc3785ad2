"""Two real vLLM engines on CPU, two models: live and simulated, qlm against FCFS dispatch.

    make live-demo      # from nothing: installs real vLLM (2 GB), then this; about ten minutes on two cores

The models have 1.5 M parameters and random weights, made on the spot. QLM_VLLM_PYTHON names another
interpreter that has vLLM.
"""

import os
import subprocess
import tempfile
from pathlib import Path

from live_vllm import Setup, measure, write

ROOT = Path(__file__).parents[1]
MODELS = ("tiny-a", "tiny-b")
MAX_NUM_SEQS = 8
FLAGS = (
    *("--enforce-eager", "--distributed-executor-backend", "uni", "--kv-cache-memory-bytes", "64M"),
    *("--block-size", "32", "--dtype", "float32", "--max-model-len", "1024"),
    *("--max-num-seqs", str(MAX_NUM_SEQS), "--max-num-batched-tokens", "1024"),
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


def run(out: Path, quick: bool) -> None:
    """Write live_cpu.md and live_cpu.json to ``out``."""
    python = os.environ.get("QLM_VLLM_PYTHON", str(ROOT / ".venv-vllm/bin/python"))
    with tempfile.TemporaryDirectory(prefix="qlm-models-") as folder:
        models = {name: str(Path(folder) / name) for name in MODELS}
        code = "import sys; from pathlib import Path; from tiny_model import make_tiny_model\n"
        code += "for seed, path in enumerate(sys.argv[1:]): make_tiny_model(Path(path), seed)"
        subprocess.run([python, "-c", code, *models.values()], env=os.environ | ENV, check=True)
        document = measure(
            Setup(
                python=python,
                models=models,
                engines={"e0": MODELS, "e1": MODELS[::-1]},
                flags=FLAGS,
                env=ENV,
                engine={
                    "max_num_seqs": MAX_NUM_SEQS,
                    "max_num_batched_tokens": 1024,
                    "max_model_len": 1024,
                    "block_size": 32,
                    "kv_tokens": 16_384,
                },
                slo=({"name": "interactive", "ttft_s": 2.0}, {"name": "batch", "ttft_s": 120.0}),
                scale=0.15,
                load=1.15,
                arriving_s=20.0 if quick else 60.0,
            )
        )
    text = (
        "Made by `make live-demo`: two engines on one machine of two cores, each of which may serve two "
        f"models, {document['rate_rps']:.1f} requests/s (1.15 times the engines' capacity by their "
        "profiles), ShareGPT lengths times 0.15. Profiles from `qlm-live profile` on the idle engines. "
        "Interactive: 2 s to the first token, batch: 2 minutes."
    )
    write(out, "live_cpu", "Real vLLM on CPU, live and simulated", text, document)


if __name__ == "__main__":
    run(ROOT / "runs" / "live-demo", quick=False)
