"""Guards: what a killed process leaves behind is ended, and only then."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from live.engines.guard import dismiss, watch_over

LEADER = """
import os, subprocess, time
from live.engines.guard import lead_group, watch_over
{start}
print(child.pid, flush=True)
time.sleep(600)
"""
STARTS = {
    "lead_group": """
guard = lead_group()
child = subprocess.Popen(["sleep", "600"], process_group=guard.pid)
""",
    "watch_over": """
child = subprocess.Popen(["sleep", "600"])
guard = watch_over([child.pid])
""",
}


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("start", STARTS)
def test_what_a_killed_process_started_is_ended(start: str) -> None:
    command = [sys.executable, "-c", LEADER.format(start=STARTS[start])]
    leader = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert leader.stdout is not None
    child = int(leader.stdout.readline())
    assert runs(child)
    leader.kill()
    leader.wait()
    leader.stdout.close()
    end = time.monotonic() + 20
    while runs(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not runs(child)


def test_a_guard_that_is_dismissed_ends_nothing() -> None:
    with subprocess.Popen(["sleep", "600"]) as child:
        dismiss(watch_over([child.pid]))
        assert child.poll() is None
        child.kill()
