"""Learnt output lengths: the prior, the laws of censoring, and kinds that lean on each other."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from qlm_sim.estimator.lengths import (
    PRIOR_MEAN_TOKENS,
    LengthDistribution,
    LengthKind,
    OutputLengths,
    kind_of,
)

KIND = LengthKind("a", "chat", 7, 0)


@dataclass
class Running:
    generated: float = 1.0

    def tokens(self) -> float:
        return self.generated


def finish(lengths, kind, tokens, name="r"):
    lengths.began(name, kind, Running())
    lengths.ended(name, kind, tokens, finished=True)


def survival(distribution: LengthDistribution, tokens: float) -> float:
    return float(np.exp(distribution.log_survival(np.array([tokens]))[0]))


def test_before_anything_finished_the_prior_holds():
    assert OutputLengths().of_model("a").mean == pytest.approx(PRIOR_MEAN_TOKENS, rel=0.01)


@pytest.mark.parametrize("shape", ["geometric", "lognormal", "fixed"])
def test_the_prior_fades_behind_what_finished(shape):
    rng = np.random.default_rng(0)
    draws = {
        "geometric": rng.geometric(1 / 80, size=3000),
        "lognormal": np.ceil(rng.lognormal(5, 1, size=3000)).astype(int),
        "fixed": np.full(3000, 300),
    }[shape]
    lengths = OutputLengths()
    for tokens in draws.tolist():
        finish(lengths, KIND, tokens)
    learnt = lengths.of_model("a")
    assert learnt.mean == pytest.approx(draws.mean(), rel=0.03)
    assert learnt.second_moment == pytest.approx((draws.astype(float) ** 2).mean(), rel=0.06)
    for tokens in (30, 100, 400, 1000):
        assert survival(lengths.of_kind(KIND), tokens) == pytest.approx((draws > tokens).mean(), abs=0.03)


@pytest.mark.parametrize(("mean", "most"), [(30, 0.2), (100, 0.05), (2000, 0.05)])
def test_a_few_hundred_tell_of_lengths_far_from_the_prior(mean, most):
    errors = []
    for seed in range(10):
        draws = np.random.default_rng(seed).geometric(1 / mean, size=200)
        lengths = OutputLengths()
        for tokens in draws.tolist():
            finish(lengths, KIND, tokens)
        errors.append(lengths.of_model("a").mean / draws.mean() - 1)
    assert abs(np.mean(errors)) < most


def test_running_requests_keep_early_finishes_from_looking_typical():
    """Of 400 that start together the short ones finish first: their mean alone is far too low."""
    draws = np.random.default_rng(1).geometric(1 / 300, size=400)
    lengths = OutputLengths()
    running = {str(i): Running() for i in range(len(draws))}
    for name, request in running.items():
        lengths.began(name, KIND, request)
    for i, tokens in enumerate(draws.tolist()):
        if tokens <= 100:
            lengths.ended(str(i), KIND, tokens, finished=True)
        else:
            running[str(i)].generated = 100.0
    finished = draws[draws <= 100]
    assert finished.mean() < 60
    assert lengths.of_model("a").mean == pytest.approx(300, rel=0.2)


def test_a_file_of_work_does_not_seem_endless_before_its_first_end():
    lengths = OutputLengths()
    for number in range(256):
        lengths.began(f"r{number}", KIND, Running(100.0))
    assert lengths.of_model("a").mean == pytest.approx(100 + PRIOR_MEAN_TOKENS, rel=0.1)


def test_a_request_that_left_early_counts_as_longer_than_it_got():
    lengths = OutputLengths()
    for _ in range(500):
        finish(lengths, KIND, 200)
        lengths.began("r", KIND, Running())
        lengths.ended("r", KIND, 50, finished=False)
    assert lengths.of_model("a").mean == pytest.approx(200, rel=0.05)


def test_a_resumed_request_is_at_risk_from_where_it_goes_on():
    """Interrupted at 200 of 400 tokens or not: the same request, the same lesson."""
    whole, resumed = OutputLengths(), OutputLengths()
    for _ in range(300):
        finish(whole, KIND, 400)
        resumed.began("r", KIND, Running())
        resumed.ended("r", KIND, 200, finished=False)
        resumed.began("r", KIND, Running(), 200.0)
        resumed.ended("r", KIND, 400, finished=True)
    assert resumed.of_model("a").mean == pytest.approx(whole.of_model("a").mean, rel=0.02)


def test_classes_of_a_model_are_kept_apart():
    lengths = OutputLengths()
    for _ in range(1000):
        finish(lengths, LengthKind("a", "chat", 7, 0), 50)
        finish(lengths, LengthKind("a", "batch", 7, 0), 800)
    assert lengths.of_class("a", "chat").mean < 60 < lengths.of_model("a").mean
    assert lengths.of_class("a", "batch").mean > 700


def test_a_kind_not_seen_yet_is_taken_to_be_like_its_class():
    lengths = OutputLengths()
    for _ in range(2000):
        finish(lengths, KIND, 40)
    unseen = lengths.of_kind(KIND._replace(prompt_band=12))
    assert unseen.statistics.mean == pytest.approx(lengths.of_class("a", "chat").mean, rel=0.02)


def test_no_output_exceeds_its_cap(make_request):
    lengths = OutputLengths()
    capped = KIND._replace(cap_tokens=64)
    assert lengths.of_kind(capped).statistics.mean < 64
    assert survival(lengths.of_kind(capped), 80) < 1e-6
    assert kind_of(make_request("r")).cap_tokens == 0


def test_old_lessons_fade_when_the_workload_changes():
    lengths = OutputLengths()
    for _ in range(30_000):
        finish(lengths, KIND, 50)
    for _ in range(30_000):
        finish(lengths, KIND, 500)
    assert lengths.of_model("a").mean > 330


def test_one_giant_does_not_rule_the_second_moment():
    """One output of a hundred times the mean, in thousands, says little of how often such come."""
    rng = np.random.default_rng(2)
    draws = rng.geometric(1 / 300, size=3000)
    lengths = OutputLengths()
    for tokens in draws.tolist():
        finish(lengths, KIND, tokens)
    before = lengths.of_model("a").second_moment
    finish(lengths, KIND, 37_000)
    for tokens in rng.geometric(1 / 300, size=400).tolist():
        finish(lengths, KIND, tokens)
    assert lengths.of_model("a").second_moment == pytest.approx(before, rel=0.1)


def test_giants_that_keep_coming_are_believed():
    rng = np.random.default_rng(3)
    lengths = OutputLengths()
    draws = np.where(rng.random(6000) < 0.01, 20_000, rng.geometric(1 / 300, size=6000))
    for tokens in draws.tolist():
        finish(lengths, KIND, tokens)
    moment = (draws.astype(float) ** 2).mean()
    assert lengths.of_model("a").second_moment == pytest.approx(moment, rel=0.2)


def test_lengths_are_the_same_to_the_last_bit_on_every_kind_of_cpu():
    code = (
        "from qlm_sim.estimator.lengths import EDGES, LengthDistribution; import numpy as np; "
        "rng = np.random.default_rng(5); bins = len(EDGES) - 1; "
        "found = [LengthDistribution(rng.random(bins) / 9, rng.random(bins) * 999, 7.0) for _ in range(50)]; "
        "print([(each.moments, each.statistics) for each in found])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"OPENBLAS_CORETYPE": cpu}, capture_output=True
        )
        for cpu in ("Prescott", "Haswell", "SkylakeX")
    ]
    # Of a later kind than the machine's own, BLAS may use what this one has not.
    able = [run for run in runs if run.returncode != -signal.SIGILL]
    for run in able:
        assert run.returncode == 0, run.stderr
    assert len({run.stdout for run in able}) == 1
