"""What the gateway and the fake engine are served with."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import uvicorn


class HttpServer(uvicorn.Server):
    """uvicorn that leaves the program's signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes uvloop's event loop, where that is installed; for ``asyncio.Runner``."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
