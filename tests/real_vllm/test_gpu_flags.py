"""The flags that the script for real GPUs gives its servers, as vLLM reads them."""

import argparse
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs real vLLM: make test-vllm")

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments/gpu"))
from live_gpu import server_flags

pytestmark = pytest.mark.vllm


def test_vllm_knows_every_flag() -> None:
    ours = argparse.Namespace(max_model_len=8192, max_num_seqs=256, real_weights=False)
    given = ["--model", "a", "--served-model-name", "a", *server_flags(ours, engines_on_a_gpu=2)]
    read = make_arg_parser(FlexibleArgumentParser()).parse_args(given)
    assert read.enable_sleep_mode
    assert (read.max_model_len, read.max_num_seqs, read.max_num_batched_tokens) == (8192, 256, 8192)
    assert (read.gpu_memory_utilization, read.load_format) == (0.45, "dummy")
