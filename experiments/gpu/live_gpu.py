"""Real vLLM engines on GPUs: measured, offered ShareGPT, simulated; qlm against FCFS dispatch.

    python experiments/gpu/live_gpu.py --vllm-python VENV/bin/python \
        --model llama-3.1-8b=configs/llama-3.1-8b --model qwen2.5-7b=configs/qwen2.5-7b --gpu H200

Engines share the GPUs evenly: by default two share one. On each engine a server for each model runs, all but
one asleep (vLLM's sleep mode). A model is a folder with its config.json and tokenizer; its weights are made
up (``--load-format dummy``), which gives true speeds, or read with ``--real-weights``. Writes live_gpu.md and
live_gpu.json, and the profiles that were measured. Everything but the flags is what experiments/live_cpu.py
runs. With fewer engines than models FCFS dispatch swaps at nearly every request, and takes hours.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path


def server_flags(args: argparse.Namespace, engines_on_a_gpu: int) -> list[str]:
    """Of every vLLM server."""
    flags = ["--enable-sleep-mode", "--disable-uvicorn-access-log"]
    flags += ["--max-model-len", str(args.max_model_len), "--max-num-seqs", str(args.max_num_seqs)]
    flags += ["--max-num-batched-tokens", "8192"]
    flags += ["--gpu-memory-utilization", f"{0.9 / engines_on_a_gpu:.2f}"]
    return flags if args.real_weights else [*flags, "--load-format", "dummy"]


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from live_vllm import Burst, Setup, measure, write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", required=True, metavar="PYTHON", help="an interpreter that has vLLM")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER", help="repeatable")
    parser.add_argument("--gpu", default="H200", metavar="G", help="the shipped profile (default: H200)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs to use (default: 1)")
    parser.add_argument("--engines", type=int, default=2, metavar="N", help="engines on them (default: 2)")
    parser.add_argument("--real-weights", action="store_true", help="read the weights; default: made up")
    parser.add_argument("--max-num-seqs", type=int, default=256, metavar="N")
    parser.add_argument("--max-model-len", type=int, default=8192, metavar="N")
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="engine seconds of each model's batch file, behind a warm-up of two thirds (default: 60)",
    )
    parser.add_argument(
        "--measuring-seconds",
        type=float,
        default=120.0,
        metavar="S",
        help="the engines are measured so long before (default: 120)",
    )
    parser.add_argument("--out", default="experiments/results", metavar="DIR")
    args = parser.parse_args()
    models = {}
    for text in args.model:
        name, _, folder = text.partition("=")
        if not (Path(folder) / "config.json").is_file():
            raise SystemExit(f"--model: found {text!r}, expected NAME=FOLDER with a config.json in it")
        models[name] = str(Path(folder).absolute())
    names = tuple(models)
    on_each = -(-args.engines // args.gpus)
    start = args.seconds * 2 / 3
    engines = {f"e{n}": names[n % len(names) :] + names[: n % len(names)] for n in range(args.engines)}
    document = measure(
        Setup(
            python=args.vllm_python,
            models=models,
            engines=engines,
            flags=server_flags(args, on_each),
            env={"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1"},
            engine={"gpu": args.gpu, "max_num_seqs": args.max_num_seqs, "max_model_len": args.max_model_len},
            slo=({"name": "interactive", "ttft_s": 5.0}, {"name": "batch", "ttft_s": 600.0}),
            scale=1.0,
            load=0.1,
            steady=("interactive", "batch"),
            warm_up_s=start,
            warm_up_load=0.85,
            bursts=tuple(Burst(start, name, "batch", args.seconds) for name in models),
            arriving_s=start + args.seconds,
            measuring_s=args.measuring_seconds,
            engine_env={n: {"CUDA_VISIBLE_DEVICES": str(i // on_each)} for i, n in enumerate(engines)},
            one_by_one=on_each > 1,
        )
    )
    gpus = []
    if shutil.which("nvidia-smi"):
        gpus = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=False,
        ).stdout.splitlines()  # fmt: skip
    version = subprocess.run(
        [args.vllm_python, "-c", "import vllm; print(vllm.__version__)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()[-1]  # fmt: skip
    text = (
        f"vLLM {version}; {args.engines} engines on {args.gpus} x {gpus[0] if gpus else 'no GPU'}; "
        f"{', '.join(names)} {'with' if args.real_weights else 'without'} their weights; ShareGPT, "
        f"{document['rate_rps']:.1f} requests/s, and after a warm-up of {start:.0f} s a file of batch work "
        f"for each model, {args.seconds:.0f} s of an engine each."
    )
    write(Path(args.out), "live_gpu", "Real vLLM on GPUs, live and simulated", text, document)


if __name__ == "__main__":
    main()
