"""The gateway: routes, and the life of what stands behind them.

A gateway that leads has a house: service, intake, batch runner. One that does not passes on to the leader
what needs a house; files and batches it takes itself, they go to the store that all share.
"""

import asyncio
import logging
import socket
import uuid
from collections.abc import Callable
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from live.build import promise
from live.config import LiveConfig
from live.gateway.batch_runner import BatchRunner
from live.gateway.batches import Batches
from live.gateway.completions import Completions
from live.gateway.dashboard import DashboardFeed, page
from live.gateway.ending import end_tasks
from live.gateway.errors import ApiError, retry_later
from live.gateway.fair import FairWindows
from live.gateway.files import Files, list_object
from live.gateway.forward import Forwarder
from live.gateway.intake import Intake, Scheduling
from live.gateway.job_maker import JobMaker
from live.gateway.leadership import Leadership, own_url
from live.gateway.logs import RequestLog
from live.gateway.metrics import Metrics, wall_seconds
from live.gateway.queue import Queue
from live.gateway.responses import JsonResponse
from live.gateway.tenants import Tenants
from live.jobs import CHAT, COMPLETIONS
from live.store.interface import Store, StoreError

FORM_MIB = 1.0
"""What the form around an uploaded file may take. The leader holds each body to its own limit."""

log = logging.getLogger(__name__)


class LiveService(Scheduling, Protocol):
    """``live.service.Service``, as far as the gateway goes."""

    solver: Any

    async def start(self) -> None: ...

    async def drain(self, timeout_s: float) -> None: ...

    async def stop(self) -> None: ...

    def snapshot(self) -> dict[str, Any]: ...

    @property
    def models(self) -> Any: ...


class House:
    """Everything that schedules, on the leader."""

    def __init__(
        self, config: LiveConfig, store: Store, service: LiveService, tenants: Tenants, metrics: Metrics
    ) -> None:
        self.service = service
        slots = sum(engine.max_num_seqs for engine in config.engine)
        window = float("inf") if len(config.tenant) < 2 else float(config.fairness.window or slots)
        self.intake = Intake(
            service,
            FairWindows(window, {tenant.name: tenant.weight for tenant in config.tenant}),
            metrics,
            max_queued=config.gateway.max_queued,
            late_quantile=config.admission.late_quantile if config.admission.refuse_late else None,
        )
        maker = JobMaker(config, {name: model.max_model_len for name, model in service.models.items()})
        self.completions = {
            endpoint: Completions(endpoint, config, self.intake, tenants, maker)
            for endpoint in (COMPLETIONS, CHAT)
        }
        self.runner = BatchRunner(config, store, self.intake, tenants, maker)
        self.feed = DashboardFeed(service, self.intake, metrics, self.runner, config)
        service.add_listener(metrics.settled)
        service.add_listener(self.feed.settled)

    async def open(self) -> None:
        await self.service.start()
        self.runner.start()

    async def close(self, drain_s: float | None) -> None:
        """``drain_s``: let interactive work that runs end for so long; None ends it at once.

        Batch lines go back to the store first, so that none is answered with the end of the service.
        """
        self.intake.draining = True
        await self.runner.close(keep=drain_s is not None)
        if drain_s is None:
            await self.service.stop()
        else:
            await self.service.drain(drain_s)
        self.feed.close()


class Gateway:
    """One gateway process. ``app`` is the ASGI application."""

    def __init__(
        self,
        config: LiveConfig,
        store: Store,
        make_service: Callable[[], LiveService],
        *,
        port: int | None = None,
    ) -> None:
        """``make_service``: called when this gateway becomes the leader. ``port``: the one it really has."""
        self.config = config
        self.draining = False
        self.house: House | None = None
        self.metrics = Metrics(RequestLog(config.gateway.log) if config.gateway.log_requests else None)
        self._started_at = wall_seconds()
        self._store = store
        self._make_service = make_service
        self._tenants = Tenants(config.tenant)
        self._url = own_url(config.gateway, port or config.gateway.port)
        most_mib = max(config.gateway.max_body_mib, config.batch.max_file_mib + FORM_MIB)
        self._forward = Forwarder(store.leader, self._url, int(most_mib * 2**20))
        owner = f"{socket.gethostname()}-{uuid.uuid4().hex}"
        self._leadership = Leadership(store, owner, self._url, config.store.lease_s)
        self._leading: asyncio.Task[None] | None = None
        self.app = self._make_app()

    # Life.

    async def start(self) -> None:
        """Begin to serve; returns when this gateway schedules, or knows that another one does."""
        loop = asyncio.get_running_loop()
        self._leading = loop.create_task(self._leadership.keep(self._open, self._lost))
        known = loop.create_task(self._leadership.known.wait())
        await asyncio.wait({self._leading, known}, return_when=asyncio.FIRST_COMPLETED)
        known.cancel()
        if self._leading.done():
            self._leading.result()

    async def fail(self) -> None:
        """Raises what ends the scheduling, when something does; returns never."""
        assert self._leading is not None, "the gateway has not been started"
        await asyncio.shield(self._leading)

    async def _open(self) -> None:
        if self.draining:
            return  # the lease was lost and won again meanwhile; it is given back soon
        house = House(self.config, self._store, self._make_service(), self._tenants, self.metrics)
        await house.open()
        self.house = house

    async def _lost(self) -> None:
        house, self.house = self.house, None
        if house is not None:
            await house.close(None)

    async def close(self) -> None:
        """Drain: no new work, what runs may end, what waits is given back or stays in the store.

        The lease is kept until the end, so that no other gateway schedules on the same engines meanwhile.
        """
        self.draining = True
        drain_s = self.config.gateway.drain_s
        if self.house is None:
            await self._stop_leading()
            await self._forward.close(drain_s)
        else:
            await asyncio.gather(self.house.close(drain_s), self._forward.close(drain_s))
            await self._stop_leading()
        await self._store.close()

    async def _stop_leading(self) -> None:
        if self._leading is None:
            return
        await end_tasks([self._leading])
        try:
            await self._leadership.resign()
        except Exception as error:
            log.warning("the lease is left to run out: %s", error or type(error).__name__)

    # Routes.

    def _make_app(self) -> Starlette:
        files = Files(self.config, self._store, self._tenants)
        batches = Batches(self.config, self._store, self._tenants, self._wake)
        queue = Queue(self._store, self._tenants, lambda: self._house.intake, lambda: self._house.runner.pace)
        return Starlette(
            routes=[
                Route("/v1/completions", _Hot(self, COMPLETIONS)),
                Route("/v1/chat/completions", _Hot(self, CHAT)),
                Route("/v1/models", self._models),
                Route("/v1/models/{model:path}", self._model),
                Route("/v1/files", files.create, methods=["POST"]),
                Route("/v1/files", files.index),
                Route("/v1/files/{file_id}", files.retrieve),
                Route("/v1/files/{file_id}", files.delete, methods=["DELETE"]),
                Route("/v1/files/{file_id}/content", files.content),
                Route("/v1/batches", batches.create, methods=["POST"]),
                Route("/v1/batches", batches.index),
                Route("/v1/batches/{batch_id}", batches.retrieve),
                Route("/v1/batches/{batch_id}/cancel", batches.cancel, methods=["POST"]),
                Route("/v1/queue", _Led(self, queue.index)),
                Route("/v1/queue/{request_id}", _Led(self, queue.retrieve)),
                Route("/metrics", self._show_metrics),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/dashboard", self._dashboard),
                Route("/dashboard/events", _Led(self, self._dashboard_events)),
            ],
            exception_handlers={
                ApiError: _api_error,
                HTTPException: _http_error,
                StoreError: _store_trouble,
                Exception: _bug,
            },
        )

    @property
    def _house(self) -> House:
        assert self.house is not None, "only the leader is asked"
        return self.house

    def _wake(self) -> None:
        if self.house is not None:
            self.house.runner.wake()

    async def _models(self, request: Request) -> Response:
        self._tenants.identify(request.headers.get("authorization"))
        models = [self._model_object(each.name) for each in self.config.model]
        return JsonResponse(list_object(models, False))

    async def _model(self, request: Request) -> Response:
        self._tenants.identify(request.headers.get("authorization"))
        name = request.path_params["model"]
        if name not in [each.name for each in self.config.model]:
            raise ApiError(404, f"The model {name!r} does not exist.", code="model_not_found", param="model")
        return JsonResponse(self._model_object(name))

    def _model_object(self, name: str) -> dict[str, Any]:
        """As OpenAI tells a model, and vLLM its context."""
        if self.house is not None and name in self.house.service.models:
            longest = self.house.service.models[name].max_model_len
        else:
            (model,) = (each for each in self.config.model if each.name == name)
            engines = (engine for engine in self.config.engine if name in engine.models)
            longest = max(promise(engine, model).max_model_len for engine in engines)
        return {
            "id": name,
            "object": "model",
            "created": self._started_at,
            "owned_by": "qlm",
            "max_model_len": longest,
        }

    async def _health(self, request: Request) -> Response:
        """200 while this process serves; 503 while it drains, or when the scheduler broke."""
        failure = self.house.service.failure if self.house is not None else None
        status = "draining" if self.draining else "failed" if failure is not None else "ok"
        return JsonResponse(
            {"status": status, "leader": self.house is not None}, 200 if status == "ok" else 503
        )

    async def _ready(self, request: Request) -> Response:
        """200 when a request would be served now: an engine is up, here or behind the leader."""
        if self.draining:
            raise ApiError(503, "The server is shutting down.")
        if self.house is None:
            if await self._store.leader() in (None, self._url):
                raise ApiError(503, "No gateway schedules at present.")
            return JsonResponse({"status": "ready"})
        states = {each["id"]: each["status"] for each in self.house.service.snapshot()["instances"]}
        if "up" not in states.values():
            raise ApiError(503, f"No engine is up: {states}.")
        return JsonResponse({"status": "ready", "instances": states})

    async def _show_metrics(self, request: Request) -> Response:
        self._check_admin(request)
        house = self.house
        text = self.metrics.text(
            house.service.snapshot() if house is not None else None,
            house.feed.waiting() if house is not None else {},
            house.intake.by_tenant() if house is not None else {},
            house.intake.windows.held_by_tenant() if house is not None else {},
            house.runner.lines if house is not None else {},
            house is not None,
        )
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _dashboard(self, request: Request) -> Response:
        self._check_admin(request)
        return Response(page(), media_type="text/html; charset=utf-8", headers={"cache-control": "no-cache"})

    async def _dashboard_events(self, request: Request) -> Response:
        self._check_admin(request)
        return self._house.feed.stream()

    def _check_admin(self, request: Request) -> None:
        key = self.config.gateway.admin_key
        given = request.query_params.get("key") or request.headers.get("authorization", "").removeprefix(
            "Bearer "
        )
        if key is not None and given != key:
            raise ApiError(401, "This page wants the gateway's admin_key (header or ?key=).")


class _Hot:
    """A completions endpoint: served here by the leader, passed on by others."""

    def __init__(self, gateway: Gateway, endpoint: str) -> None:
        self._gateway = gateway
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        house = self._gateway.house
        if house is None:
            await self._gateway._forward(scope, receive, send)
        else:
            await house.completions[self._endpoint](scope, receive, send)


class _Led:
    """A handler that only the leader can serve."""

    def __init__(self, gateway: Gateway, handler: Callable[[Request], Any]) -> None:
        self._gateway = gateway
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._gateway.house is None:
            await self._gateway._forward(scope, receive, send)
        else:
            response = await self._handler(Request(scope, receive))
            await response(scope, receive, send)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error.json(), error.status, error.headers, "application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}")
    return Response(told.json(), error.status_code, error.headers, "application/json")


async def _store_trouble(request: Request, error: Exception) -> Response:
    log.error("%s %s: %s", request.method, request.url.path, error)
    return await _api_error(
        request,
        retry_later(503, "The store of files and batches cannot be used at present.", 5, "store_unavailable"),
    )


async def _bug(request: Request, error: Exception) -> Response:
    return Response(ApiError(500, "The server failed.").json(), 500, media_type="application/json")
