"""A gateway in this process and a batch in its store, for tests that look inside or let things fail."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from live.build import make_service
from live.config import load_config
from live.gateway import batch_answers, batch_runner
from live.gateway.app import Gateway, House
from live.store import open_store
from live.store.interface import OPEN_STATES, BatchRecord, Counts, FileRecord, Store


@asynccontextmanager
async def leading(folder: Path, toml: str) -> AsyncIterator[tuple[Gateway, House, Store]]:
    """A gateway in this process that schedules, closed at the end if it is not yet."""
    (folder / "live.toml").write_text(toml)
    config = load_config(folder / "live.toml")
    store = await open_store(config.store.url)
    gateway = Gateway(config, store, lambda: make_service(config))
    await gateway.start()
    assert gateway.house is not None
    try:
        yield gateway, gateway.house, store
    finally:
        if not gateway.draining:
            await gateway.close()


async def add_batch(store: Store, content: bytes, window_s: int = 86400) -> None:
    """The batch "batch_1" of that input file."""
    now = int(time.time())
    file = FileRecord(
        id="file-1", tenant="default", filename="in.jsonl", purpose="batch", bytes=0, created_at=now
    )
    await store.add_file(file, [content])
    await store.add_batch(
        BatchRecord(
            id="batch_1",
            tenant="default",
            endpoint="/v1/completions",
            input_file_id="file-1",
            completion_window="24h",
            created_at=now,
            expires_at=now + window_s,
        )
    )


async def batch_of(store: Store) -> tuple[BatchRecord, Counts]:
    found = await store.batch("batch_1")
    assert found is not None
    return found


async def until(check: Callable[[], Any]) -> None:
    """Until ``check`` gives, or awaits, something true."""
    async with asyncio.timeout(30):
        while True:
            found = check()
            if await found if asyncio.iscoroutine(found) else found:
                return
            await asyncio.sleep(0.02)


async def ended(store: Store) -> bool:
    return (await batch_of(store))[0].status not in OPEN_STATES


def retry_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gateway not wait before it tries anew."""
    for module in (batch_answers, batch_runner):
        monkeypatch.setattr(module, "RETRY_S", 0.01)
