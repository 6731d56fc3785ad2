"""Streaming calls to an engine over HTTP/1.1: connections that are kept and used again, events as they come.

What comes is handled where it is received, with no task and no queue per stream: tens of thousands of tokens
a second pass here. aiohttp takes 1.7 times the CPU per token and 4 times that per request
(tests/bench/bench_live_engines.py).
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Protocol
from urllib.parse import urlsplit

import httptools

CONNECT_S = 5.0


class Events(Protocol):
    """Hears what comes of a call: some ``data``, then ``closed`` once."""

    def status(self, status: int) -> None: ...

    def data(self, event: bytes) -> None:
        """The data of one server-sent event; or all of the body, if it is no event stream."""
        ...

    def closed(self, error: str | None) -> None:
        """No more comes; None if the answer was complete."""
        ...


class Wire:
    """All connections to one server."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None, url
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._prefix = parts.path.rstrip("/").removesuffix("/v1").encode()
        self._head = b" HTTP/1.1\r\nHost: " + parts.netloc.rpartition("@")[2].encode() + b"\r\n"
        if api_key:
            self._head += b"Authorization: Bearer " + api_key.encode() + b"\r\n"
        self._head += b"Content-Type: application/json\r\nContent-Length: "
        self._idle: list[_Connection] = []
        self._connecting: set[asyncio.Task[None]] = set()

    def post(self, path: str, body: bytes, events: Events) -> "Exchange":
        """Send ``body``; ``events`` hears the answer, never before this has returned."""
        request = b"POST %b%b%b%d\r\n\r\n%b" % (self._prefix, path.encode(), self._head, len(body), body)
        exchange = Exchange(self, request, events)
        if self._idle:
            self._idle.pop().send(exchange, used_before=True)
        else:
            self._connect(exchange)
        return exchange

    def _connect(self, exchange: "Exchange") -> None:
        task = asyncio.get_running_loop().create_task(self._open(exchange))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _open(self, exchange: "Exchange") -> None:
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(self._idle, self._connect), self._host, self._port, ssl=self._tls
                )
        except (OSError, TimeoutError) as error:
            exchange.close(f"no connection: {error or 'timed out'}")
            return
        if exchange.over:
            connection.drop()
        else:
            connection.send(exchange, used_before=False)

    def close(self) -> None:
        for task in self._connecting:
            task.cancel()
        for connection in self._idle:
            connection.drop()
        self._idle.clear()


class Exchange:
    """One call and its answer."""

    __slots__ = ("_events", "connection", "over", "request")

    def __init__(self, wire: Wire, request: bytes, events: Events) -> None:
        self.request = request
        self.over = False
        self.connection: _Connection | None = None
        self._events = events

    def cancel(self) -> None:
        """Hang up: the server ends what it was doing. Nothing more is heard."""
        self.over = True
        if self.connection is not None:
            self.connection.drop()
            self.connection = None

    def close(self, error: str | None) -> None:
        if not self.over:
            self.over = True
            self.connection = None
            self._events.closed(error)

    def status(self, status: int) -> None:
        if not self.over:
            self._events.status(status)

    def data(self, event: bytes) -> None:
        if not self.over:
            self._events.data(event)


class _Connection(asyncio.Protocol):
    """One connection, with one exchange at a time."""

    def __init__(self, idle: "list[_Connection]", again: Callable[[Exchange], None]) -> None:
        self._idle = idle
        self._again = again
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._used_before = False
        self._heard = False
        self._stream = False
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def send(self, exchange: Exchange, *, used_before: bool) -> None:
        assert self._transport is not None
        self._exchange = exchange
        exchange.connection = self
        self._used_before = used_before
        self._heard = self._stream = False
        self._rest = b""
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(exchange.request)

    def drop(self) -> None:
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if self._exchange is None or self._parser is None:
            self.drop()  # an answer to nothing
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"not HTTP: {error}")
            self.drop()

    def connection_lost(self, error: Exception | None) -> None:
        if self in self._idle:
            self._idle.remove(self)
        exchange = self._exchange
        if exchange is None:
            return
        if self._used_before and not self._heard:
            # The server closed the kept connection before it saw the call.
            self._exchange = exchange.connection = None
            if not exchange.over:
                self._again(exchange)
            return
        self._end(f"connection lost: {error or 'closed by the server'}")

    def _end(self, error: str | None) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.close(error)

    # What the parser finds.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._stream = value.startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        if self._exchange is not None and self._parser is not None:
            self._exchange.status(self._parser.get_status_code())

    def on_body(self, body: bytes) -> None:
        if self._rest:
            body = self._rest + body
        if not self._stream:
            self._rest = body
            return
        end = body.rfind(b"\n\n")
        if end < 0:
            self._rest = body
            return
        self._rest = body[end + 2 :]
        exchange = self._exchange
        for event in body[:end].split(b"\n\n"):
            if exchange is not None and event.startswith(b"data: "):
                exchange.data(event[6:])

    def on_message_complete(self) -> None:
        exchange, parser = self._exchange, self._parser
        if exchange is None or parser is None:
            return
        if not self._stream:
            exchange.data(self._rest)
        self._exchange = None
        if parser.should_keep_alive():
            self._idle.append(self)
        else:
            self.drop()
        exchange.close(None)
