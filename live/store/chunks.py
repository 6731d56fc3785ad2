"""Content of files in chunks of one size."""

from collections.abc import AsyncIterator, Iterable

CHUNK_BYTES = 1 << 20


async def regular(content: Iterable[bytes] | AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The content in chunks of CHUNK_BYTES, but the last."""
    held = bytearray()
    async for piece in _pieces(content):
        held += piece
        while len(held) >= CHUNK_BYTES:
            yield bytes(held[:CHUNK_BYTES])
            del held[:CHUNK_BYTES]
    if held:
        yield bytes(held)


async def _pieces(content: Iterable[bytes] | AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if isinstance(content, AsyncIterator):
        async for piece in content:
            yield piece
    else:
        for piece in content:
            yield piece
