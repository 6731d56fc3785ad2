"""The wheel works outside the tree: all data that a replay reads is in it."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)], check=True
    )
    (built,) = folder.glob("qlm-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds this package and none of its dependencies."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--target", str(site), str(wheel)], check=True)
    return site


def run(site: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command in another folder, where our packages come from ``site`` and dependencies from here."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_wheel_holds_packages_data_and_licence_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"qlm_sim", "live", "qlm"}
    assert "qlm_sim/traces/sharegpt_lengths.csv.gz" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for folder, suffix in (("scenarios", ".toml"), ("hardware_profiles", ".toml"), ("config", ".toml")):
        shipped = {path.name for path in (ROOT / "qlm_sim" / folder).glob(f"*{suffix}")}
        assert shipped
        assert {f"qlm_sim/{folder}/{name}" for name in shipped} <= set(names)


def test_replay_runs_from_the_wheel_in_another_directory(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, sys.executable, "-c", "import qlm_sim; print(qlm_sim.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(installed)
    command = [sys.executable, str(installed / "bin" / "qlm-sim")]
    done = run(installed, tmp_path, *command, "replay", "--requests", "60", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = tmp_path / "runs" / "multi-model"
    summary = json.loads((result / "summary.json").read_text())
    assert set(summary["policies"]) >= {"vllm", "edf", "shepherd", "qlm"}
    assert all(policy["requests"] == 60 for policy in summary["policies"].values())
    assert (result / "report.html").stat().st_size > 10_000
