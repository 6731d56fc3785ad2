"""``qlm-sim experiment``: what a checkout has, and a clear word about what it has not."""

import pytest

from qlm_sim.cli import experiment, main


def test_the_list_names_each_with_its_first_line(capsys):
    assert main(["experiment", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("random_scenarios ") and "random multi-model" in line for line in lines)


@pytest.mark.parametrize("arguments", [["experiment"], ["experiment", "nope"]])
def test_an_unknown_or_missing_name_is_one_line(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "random_scenarios" in error


def test_outside_a_checkout_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(experiment, "_FOLDER", tmp_path / "experiments")
    assert main(["experiment", "--list"]) == 2
    assert "checkout" in capsys.readouterr().err


def test_an_experiment_runs_and_writes_where_it_is_told(monkeypatch, tmp_path, capsys):
    (tmp_path / "small.py").write_text(
        '"""A small one."""\n\nfrom pathlib import Path\n\n\n'
        "def run(out: Path, quick: bool) -> None:\n"
        '    out.mkdir()\n    (out / "r.md").write_text(str(quick))\n'
    )
    monkeypatch.setattr(experiment, "_FOLDER", tmp_path)
    assert main(["experiment", "small", "--quick", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "r.md").read_text() == "True"
