"""The lines of a batch's files: read and checked on the way in, written on the way out."""

import codecs
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from live.gateway.errors import ApiError
from live.gateway.metrics import wall_seconds
from live.store.interface import BatchRecord, FileRecord, Line, Result, Store

MOST_ERRORS = 100
"""Errors that a failed batch names."""
EXPIRED = ("batch_expired", "This request could not be executed before the completion window expired.")


class _InputLine(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


_decode = msgspec.json.Decoder(_InputLine).decode
_encode = msgspec.json.Encoder().encode


class LineReader:
    """Reads an input file, piece by piece, into lines and errors."""

    def __init__(self, endpoint: str, check: Callable[[bytes], None], max_requests: int) -> None:
        """``check``: raises ApiError where the body of a line is no good request."""
        self.errors: list[dict[str, Any]] = []
        self.lines = 0
        self._endpoint = endpoint
        self._check = check
        self._max_requests = max_requests
        self._seen: set[str] = set()
        self._row = 0

    async def read(self, content: AsyncIterator[bytes]) -> AsyncIterator[Line]:
        """The good lines; ``errors`` tells the others."""
        begun: list[bytes] = []
        async for piece in content:
            *ends, rest = piece.split(b"\n")
            for end in ends:
                line = self._line(b"".join([*begun, end]))
                begun = []
                if line is not None:
                    yield line
            begun.append(rest)
            if len(self.errors) >= MOST_ERRORS:
                return
        line = self._line(b"".join(begun))
        if line is not None:
            yield line
        if not self.lines and not self.errors:
            self._error("empty_file", "The input file has no requests.", None, of_line=False)

    def _line(self, row: bytes) -> Line | None:
        self._row += 1
        if self._row == 1:
            row = row.removeprefix(codecs.BOM_UTF8)  # Windows's editors begin files with it
        if not row.strip() or len(self.errors) >= MOST_ERRORS:
            return None
        try:
            custom_id, body = self._checked(row)
        except _BadLine as bad:
            self._error(bad.code, str(bad), bad.param)
            return None
        self._seen.add(custom_id)
        self.lines += 1
        return Line(self.lines - 1, custom_id, body)

    def _checked(self, row: bytes) -> tuple[str, bytes]:
        """The line's custom_id and body."""
        try:
            found = _decode(row)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _BadLine("invalid_json_line", f"This line is no good request: {error}.", None) from None
        if self.lines == self._max_requests:
            text = f"A batch takes at most {self._max_requests} requests."
            raise _BadLine("request_limit_exceeded", text, None)
        if found.custom_id in self._seen:
            text = f"The custom_id {found.custom_id!r} is used twice."
            raise _BadLine("duplicate_custom_id", text, "custom_id")
        if found.method != "POST":
            raise _BadLine("invalid_method", f"Found {found.method!r}, expected 'POST'.", "method")
        if found.url != self._endpoint:
            text = f"Found {found.url!r}, expected {self._endpoint!r}."
            raise _BadLine("mismatched_endpoint", text, "url")
        body = bytes(found.body)
        try:
            self._check(body)
        except ApiError as error:
            raise _BadLine(error.code or "invalid_request", error.message, error.param or "body") from None
        return found.custom_id, body

    def _error(self, code: str, message: str, param: str | None, *, of_line: bool = True) -> None:
        at = self._row if of_line else None
        self.errors.append({"code": code, "message": message, "param": param, "line": at})


class _BadLine(Exception):
    def __init__(self, code: str, message: str, param: str | None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def answered(line: Line, status: int, request_id: str, body: bytes) -> Result:
    """The line of the output file, or of the error file where the status is an error."""
    text = _encode(
        {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": line.custom_id,
            "response": {"status_code": status, "request_id": request_id, "body": msgspec.Raw(body)},
            "error": None,
        }
    )
    return Result(line.number, status < 400, text)


def unanswered(line: Line, code: str, message: str) -> Result:
    """The line of the error file for a request that was never executed."""
    text = _encode(
        {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": line.custom_id,
            "response": None,
            "error": {"code": code, "message": message},
        }
    )
    return Result(line.number, False, text)


async def write_files(store: Store, batch: BatchRecord) -> dict[str, str]:
    """Write the output and the error file, those that have lines; their ids, by field of the batch."""
    written = {}
    for field, ok, kind in (("output_file_id", True, "output"), ("error_file_id", False, "error")):
        file = FileRecord(
            id=f"file-{batch.id.removeprefix('batch_')}-{kind}",
            tenant=batch.tenant,
            filename=f"{batch.id}_{kind}.jsonl",
            purpose="batch_output",
            bytes=0,
            created_at=wall_seconds(),
        )
        if (await store.add_file(file, _texts(store, batch.id, ok))).bytes:
            written[field] = file.id
        else:
            await store.delete_file(file.id)
    return written


async def _texts(store: Store, batch_id: str, ok: bool) -> AsyncIterator[bytes]:
    async for result in store.results(batch_id):
        if result.ok == ok:
            yield result.text + b"\n"
