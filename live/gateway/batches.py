"""/v1/batches: OpenAI's Batch API. What is accepted here is in the store before it is answered."""

import math
import re
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from live.config import LiveConfig
from live.gateway.asgi import read_body
from live.gateway.errors import ApiError
from live.gateway.files import list_object, paged
from live.gateway.metrics import wall_seconds
from live.gateway.responses import JsonResponse
from live.gateway.tenants import Tenants
from live.jobs import CHAT, COMPLETIONS
from live.store.interface import (
    CANCELLING,
    IN_PROGRESS,
    VALIDATING,
    BatchRecord,
    Counts,
    Store,
)

ENDPOINTS = (CHAT, COMPLETIONS)
MOST_WINDOW_S = 24 * 3600.0
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


class _Create(msgspec.Struct):
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: Any = None


class Batches:
    """The handlers of /v1/batches."""

    def __init__(self, config: LiveConfig, store: Store, tenants: Tenants, wake: Callable[[], None]) -> None:
        """``wake``: called when a batch wants work."""
        self._most_bytes = int(config.gateway.max_body_mib * 2**20)
        self._store = store
        self._tenants = tenants
        self._wake = wake

    async def create(self, request: Request) -> Response:
        tenant = self._tenants.identify(request.headers.get("authorization"))
        raw = await read_body(request.receive, request.headers, self._most_bytes)
        try:
            body = msgspec.json.decode(raw, type=_Create)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ApiError(400, f"{error}.") from None
        if body.output_expires_after is not None:
            raise ApiError(400, "output_expires_after: not supported here.", param="output_expires_after")
        if body.endpoint not in ENDPOINTS:
            raise ApiError(
                400,
                f"endpoint: found {body.endpoint!r}, expected one of {', '.join(ENDPOINTS)}.",
                param="endpoint",
            )
        window_s = window_seconds(body.completion_window)
        file = await self._store.file(body.input_file_id)
        if file is None or file.tenant != tenant.name:
            raise ApiError(400, f"No such File object: {body.input_file_id}", param="input_file_id")
        now = wall_seconds()
        batch = BatchRecord(
            id=f"batch_{uuid.uuid4().hex}",
            tenant=tenant.name,
            endpoint=body.endpoint,
            input_file_id=file.id,
            completion_window=body.completion_window,
            created_at=now,
            expires_at=now + math.ceil(window_s),
            metadata=body.metadata,
        )
        await self._store.add_batch(batch)
        self._wake()
        return JsonResponse(batch_object(batch, Counts()))

    async def index(self, request: Request) -> Response:
        tenant = self._tenants.identify(request.headers.get("authorization"))
        found = {batch.id: (batch, counts) for batch, counts in await self._store.batches(tenant.name)}
        page, more = paged([batch for batch, _ in found.values()], request, most=100)
        return JsonResponse(list_object([batch_object(*found[batch.id]) for batch in page], more))

    async def retrieve(self, request: Request) -> Response:
        return JsonResponse(batch_object(*await self._own(request)))

    async def cancel(self, request: Request) -> Response:
        batch, counts = await self._own(request)
        moved = await self._store.move_batch(
            batch.id, (VALIDATING, IN_PROGRESS), status=CANCELLING, cancelling_at=wall_seconds()
        )
        if moved is None:
            batch, counts = await self._own(request)
            if batch.status != CANCELLING:
                raise ApiError(400, f"Cannot cancel a batch with status {batch.status!r}.")
            moved = batch
        self._wake()
        return JsonResponse(batch_object(moved, counts))

    async def _own(self, request: Request) -> tuple[BatchRecord, Counts]:
        tenant = self._tenants.identify(request.headers.get("authorization"))
        batch_id = request.path_params["batch_id"]
        found = await self._store.batch(batch_id)
        if found is None or found[0].tenant != tenant.name:
            raise ApiError(404, f"No such Batch object: {batch_id}", param="id")
        return found


def window_seconds(text: str) -> float:
    """A completion window ("24h", "90m", "30s") in seconds. Raises ApiError 400."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    seconds = float(match[1]) * _UNITS_S[match[2]] if match else 0.0
    if not 0 < seconds <= MOST_WINDOW_S:
        raise ApiError(
            400,
            f"completion_window: found {text!r}, expected 24h or shorter, like 24h, 90m or 30s.",
            param="completion_window",
        )
    return seconds


def batch_object(batch: BatchRecord, counts: Counts) -> dict[str, Any]:
    """As OpenAI's API tells a batch."""
    told: dict[str, Any] = {"object": "batch", **msgspec.structs.asdict(batch)}
    del told["tenant"]
    told["errors"] = {"object": "list", "data": batch.errors} if batch.errors is not None else None
    told["request_counts"] = {
        "total": counts.total,
        "completed": counts.completed,
        "failed": counts.failed,
    }
    return told
