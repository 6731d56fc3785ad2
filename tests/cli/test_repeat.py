"""``qlm-sim replay --repeat``: means over seeds, with confidence."""

import json
from pathlib import Path

import numpy as np
import pytest

from qlm_sim.cli import main

RUN = "replay --requests 60 --rate 6 --policy vllm --policy edf --quiet"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def policies(flags: str) -> dict:
    assert main(f"{RUN} --out o {flags}".split()) == 0
    return json.loads(Path("o/summary.json").read_text())["policies"]


def test_figures_are_means_over_the_seeds_with_confidence_beside() -> None:
    repeated = policies("--repeat 3")
    single = [policies(f"--seed {seed}") for seed in (0, 1, 2)]
    for name in ("vllm", "edf"):
        means = [each[name]["ttft_s"]["mean"] for each in single]
        assert repeated[name]["ttft_s"]["mean"] == pytest.approx(np.mean(means), rel=1e-6)
        half_width = 4.303 * np.std(means, ddof=1) / 3**0.5
        assert repeated[name]["ci95"]["ttft_s"]["mean"] == pytest.approx(half_width, rel=1e-3)
        assert repeated[name]["repeats"] == 3
        assert "ci95" not in single[0][name]


def test_the_table_shows_the_confidence(capsys: pytest.CaptureFixture[str]) -> None:
    policies("--repeat 2")
    repeated = capsys.readouterr().out
    policies("")
    assert "±" in repeated
    assert "±" not in capsys.readouterr().out


def test_no_repeat_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN.split(), "--repeat", "0"]) == 2
    assert "--repeat: found 0, expected a whole number at least 1" in capsys.readouterr().err


def test_the_report_says_that_figures_are_means_of_seeds() -> None:
    policies("--repeat 2")
    assert "Means over 2 runs of each policy" in Path("o/report.html").read_text()
