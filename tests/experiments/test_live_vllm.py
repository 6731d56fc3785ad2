"""What the live demo offers its engines, and what it reads of their CPU time."""

import csv
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
from live_vllm import Burst, Setup, _cpu_s, _pooled_r2, _write_trace

from live.side_by_side import _accuracy

SETUP = Setup(
    python="python",
    models={"a": "", "b": ""},
    engines={"e0": ("a", "b"), "e1": ("b", "a")},
    flags=(),
    env={},
    engine={},
    slo=(),
    scale=0.1,
    load=0.25,
    arriving_s=200.0,
    steady=("interactive", "batch"),
    warm_up_s=100.0,
    warm_up_load=1.0,
    bursts=(Burst(150.0, "a", "batch", 40.0), Burst(150.0, "b", "batch", 20.0)),
)


def rows(setup: Setup, path: Path) -> list[dict[str, str]]:
    count = _write_trace(setup, 10.0, 1, path)
    with path.open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == count
    times = [float(row["arrival_s"]) for row in found]
    assert times == sorted(times)
    return found


def test_interactive_requests_come_in_the_warm_up_as_later(tmp_path: Path) -> None:
    steady = rows(replace(SETUP, bursts=()), tmp_path / "trace.csv")
    seen = Counter((row["slo_class"], float(row["arrival_s"]) < 100.0) for row in steady)
    for warm_up in (True, False):
        assert seen["interactive", warm_up] == pytest.approx(125, abs=45)  # four standard deviations
    assert seen["batch", True] == pytest.approx(875, abs=120)
    assert seen["batch", False] == pytest.approx(125, abs=45)


def test_files_that_come_at_one_time_are_taken_in_mixed(tmp_path: Path) -> None:
    found = rows(SETUP, tmp_path / "trace.csv")
    burst = [row["model"] for row in found if float(row["arrival_s"]) == 150.0]
    assert Counter(burst) == {"a": 200, "b": 100}
    assert 100 < sum(one != other for one, other in pairwise(burst)) < 170


def test_what_is_learnt_in_the_warm_up_holds_later(tmp_path: Path) -> None:
    found = rows(SETUP, tmp_path / "trace.csv")
    for model in SETUP.models:
        means = [
            mean(
                int(row["output_tokens"])
                for row in found
                if row["model"] == model
                and row["slo_class"] == "batch"
                and (float(row["arrival_s"]) < 100.0) == warm_up
            )
            for warm_up in (True, False)
        ]
        assert means[0] == pytest.approx(means[1], rel=0.03)


def test_r2_of_all_runs_is_that_of_all_requests_together() -> None:
    rng = np.random.default_rng(3)
    waited = [rng.uniform(0.0, longest, count) for longest, count in ((30.0, 200), (80.0, 50))]
    told = [each * rng.normal(1.1, 0.2, len(each)) for each in waited]
    parts = [_accuracy(each, mean, mean) for each, mean in zip(waited, told, strict=True)]
    whole = _accuracy(np.concatenate(waited), np.concatenate(told), np.concatenate(told))
    assert _pooled_r2(parts) == pytest.approx(whole["r2"])
    nobody = np.array([])
    assert _pooled_r2([*parts, _accuracy(nobody, nobody, nobody)]) == pytest.approx(whole["r2"])
    assert _pooled_r2([]) is None


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux tells")
def test_the_cpu_time_of_a_server_is_told() -> None:
    before = _cpu_s([os.getpid()])["servers"]
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    assert _cpu_s([os.getpid()])["servers"] - before == pytest.approx(0.2, abs=0.1)
