"""The shipped profiles against measurements that took no part in their fits."""

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROFILES = Path(os.environ.get("QLM_DATA", ROOT.parent / "shared")) / "profiles"


@pytest.fixture(scope="module")
def checks():
    spec = importlib.util.spec_from_file_location(
        "check_profiles", ROOT / "experiments" / "check_profiles.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_published_time_is_met_within_ten_percent(checks):
    errors = {what: ours / measured - 1 for what, measured, ours, _ in checks.anchors()}
    assert len(errors) >= 9
    assert {what: error for what, error in errors.items() if abs(error) > 0.10} == {}


def test_kv_blocks_are_met_within_two_percent(checks):
    errors = {what: ours / measured - 1 for what, measured, ours, _ in checks.memory()}
    assert {what: error for what, error in errors.items() if abs(error) > 0.02} == {}


@pytest.mark.skipif(not PROFILES.is_dir(), reason=f"no measured logs: set QLM_DATA ({PROFILES} is absent)")
def test_a_real_engines_log_is_met_within_three_percent_end_to_end(checks):
    metrics = checks.replayed_log(PROFILES)
    assert checks.mape(*metrics["e2e"]) <= 0.03
    assert checks.mape(*metrics["decode"]) <= 0.03
    real, simulated = metrics["ttft"]
    assert simulated.mean() == pytest.approx(real.mean(), rel=0.15)
