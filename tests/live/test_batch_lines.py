"""A batch's input file, read in pieces."""

import json
from collections.abc import AsyncIterator

import pytest

from live.gateway.batch_lines import LineReader

ENDPOINT = "/v1/completions"
BODY = {"model": "m", "prompt": "x" * 50}


def file_of(lines: int) -> bytes:
    rows = [{"custom_id": f"c{n}", "method": "POST", "url": ENDPOINT, "body": BODY} for n in range(lines)]
    return "\n".join(map(json.dumps, rows)).encode()


@pytest.mark.anyio
@pytest.mark.parametrize("piece", [1, 7, 170, 1000, 10**6])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
async def test_lines_are_the_same_wherever_the_pieces_are_cut(piece: int, end: bytes) -> None:
    content = file_of(5) + b"\nnot json\n" + file_of(1) + end

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(content), piece):
            yield content[start : start + piece]

    reader = LineReader(ENDPOINT, lambda body: None, 100)
    lines = [line async for line in reader.read(pieces())]
    assert [(line.number, line.custom_id) for line in lines] == [(n, f"c{n}") for n in range(5)]
    assert all(json.loads(line.body) == BODY for line in lines)
    assert [(error["code"], error["line"]) for error in reader.errors] == [
        ("invalid_json_line", 6),
        ("duplicate_custom_id", 7),
    ]


@pytest.mark.anyio
async def test_a_byte_order_mark_is_no_part_of_the_first_line() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield "\ufeff".encode() + file_of(2)

    reader = LineReader(ENDPOINT, lambda body: None, 100)
    assert [line.custom_id async for line in reader.read(pieces())] == ["c0", "c1"]
    assert reader.errors == []
