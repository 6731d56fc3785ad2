"""Bare ASGI for the few routes that every request takes: reading a body, sending an answer."""

from collections.abc import Iterable, Mapping
from typing import Any

from starlette.types import Receive, Scope, Send

from live.gateway.errors import ApiError

JSON_TYPE = (b"content-type", b"application/json")


def headers_of(scope: Scope) -> dict[str, str]:
    """The request's headers, the last of each name; names come in lower case."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


async def read_body(receive: Receive, headers: Mapping[str, str], most_bytes: int) -> bytes | bytearray:
    """The whole body. Raises ApiError 413 beyond ``most_bytes``.

    What is too large is read on and dropped, up to four times the limit: a client that is still sending would
    not see the answer.
    """
    announced = headers.get("content-length", "")
    if announced.isdigit() and int(announced) > 4 * most_bytes:
        raise _too_large(most_bytes)
    message = await receive()
    if not message.get("more_body"):
        body: bytes = message.get("body", b"")
        if len(body) > most_bytes:
            raise _too_large(most_bytes)
        return body
    whole = bytearray(message.get("body", b""))
    read = len(whole)
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "The client went away before its request was read.")
        part = message.get("body", b"")
        read += len(part)
        if read <= most_bytes:
            whole += part
        elif read > 4 * most_bytes:
            break
    if read > most_bytes:
        raise _too_large(most_bytes)
    return whole


def _too_large(most_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"The body is larger than the limit of {most_bytes / 2**20:g} MiB.",
        code="request_too_large",
        headers={"connection": "close"},
    )


async def answer(send: Send, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
    """A whole answer at once."""
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [JSON_TYPE, (b"content-length", b"%d" % len(body)), *headers],
        }
    )
    await send({"type": "http.response.body", "body": body})


async def answer_error(send: Send, error: ApiError, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    extra = [(name.encode(), value.encode("latin-1")) for name, value in error.headers.items()]
    await answer(send, error.status, [*extra, *headers], error.json())


def raw_headers(pairs: Mapping[str, Any]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), str(value).encode("latin-1")) for name, value in pairs.items()]
