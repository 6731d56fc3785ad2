"""Calls over kept connections: whatever pieces the bytes come in, and whenever the server hangs up."""

import asyncio
import contextlib

import pytest

from live.engines.wire import Wire

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENTS = [b'{"a":1}', '{"text":"é\\n\\n"}'.encode(), b"[DONE]"]


def chunked(payload):
    return b"%x\r\n%b\r\n" % (len(payload), payload)


ANSWER = HEAD + b"".join(chunked(b"data: " + event + b"\n\n") for event in EVENTS) + b"0\r\n\r\n"


class Heard:
    def __init__(self):
        self.statuses, self.events = [], []
        self.closed_with = asyncio.get_running_loop().create_future()

    def status(self, status):
        self.statuses.append(status)

    def data(self, event):
        self.events.append(event)

    def closed(self, error):
        self.closed_with.set_result(error)


@contextlib.asynccontextmanager
async def server(answer):
    """Answers each request on a connection by ``answer(writer, number)``, counted over all connections."""
    connections, requests = [], []

    async def serve(reader, writer):
        connections.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                requests.append((head, await reader.readexactly(length)))
                if await answer(writer, len(requests)) is False:
                    writer.close()
                    return

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        port = listening.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", connections, requests
    finally:
        listening.close()


async def call(wire):
    heard = Heard()
    wire.post("/v1/completions", b'{"x":1}', heard)
    async with asyncio.timeout(5):
        return heard, await heard.closed_with


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_events_are_whole_however_the_bytes_are_cut(size):
    async def answer(writer, number):
        for at in range(0, len(ANSWER), size):
            writer.write(ANSWER[at : at + size])
            await writer.drain()
            await asyncio.sleep(0)

    async def main():
        async with server(answer) as (url, connections, requests):
            wire = Wire(url, "secret")
            for _ in range(3):
                heard, error = await call(wire)
                assert error is None
                assert heard.statuses == [200]
                assert heard.events == EVENTS
            assert len(connections) == 1
            assert requests[0][1] == b'{"x":1}'
            assert b"Authorization: Bearer secret\r\n" in requests[0][0]
            wire.close()

    asyncio.run(main())


def test_a_kept_connection_that_the_server_closed_is_made_anew():
    async def answer(writer, number):
        if number == 2:
            return False  # as a server does whose patience with an idle client ended just now
        writer.write(ANSWER)

    async def main():
        async with server(answer) as (url, connections, requests):
            wire = Wire(url)
            assert (await call(wire))[1] is None
            heard, error = await call(wire)
            assert error is None
            assert heard.events == EVENTS
            assert (len(connections), len(requests)) == (2, 3)
            wire.close()

    asyncio.run(main())


def test_a_connection_that_breaks_in_the_middle_is_told():
    async def answer(writer, number):
        writer.write(HEAD + chunked(b"data: " + EVENTS[0] + b"\n\n") + b"20\r\ndata: {")
        await writer.drain()
        return False

    async def main():
        async with server(answer) as (url, _, _requests):
            heard, error = await call(Wire(url))
            assert "connection lost" in error
            assert heard.events == EVENTS[:1]

    asyncio.run(main())


def test_what_is_cancelled_is_heard_no_more_and_hung_up():
    async def main():
        hung_up = asyncio.Event()

        async def answer(writer, number):
            writer.write(HEAD)
            try:
                while True:
                    writer.write(chunked(b"data: 1\n\n"))
                    await writer.drain()
                    await asyncio.sleep(0.005)
            except ConnectionError:
                hung_up.set()
                return False

        async with server(answer) as (url, _connections, _requests):
            wire, heard = Wire(url), Heard()
            exchange = wire.post("/v1/completions", b"{}", heard)
            while not heard.events:
                await asyncio.sleep(0.001)
            exchange.cancel()
            async with asyncio.timeout(5):
                await hung_up.wait()
            assert not heard.closed_with.done()

    asyncio.run(main())


def test_nobody_there_is_one_line():
    async def main():
        heard, error = await call(Wire("http://127.0.0.1:9"))
        assert error.startswith("no connection: ")
        assert not heard.statuses

    asyncio.run(main())


def test_an_answer_that_is_no_stream_is_told_as_one():
    async def answer(writer, number):
        body = b'{"error":\n\n{}}'
        writer.write(b"HTTP/1.1 400 Bad\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    async def main():
        async with server(answer) as (url, _, _requests):
            heard, error = await call(Wire(url))
            assert error is None
            assert (heard.statuses, heard.events) == ([400], [b'{"error":\n\n{}}'])

    asyncio.run(main())
