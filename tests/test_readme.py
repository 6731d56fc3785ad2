"""What the README shows is true: its Python runs, its commands parse, its files are there."""

import re
import shlex
from pathlib import Path

import pytest

from qlm_sim.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out.split()
    assert printed[0] == "vllm"
    assert printed[3] == "qlm"
    assert 0 <= float(printed[1]) <= 1


def test_commands_are_right() -> None:
    commands = re.findall(r"^\$ \.venv/bin/qlm-sim (.*)$", README, re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        build_parser().parse_args(shlex.split(command, comments=True))


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^\$ make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_links_lead_somewhere_and_the_picture_is_small() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
    assert (ROOT / "docs" / "report.png").stat().st_size < 400_000
