"""/v1/queue: what of a tenant's work waits, where it stands in line, and how long it will take.

Not part of OpenAI's API: no provider tells its clients how long they will wait.
"""

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from live.gateway.batches import batch_object
from live.gateway.errors import ApiError
from live.gateway.intake import Entry, Intake
from live.gateway.metrics import wall_seconds
from live.gateway.pace import LinePace
from live.gateway.responses import JsonResponse
from live.gateway.tenants import Tenants
from live.store.interface import Store

MOST = 1000


class Queue:
    """The handlers of /v1/queue."""

    def __init__(
        self, store: Store, tenants: Tenants, intake: Callable[[], Intake], pace: Callable[[], LinePace]
    ) -> None:
        self._store = store
        self._tenants = tenants
        self._intake = intake
        self._pace = pace

    async def index(self, request: Request) -> Response:
        """The tenant's requests that have no first token yet or were evicted, and its unfinished batches."""
        tenant = self._tenants.identify(request.headers.get("authorization"))
        intake = self._intake()
        waiting = [
            entry
            for entry in intake.entries.values()
            if entry.tenant.name == tenant.name
            and not entry.batch
            and (entry.first_token_at is None or intake.waits(entry))
        ]
        data = [_entry_object(entry, intake) for entry in waiting[:MOST]]
        return JsonResponse(
            {
                "object": "queue",
                "requests": data,
                "requests_waiting": len(waiting),
                "batches": await self._batches(tenant.name),
            }
        )

    async def retrieve(self, request: Request) -> Response:
        """One request, by the id of its answer (the header x-request-id)."""
        tenant = self._tenants.identify(request.headers.get("authorization"))
        request_id = request.path_params["request_id"]
        intake = self._intake()
        entry = intake.entries.get(request_id)
        if entry is None or entry.tenant.name != tenant.name:
            raise ApiError(404, f"No such request in the queue: {request_id}", param="id")
        return JsonResponse(_entry_object(entry, intake))

    async def _batches(self, tenant: str) -> list[dict[str, Any]]:
        """The tenant's own; their place among all, since the one that expires first goes first."""
        found = []
        ahead = 0
        now = wall_seconds()
        for batch, counts in await self._store.open_batches():
            if batch.tenant == tenant:
                found.append(
                    {
                        **batch_object(batch, counts),
                        "queue_position": ahead,
                        "estimated_wait_seconds": self._pace().seconds(ahead + counts.left),
                        "expires_in_seconds": batch.expires_at - now,
                    }
                )
            ahead += counts.left
        return found


def _entry_object(entry: Entry, intake: Intake) -> dict[str, Any]:
    request = entry.job.request
    estimate = intake.estimate(entry)
    waited_s = intake.service.now() - entry.arrived_at
    if entry.first_token_at is None:
        status = "held" if entry.admitted_at is None else "queued"
    else:
        status = "evicted" if intake.waits(entry) else "running"
    return {
        "id": entry.id,
        "object": "queue.request",
        "model": request.model,
        "slo_class": entry.slo.name,
        "status": status,
        "queue_position": estimate.position if estimate is not None else None,
        "waited_seconds": waited_s,
        "estimated_wait_seconds": estimate.median_s if estimate is not None else None,
        "estimated_wait_p90_seconds": estimate.p90_s if estimate is not None else None,
        "target_in_seconds": entry.slo.ttft_s - waited_s,
    }
