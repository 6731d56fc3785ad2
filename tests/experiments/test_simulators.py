"""What other simulators are given: the same requests, and step times that are QLM's."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from qlm_sim.workload.readers import read_trace

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import simulators


def test_tables_price_a_mixed_step_as_qlm_does(tmp_path):
    simulators.write_step_times(tmp_path / "times.npz")
    tables = np.load(tmp_path / "times.npz")
    step = simulators.yardstick_model().step
    kv, context = tables["decode_active_kv_tokens"], tables["decode_context_length"]
    row, column = 120, 60
    sequences = round(kv[row] / context[column])
    decode_ms = tables["decode_itl"][row, column]
    assert decode_ms == pytest.approx(1e3 * step.iteration_s(sequences, sequences, kv[row], 0))
    for prompt in (200, 1000):
        whole_s = step.iteration_s(sequences + prompt, sequences + 1, kv[row], prompt * (prompt + 1) // 2)
        both_ms = decode_ms + np.interp(prompt, tables["prefill_isl"], tables["prefill_ttft_ms"])
        assert both_ms == pytest.approx(1e3 * whole_s, rel=0.03)


def test_prompts_share_no_block_and_arrive_at_the_rate(tmp_path):
    simulators.write_requests(tmp_path / "t.jsonl", 2_000, rate_rps=24.0, seed=3)
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    blocks = [block for row in rows for block in row["hash_ids"]]
    assert len(blocks) == len(set(blocks))
    assert all(len(row["hash_ids"]) == -(-row["input_length"] // 512) for row in rows)
    trace = read_trace(str(tmp_path / "t.jsonl"), warn=pytest.fail)
    assert 2_000 / trace.arrival_s[-1] == pytest.approx(24.0, rel=0.1)
    assert (trace.prompt_tokens + trace.output_tokens).max() <= simulators.LONGEST


def test_qlm_is_run_in_a_process_of_its_own(tmp_path):
    simulators.write_requests(tmp_path / "t.jsonl", 50, rate_rps=24.0, seed=0)
    outcome = simulators.qlm("vllm", 1).run(tmp_path / "t.jsonl")
    assert outcome.finished == 50
    assert 0 < outcome.loop_s < outcome.process_s
    assert outcome.ttft_mean_s < outcome.e2e_mean_s


def test_a_simulator_that_fails_says_why_in_one_line(tmp_path):
    with pytest.raises(simulators.Unavailable, match=r"absent\.jsonl"):
        simulators.qlm("vllm", 1).run(tmp_path / "absent.jsonl")
