"""Real vLLM engines on GPUs: measured, offered ShareGPT, simulated; qlm against FCFS dispatch.

    python experiments/gpu/live_gpu.py --vllm-python VENV/bin/python \
        --model llama-3.1-8b=configs/llama-3.1-8b --model qwen2.5-7b=configs/qwen2.5-7b --engines 1

Each engine is one GPU, on which a server for each model runs, all but one asleep (vLLM's sleep mode). A
model is a folder with its config.json and tokenizer; its weights are made up (``--load-format dummy``), which
gives true speeds, or read with ``--real-weights``. Writes live_gpu.md and live_gpu.json, and the profiles
that were measured. Everything but the flags is what experiments/live_cpu.py runs.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from live_vllm import Setup, measure, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", required=True, metavar="PYTHON", help="an interpreter that has vLLM")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER", help="repeatable")
    parser.add_argument("--engines", type=int, default=1, metavar="N", help="GPUs to use (default: 1)")
    parser.add_argument("--real-weights", action="store_true", help="read the weights; default: made up")
    parser.add_argument("--max-num-seqs", type=int, default=256, metavar="N")
    parser.add_argument("--max-model-len", type=int, default=8192, metavar="N")
    parser.add_argument("--load", type=float, default=1.15, help="arrivals over capacity (default: 1.15)")
    parser.add_argument("--seconds", type=float, default=120.0, help="arrivals last so long (default: 120)")
    parser.add_argument("--out", default="experiments/results", metavar="DIR")
    args = parser.parse_args()
    models = {}
    for text in args.model:
        name, _, folder = text.partition("=")
        if not (Path(folder) / "config.json").is_file():
            raise SystemExit(f"--model: found {text!r}, expected NAME=FOLDER with a config.json in it")
        models[name] = str(Path(folder).absolute())
    names = tuple(models)
    engines = {f"gpu-{n}": names[n % len(names) :] + names[: n % len(names)] for n in range(args.engines)}
    document = measure(
        Setup(
            python=args.vllm_python,
            models=models,
            engines=engines,
            flags=(
                *("--enable-sleep-mode", "--max-model-len", str(args.max_model_len)),
                *("--max-num-seqs", str(args.max_num_seqs), "--max-num-batched-tokens", "8192"),
                *(() if args.real_weights else ("--load-format", "dummy")),
                "--disable-uvicorn-access-log",
            ),
            env={"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1"},
            engine={"max_num_seqs": args.max_num_seqs, "max_model_len": args.max_model_len},
            slo=({"name": "interactive", "ttft_s": 5.0}, {"name": "batch", "ttft_s": 600.0}),
            scale=1.0,
            load=args.load,
            arriving_s=args.seconds,
            steady=("interactive", "batch"),
            engine_env={name: {"CUDA_VISIBLE_DEVICES": str(n)} for n, name in enumerate(engines)},
        )
    )
    gpus = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    ).stdout.splitlines()  # fmt: skip
    version = subprocess.run(
        [args.vllm_python, "-c", "import vllm; print(vllm.__version__)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()[-1]  # fmt: skip
    text = (
        f"vLLM {version} on {args.engines} x {gpus[0] if gpus else 'no GPU'}; {', '.join(names)} "
        f"{'with' if args.real_weights else 'without'} their weights; {document['rate_rps']:.1f} requests/s."
    )
    write(Path(args.out), "live_gpu", "Real vLLM on GPUs, live and simulated", text, document)


if __name__ == "__main__":
    main()
