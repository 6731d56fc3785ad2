"""An engine in process that is given what it does not take: told where it came from, and nothing breaks."""

import asyncio
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs real vLLM: make test-vllm")

from live.engines.backend import Call
from live.engines.in_process import InProcessBackend, InProcessServer
from live.jobs import CHAT
from qlm_sim.errors import InputError

pytestmark = pytest.mark.vllm

CONFIG = """
[gateway]
port = 0
[[model]]
name = "llama-2-7b"
[[engine]]
id = "e0"
kind = "in-process"
models = ["llama-2-7b"]
command = ["--enforce-eager", "--no-such-flag"]
"""


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        (["--no-such-flag"], "command: unrecognized arguments: --no-such-flag"),
        (["--max-num-seqs", "many"], "command: argument --max-num-seqs: .*many"),
        (["--help"], "command: unrecognized arguments: --help"),
        (["--config", "/no/such/file.yaml"], "command: .*file.yaml"),
    ],
)
def test_flags_that_vllm_does_not_take_are_an_error_of_one_line(flag: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told) as refused:
        InProcessServer(flag, {"a": "/no/such/model"}, {})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("flags", [["serve"], ["serve", "--check"]])
def test_a_gateway_with_such_an_engine_says_which(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "live.toml").write_text(CONFIG)
    command, *rest = flags
    done = subprocess.run(
        [sys.executable, "-m", "live.cli", command, str(tmp_path / "live.toml"), *rest],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith("engine[0]: command: unrecognized arguments: --no-such-flag")
    assert "Traceback" not in done.stderr


class Heard:
    """A listener that wants to know only how it ended."""

    call = Call("r0-1", CHAT, {"messages": [{"role": "nobody", "content": "x"}]})

    def __init__(self) -> None:
        self.end: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()

    def refused(self, status: int, reason: str) -> None:
        self.end.set_result((status, reason))


def test_a_chat_that_the_template_does_not_take_is_refused() -> None:
    """Templates raise errors of their own kind, which are those of no request to vLLM."""

    def apply_chat_template(*given: Any, **named: Any) -> list[int]:
        raise Exception("Conversation roles must alternate")

    engine: Any = SimpleNamespace(
        model_config=SimpleNamespace(get_diff_sampling_param=dict),
        get_tokenizer=lambda: SimpleNamespace(apply_chat_template=apply_chat_template),
    )

    async def main() -> None:
        heard: Any = Heard()
        InProcessBackend(engine, "a").start(heard)
        async with asyncio.timeout(10):
            assert await heard.end == (400, "Conversation roles must alternate")

    asyncio.run(main())
