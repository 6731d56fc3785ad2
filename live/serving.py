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


def url_of(host: str, port: int, *, tls: bool = False) -> str:
    """Of a server there; an IPv6 address goes in brackets."""
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes uvloop's event loop, where that is installed; for ``asyncio.Runner``."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
