"""The script for real GPUs, as far as a CPU goes: from its flags to its page, with fake vLLM servers."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
SERVER = f"""
import argparse, os, sys
sys.path.insert(0, {str(ROOT)!r})
from live.cli import main

parser = argparse.ArgumentParser()
for flag in ("host", "port", "model", "served-model-name", "max-num-seqs", "max-model-len"):
    parser.add_argument("--" + flag, required=True)
for flag in ("max-num-batched-tokens", "gpu-memory-utilization", "load-format"):
    parser.add_argument("--" + flag)
for flag in ("enable-sleep-mode", "disable-uvicorn-access-log"):
    parser.add_argument("--" + flag, action="store_true")
args = parser.parse_args()
assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
assert float(args.gpu_memory_utilization) == 0.45
model = args.model + "/config.json"
flags = ["--host", args.host, "--port", args.port, "--served-model-name", args.served_model_name]
sys.exit(main(["fake-engine", model, *flags, "--gpu", "H200", "--max-num-seqs", args.max_num_seqs]))
"""


def test_two_engines_share_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        "# What the script asks of an interpreter that has vLLM: its version, and its server.\n"
        f'[ "$1" = -c ] && echo 0.0.0 && exit\nshift 2\nexec {sys.executable} {tmp_path}/server.py "$@"\n'
    )
    python.chmod(0o755)
    models = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA))
        models += ["--model", f"{name}={tmp_path / name}"]
    flags = ["--seconds", "4", "--measuring-seconds", "10", "--out", str(tmp_path / "out")]
    script = [sys.executable, str(ROOT / "experiments/gpu/live_gpu.py"), "--vllm-python", str(python)]
    done = subprocess.run([*script, *models, *flags], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out/live_gpu.json").read_text())
    assert [run["policy"] for run in told["runs"]] == ["vllm", "qlm"]
    assert all(not run["failed"] for run in told["runs"])
    for run in told["runs"]:
        assert run["figures"]["throughput_rps"]["live"] > 0
        # An H200's shipped profile is what the fake servers play.
        assert abs(run["figures"]["e2e_s.mean"]["error"]) < 0.5
    assert "vLLM 0.0.0; 2 engines on 1 x" in (tmp_path / "out/live_gpu.md").read_text()
