"""A gateway that does not schedule passes requests on to the one that does, streams included."""

from collections.abc import Awaitable, Callable

import aiohttp
from starlette.types import Receive, Scope, Send

from live.gateway.asgi import answer_error
from live.gateway.errors import retry_later

_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"host"}


class Forwarder:
    """Passes on to the leader's URL. ``start`` and ``close`` belong to the event loop."""

    def __init__(self, leader: Callable[[], Awaitable[str | None]]) -> None:
        self._leader = leader
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        url = await self._leader()
        if url is None:
            await answer_error(send, retry_later(503, "No gateway schedules at present.", 1, "no_leader"))
            return
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=5), auto_decompress=False
            )
        body = await _read(receive)
        path = scope["path"] + (f"?{scope['query_string'].decode()}" if scope["query_string"] else "")
        headers = [(n.decode(), v.decode("latin-1")) for n, v in scope["headers"] if n not in _HOP]
        started = False
        try:
            async with self._session.request(
                scope["method"], f"{url}{path}", data=body, headers=headers, ssl=False
            ) as response:
                await send(
                    {
                        "type": "http.response.start",
                        "status": response.status,
                        "headers": [(n.lower(), v) for n, v in response.raw_headers if n.lower() not in _HOP],
                    }
                )
                started = True
                async for chunk in response.content.iter_any():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except aiohttp.ClientError as error:
            if started:
                raise  # the answer stays incomplete, and the client sees that
            await answer_error(
                send, retry_later(503, f"The scheduling gateway does not answer: {error}.", 1, "no_leader")
            )


async def _read(receive: Receive) -> bytes:
    whole = bytearray()
    while True:
        message = await receive()
        whole += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(whole)
