"""An engine in process: its child processes end with a process that is killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs real vLLM: make test-vllm")

from live_gateway import eventually
from real_vllm.engines_at_hand import ENV, FLAGS
from real_vllm.tiny_model import make_tiny_model

pytestmark = pytest.mark.vllm

SCRIPT = """
import asyncio, sys
from live.engines.in_process import InProcessServer

async def main():
    server = InProcessServer({flags!r}, {{"a": sys.argv[1]}}, {{}})
    await server.start("a")
    print("up", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
TESTS = Path(__file__).parents[1]


def descendants(pid: int) -> set[int]:
    """All processes below one, by their threads' children."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | descendants(child)
    return found


def test_a_killed_gateway_leaves_no_engine_behind(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "a", 0)
    with (tmp_path / "log").open("wb") as log:
        gateway = subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(flags=FLAGS), str(tmp_path / "a")],
            env=os.environ | ENV | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), ENV["PYTHONPATH"]])},
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert gateway.stdout is not None
    try:
        assert b"up\n" in iter(gateway.stdout.readline, b""), (tmp_path / "log").read_text()
        children = descendants(gateway.pid)
        assert any(b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children)
    finally:
        gateway.kill()
        gateway.wait()
        gateway.stdout.close()  # not read on: an engine that is left behind would hold it open
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), 20)
