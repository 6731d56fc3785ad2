"""A gateway that does not schedule passes requests on to the one that does, streams included."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

import aiohttp
from starlette.types import Receive, Scope, Send

from live.gateway.asgi import answer_error, headers_of, read_body
from live.gateway.ending import end_tasks
from live.gateway.errors import ApiError, retry_later
from live.store.interface import StoreError

log = logging.getLogger(__name__)

PASSED_ON = b"x-qlm-passed-on"
"""Marks what a gateway has passed on: where it comes to one that does not schedule, it goes no further."""
_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"host"}


class Forwarder:
    """Passes on to the leader's URL. A call and ``close`` belong to the event loop."""

    def __init__(
        self, leader: Callable[[], Awaitable[str | None]], own_url: str, max_body_bytes: int
    ) -> None:
        """``own_url``: never passed on to, though between two leases of this gateway it is the leader's."""
        self._leader = leader
        self._own_url = own_url
        self._max_body_bytes = max_body_bytes
        self._session: aiohttp.ClientSession | None = None
        self._draining = False
        self._told_astray = False
        self._under_way: set[asyncio.Task[None]] = set()
        """Requests that were posted: the streams of the dashboard never end by themselves."""

    async def close(self, drain_s: float) -> None:
        """Take nothing more, and let what is under way end for so long."""
        self._draining = True
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=drain_s)
        if self._session is not None:
            await self._session.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if any(name == PASSED_ON for name, _ in scope["headers"]):
                raise self._astray()
            url = await self._url()
            body = await read_body(receive, headers_of(scope), self._max_body_bytes)
        except ApiError as error:
            await answer_error(send, error)
            return
        passing = asyncio.get_running_loop().create_task(self._pass_on(url, body, scope, send))
        if scope["method"] == "POST":
            self._under_way.add(passing)
            passing.add_done_callback(self._under_way.discard)
        gone = asyncio.get_running_loop().create_task(_gone(receive))
        try:
            await asyncio.wait({passing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                passing.result()
        finally:
            await end_tasks([passing, gone])

    async def _url(self) -> str:
        """Where to pass on to. Raises ApiError 503."""
        if self._draining:
            raise retry_later(503, "The server is shutting down.", 5, "shutting_down")
        url = None
        with suppress(StoreError):
            url = await self._leader()
        if url is None or url == self._own_url:
            raise retry_later(503, "No gateway schedules at present.", 1, "no_leader")
        return url

    def _astray(self) -> ApiError:
        """It may only have been under way while the leader changed; or it would go round in a circle."""
        if not self._told_astray:
            self._told_astray = True
            log.error(
                "a request that a gateway passed on came to %s, which does not schedule: gateway.advertise "
                "of the one that does must lead to it alone, not to a load balancer",
                self._own_url,
            )
        return retry_later(503, "No gateway schedules where this was passed on to.", 1, "no_leader")

    async def _pass_on(self, url: str, body: bytes | bytearray, scope: Scope, send: Send) -> None:
        """The leader's answer, as it comes. When this is cancelled the leader sees its client go."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # who waits is for the scheduler to decide
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
                auto_decompress=False,
            )
        path = scope["path"] + (f"?{scope['query_string'].decode()}" if scope["query_string"] else "")
        headers = [(n.decode(), v.decode("latin-1")) for n, v in scope["headers"] if n not in _HOP]
        headers.append((PASSED_ON.decode(), "1"))
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


async def _gone(receive: Receive) -> None:
    """Until the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
