"""What ``qlm-live`` cannot do is one line that says why, and exit status 2."""

import subprocess
import sys
from pathlib import Path

import pytest
from live_gateway import engines

from live.cli import main
from live.store import without_password


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("serve CONFIG --port 99999", "--port: found 99999"),
        ("serve CONFIG --port -1", "--port: found -1"),
        ("serve CONFIG --dry-run --speed 0", "--speed: found 0"),
        ("serve CONFIG --dry-run --speed nan", "--speed: found nan"),
        ("serve missing.toml", "config missing.toml: no such file"),
        ("fake-engine llama-2-7b --port 99999", "--port: found 99999"),
        ("fake-engine llama-2-7b --port 0 --speed nan", "--speed: found nan"),
        ("fake-engine llama-2-7b --port 0 --mean-output-tokens 0", "--mean-output-tokens: found 0"),
        ("fake-engine nope --port 0", "model 'nope' is not known"),
    ],
)
def test_a_flag_out_of_range_is_one_line(
    command: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "live.toml"
    config.write_text(engines())
    assert main([str(config) if part == "CONFIG" else part for part in command.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"qlm-live: error: {said}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("instead_of", "line", "flags", "said"),
    [
        ('gpu = "A100-80"', 'gpu = "nope"', "", "engine[0]: GPU 'nope' is not known"),
        ('gpu = "A100-80"', "kv_tokens = 5", "", "engine[0].kv_tokens: found 5"),
        ('name = "llama-2-7b"', 'name = "llama-2-7b"\nconfig = "no.json"', "", "no such file"),
        ('name = "llama-2-7b"', 'name = "llama-2-7b"\ntokenizer = "no.json"', "", "tokenizer "),
        ("port = 0", "port = 0", "--record /proc/no/events.jsonl", "/proc/no/events.jsonl"),
    ],
)
def test_what_cannot_serve_does_not_say_that_it_serves(
    instead_of: str, line: str, flags: str, said: str, tmp_path: Path
) -> None:
    config = tmp_path / "live.toml"
    config.write_text(engines().replace(instead_of, line, 1))
    command = [sys.executable, "-m", "live.cli", "serve", str(config), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "serving on" not in done.stderr


@pytest.mark.parametrize(
    "command", ["serve CONFIG", "compare --config CONFIG", "fake-engine llama-2-7b --port 0"]
)
def test_what_the_extra_brings_is_named_where_it_is_missing(command: str, tmp_path: Path) -> None:
    config = tmp_path / "live.toml"
    config.write_text(engines())
    argv = [str(config) if part == "CONFIG" else part for part in command.split()]
    code = "import sys; from live.cli import _EXTRA, main; sys.modules.update(dict.fromkeys(_EXTRA)); "
    code += f"sys.exit(main({argv}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2, done.stderr
    assert "is not installed; it comes with pip install 'qlm[live]'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("redis://:sec@h/0", "redis://:***@h/0"),
        ("redis://qlm:p@sec/ret@h/0", "redis://qlm:***@h/0"),
        ("redis://h/0?password=sec&db=1", "redis://h/0?password=***&db=1"),
        ("sqlite:////var/lib/qlm.db", "sqlite:////var/lib/qlm.db"),
    ],
)
def test_a_password_is_masked_wherever_it_stands(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_the_password_of_a_store_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "live.toml"
    config.write_text(engines() + '[store]\nurl = "redis://qlm:secret@127.0.0.1:1/0"\n')
    assert main(["serve", str(config), "--check"]) == 0
    assert main(["serve", str(config)]) == 2
    said = "".join(capsys.readouterr())
    assert said.count("redis://qlm:***@127.0.0.1:1/0") == 2
    assert "secret" not in said
