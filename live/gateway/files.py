"""/v1/files: what batches read and write. OpenAI's Files API, purpose "batch"."""

import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeVar

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive

from live.config import LiveConfig
from live.gateway.errors import ApiError
from live.gateway.metrics import wall_seconds
from live.gateway.responses import JsonResponse
from live.gateway.tenants import Tenants
from live.store.chunks import CHUNK_BYTES
from live.store.interface import BatchRecord, FileRecord, Store

T = TypeVar("T", FileRecord, BatchRecord)

FORM_BYTES = 2**16
"""What the form around a file may take."""
PURPOSES = ("batch",)


class Files:
    """The handlers of /v1/files."""

    def __init__(self, config: LiveConfig, store: Store, tenants: Tenants) -> None:
        self._most_bytes = int(config.batch.max_file_mib * 2**20)
        self._store = store
        self._tenants = tenants

    async def create(self, request: Request) -> Response:
        tenant = self._tenants.identify(request.headers.get("authorization"))
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._most_bytes + FORM_BYTES:
            raise self._too_large()
        limited = Request(request.scope, self._limited(request.receive))
        async with limited.form(max_files=1) as form:
            upload, purpose = form.get("file"), form.get("purpose")
            if not isinstance(upload, UploadFile):
                raise ApiError(400, "file: missing, expected a file (multipart/form-data).", param="file")
            if purpose not in PURPOSES:
                raise ApiError(
                    400,
                    f"purpose: found {purpose!r}, expected one of {', '.join(PURPOSES)}.",
                    param="purpose",
                )
            unknown = sorted({*form} - {"file", "purpose"})
            if unknown:
                raise ApiError(400, f"{unknown[0]}: not supported here.", param=unknown[0])
            if (upload.size or 0) > self._most_bytes:
                raise self._too_large()
            filename = upload.filename or "upload.jsonl"
            if not _is_text(filename):
                raise ApiError(400, f"file: found the name {filename!r}, expected Unicode.", param="file")
            record = FileRecord(
                id=f"file-{uuid.uuid4().hex}",
                tenant=tenant.name,
                filename=filename,
                purpose=str(purpose),
                bytes=0,
                created_at=wall_seconds(),
            )
            return JsonResponse(file_object(await self._store.add_file(record, _chunks(upload))))

    def _limited(self, receive: Receive) -> Receive:
        """Raises ApiError 413 where more comes, announced or not, and 400 where the client goes away."""
        left = self._most_bytes + FORM_BYTES

        async def limited() -> Message:
            nonlocal left
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "The client went away before its file was read.")
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The file is larger than the limit of {self._most_bytes / 2**20:g} MiB.",
            code="file_too_large",
            param="file",
        )

    async def index(self, request: Request) -> Response:
        tenant = self._tenants.identify(request.headers.get("authorization"))
        files = await self._store.files(tenant.name)
        purpose = request.query_params.get("purpose")
        if purpose is not None:
            files = [file for file in files if file.purpose == purpose]
        if request.query_params.get("order") == "asc":
            files.reverse()
        page, more = paged(files, request, most=10_000)
        return JsonResponse(list_object([file_object(file) for file in page], more))

    async def retrieve(self, request: Request) -> Response:
        return JsonResponse(file_object(await self._own(request)))

    async def content(self, request: Request) -> Response:
        file = await self._own(request)
        return StreamingResponse(
            self._store.read_file(file.id),
            media_type="application/octet-stream",
            headers={"content-length": str(file.bytes)},
        )

    async def delete(self, request: Request) -> Response:
        file = await self._own(request)
        await self._store.delete_file(file.id)
        return JsonResponse({"id": file.id, "object": "file", "deleted": True})

    async def _own(self, request: Request) -> FileRecord:
        tenant = self._tenants.identify(request.headers.get("authorization"))
        file_id = request.path_params["file_id"]
        file = await self._store.file(file_id)
        if file is None or file.tenant != tenant.name:
            raise ApiError(404, f"No such File object: {file_id}", param="id")
        return file


def _is_text(name: str) -> bool:
    """Whether it is Unicode: a form may name an encoding that lets half of a surrogate pair through."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


async def _chunks(upload: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await upload.read(CHUNK_BYTES):
        yield chunk


def file_object(file: FileRecord) -> dict[str, Any]:
    """As OpenAI's API tells a file."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


def list_object(data: Sequence[dict[str, Any]], more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": data,
        "has_more": more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }


def paged(records: Sequence[T], request: Request, *, most: int) -> tuple[Sequence[T], bool]:
    """The page that ``after`` and ``limit`` ask for, and whether more follows. Raises ApiError 400."""
    text = request.query_params.get("limit", str(min(most, 10_000)))
    limit = int(text) if text.isdecimal() and len(text) < 10 else 0
    if not 1 <= limit <= most:
        raise ApiError(
            400, f"limit: found {text!r}, expected a whole number from 1 to {most}.", param="limit"
        )
    after = request.query_params.get("after")
    start = 0
    if after is not None:
        places = [place for place, record in enumerate(records) if record.id == after]
        if not places:
            raise ApiError(400, f"after: found {after!r}, expected an id of the list.", param="after")
        start = places[0] + 1
    end = start + limit
    return records[start:end], end < len(records)
