"""Prefix caching from a trace file to the report, on conversations whose hits can be counted by hand."""

import json
from pathlib import Path

import pytest

from qlm_sim.cli import main
from qlm_sim.workload.readers import read_trace

BLOCK = 16
TURNS = 6


def conversations(path: Path) -> None:
    """Twelve conversations, 500 s between their turns: 300 more prompt tokens each, and 40 answered."""
    rows = ["arrival_s,prompt_tokens,output_tokens,content"]
    rows += [
        f"{turn * 500 + talk * 20},{300 + turn * 340},40,talk{talk}"
        for turn in range(TURNS)
        for talk in range(12)
    ]
    path.write_text("\n".join(rows) + "\n")


def by_hand() -> float:
    """A turn finds the whole blocks of what was computed before: all but the last answered token."""
    prompts = [300 + turn * 340 for turn in range(TURNS)]
    found = [0] + [(prompt + 39) // BLOCK * BLOCK for prompt in prompts[:-1]]
    return sum(found) / sum(prompts)


@pytest.fixture
def replay(tmp_path, capsys):
    conversations(tmp_path / "talks.csv")

    def run(*flags: str) -> tuple[dict, str, str]:
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        arguments = ["replay", str(tmp_path / "talks.csv"), "--arrivals", "trace", "--gpu", "A100-80"]
        arguments += ["--count", "1", "--model", "mistral-7b", "--policy", "vllm", "--out", str(out), *flags]
        assert main(arguments) == 0
        told = capsys.readouterr()
        figures = json.loads((out / "summary.json").read_text())["policies"]["vllm"]
        return figures, (out / "report.html").read_text(), told.out + told.err

    return run


def test_hit_rate_is_what_counting_by_hand_gives_and_first_tokens_come_earlier(replay):
    with_cache, report, table = replay("--enable-prefix-caching")
    without, plain_report, plain_table = replay()
    assert with_cache["prefix_cache_hit_rate"] == pytest.approx(by_hand(), rel=1e-6)
    assert without["prefix_cache_hit_rate"] is None
    share = f"{by_hand():.1%}"
    assert share in report
    assert share in table
    assert "prefix" not in plain_table
    assert "prefix" not in plain_report.partition("<table")[2].partition("</table")[0]
    # A prefill takes less than half as long where five of six turns compute a sixth of their prompt or less.
    assert with_cache["ttft_s"]["mean"] < 0.5 * without["ttft_s"]["mean"]
    assert with_cache["ttft_s"]["p50"] < 0.5 * without["ttft_s"]["p50"]


def test_a_trace_that_tells_nothing_is_told_of(replay, tmp_path):
    (tmp_path / "talks.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,300,5\n")
    figures, _, told = replay("--enable-prefix-caching")
    assert "does not tell which requests begin alike" in told
    assert figures["prefix_cache_hit_rate"] == 0.0
    assert read_trace(str(tmp_path / "talks.csv"), warn=pytest.fail).content is None
