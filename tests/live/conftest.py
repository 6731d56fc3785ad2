"""What tests of the gateway share: the event loop that they run in, and Redis, where it is installed."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_gateway import eventually


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("redis-server is not on PATH")
    path = tmp_path / "redis.sock"
    process = subprocess.Popen(
        [server, "--port", "0", "--unixsocket", str(path), "--dir", str(tmp_path), "--appendonly", "yes"],
        stdout=subprocess.DEVNULL,
    )
    try:
        eventually(path.exists)
        yield f"unix://{path}"
    finally:
        process.terminate()
        process.wait()
