"""Bad input on the command line: one clear line on stderr, exit status 2, nothing left behind."""

import os
from pathlib import Path

import pytest

from qlm_sim.cli import main


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("repaly", "invalid choice: 'repaly'"),
        ("replay --polici qlm", "unrecognized arguments: --polici; see qlm-sim replay --help"),
        ("replay --requests many", "argument --requests: invalid int value: 'many'"),
        ("replay --requests 0", "--requests: found 0, expected a whole number at least 1"),
        ("replay --rate -2", "--rate: found -2.0, expected a number above 0"),
        ("replay --rate nan", "--rate: found nan, expected a number above 0"),
        ("replay --horizon 0", "--horizon: found 0.0, expected a number above 0"),
        ("replay --seed -1", "--seed: found -1, expected a whole number at least 0"),
        ("replay --arrivals sometimes", "--arrivals: arrivals 'sometimes' are unknown"),
        ("replay --policy qml", "--policy: found 'qml'; did you mean 'qlm'? known: vllm, "),
        ("replay --policy qlm --policy qlm", "--policy: 'qlm' is given twice"),
        ("replay --without swaps", "--without: found 'swaps'; did you mean 'swapping'?"),
        ("replay --solver mlip", "--solver: found 'mlip'; did you mean 'milp'?"),
        ("replay --engine jumping", "--engine: found 'jumping'; known: leap, stepping"),
        ("replay --gpu B200", "GPU 'B200' is not known"),
        ("replay --count 0", "--count: cluster[0].count: found 0, expected a whole number at least 1"),
        ("replay --model gpt-2", "model 'gpt-2' is not known"),
        ("replay --gpu A10 --model llama-2-70b", "llama-2-70b does not fit on 1 x A10"),
        ("replay --model-config nowhere/config.json", "nowhere/config.json: no such file"),
        ("replay --gpu-memory-utilization 1.5", "--gpu-memory-utilization: found 1.5"),
        ("replay --max-num-seqs 0", "--max-num-seqs: found 0, expected a whole number at least 1"),
        (
            "replay --max-num-batched-tokens 8",
            "--max-num-batched-tokens: found 8, expected at least max_num_s",
        ),
        ("replay --scheduling-policy lifo", "--scheduling-policy: found 'lifo'; known: fcfs, priority"),
        ("replay --format azur", "--format: found 'azur'; did you mean 'azure'?"),
        ("replay --scenario multi", "scenario 'multi': not known; did you mean 'multi-model'?"),
        ("replay --scenario none.toml", "none.toml: no such file"),
        ("replay none.json", "none.json: no such file"),
        ("replay --tokenizer none.model none.json", "none"),
        ("replay --out taken", "taken: is a file; results need a directory"),
        ("replay --out mine", "mine: holds diary.txt and no summary.json"),
        ("scenario check none.toml", "none.toml: no such file"),
        ("scenario check broken.toml", "broken.toml: "),
        ("scenario init taken", "taken: is there already"),
        ("scenario init nowhere/s.toml", "nowhere/s.toml: cannot be written: No such file or directory"),
        ("profile show B200", "GPU 'B200' is not known"),
    ],
)
def test_bad_input_is_one_line_and_status_two(
    command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("kept")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("kept")
    (tmp_path / "broken.toml").write_text("name = \n")
    before = sorted(tmp_path.rglob("*"))
    assert main(command.split()) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("qlm-sim: error: ")
    assert message in output.err
    assert output.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directory_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert main(["replay", "--out", "locked/result"]) == 2
    assert "locked/result" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["", "replay", "scenario", "scenario list", "scenario init", "scenario check", "profile", "policies"],
)
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main([*command.split(), "--help"])
    assert exit_status.value.code == 0
    assert f"examples:\n  qlm-sim {command}".rstrip() in capsys.readouterr().out
