"""Runs fake engines: inside a program, for its tests and demonstrations, or as a process of its own."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import uvicorn

from live.fake.app import fake_app
from live.fake.engine import FakeEngine
from live.serving import HttpServer


@contextlib.asynccontextmanager
async def serving(
    engine: FakeEngine, *, host: str = "127.0.0.1", port: int = 0, served_model: str | None = None
) -> AsyncIterator[str]:
    """Serve ``engine`` in this event loop; gives the URL."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    config = uvicorn.Config(
        fake_app(engine, served_model), log_config=None, log_level="warning", access_log=False, lifespan="off"
    )
    server = HttpServer(config)
    tasks = [asyncio.ensure_future(server.serve([listener])), asyncio.ensure_future(engine.run())]
    try:
        while not server.started:
            await asyncio.sleep(0.001)
        yield f"http://{host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        listener.close()


async def serve_forever(engine: FakeEngine, host: str, port: int, served_model: str | None = None) -> None:
    """Serve until the task is cancelled."""
    async with serving(engine, host=host, port=port, served_model=served_model):
        await asyncio.Event().wait()
