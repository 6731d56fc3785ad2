"""The way into the scheduler: fair shares, limits, estimates, and the story of every request.

Requests of a tenant beyond its fair share wait here (``live.gateway.fair``); when one is let in, its time to
the first token counts from then for the scheduler, so that a flood's old requests do not go before another
tenant's new ones. One that has missed its target here gets a longer one: else those of a flood, each as
urgent as if it had just come, would go before another tenant's of a wider class for ever. What the client
has waited is counted from its arrival, and against its own target, in metrics and answers.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from msgspec import structs

from live.clock import WallClock
from live.gateway.errors import ApiError, retry_later
from live.gateway.fair import FairWindows
from live.gateway.slo import Slo
from live.gateway.tenants import Tenant, check_limits
from live.jobs import Failed, Finished, Job, Resume
from live.ticket import Ticket
from qlm_sim.core.actions import Action, Pull
from qlm_sim.core.events import Event, FirstToken
from qlm_sim.core.forecast import Forecast
from qlm_sim.core.types import Request

FRESH_S = 0.1
ADMISSIONS = 0.1
"""Weight of the newest interval between two requests let in, in its running mean."""


class Scheduling(Protocol):
    """What the intake and the batches need of ``live.service.Service``."""

    clock: WallClock
    failure: Exception | None
    """What broke it, if something did: nothing is served any more."""

    @property
    def holds_back(self) -> bool:
        """Whether engines get only what they can run at once."""
        ...

    def now(self) -> float: ...

    def submit(self, job: Job, *, resume: Resume | None = None) -> Ticket: ...

    def checkpoint(self, request_id: str, least_tokens: int) -> Resume | None: ...

    def cancel(self, request_id: str) -> None: ...

    def waits(self, request_id: str) -> bool: ...

    def forecast(self, request_id: str) -> Forecast | None: ...

    def forecast_new(self, request: Request) -> Forecast | None: ...

    def add_listener(self, listener: Callable[[float, Sequence[Event], Sequence[Action]], None]) -> None: ...


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a request can be told of its wait for the first token."""

    position: int
    """Requests that are served before it."""
    median_s: float
    p90_s: float


@dataclass(slots=True, eq=False)
class Entry:
    """One request in the house, and its story."""

    job: Job
    tenant: Tenant
    slo: Slo
    arrived_at: float
    """Seconds since the service's start; of a batch line, when its batch was made."""
    batch: bool
    resume: Resume | None = None
    """How far it had come before a restart."""
    estimate: Estimate | None = None
    """As told at the arrival."""
    at_once: bool = False
    """Whether an engine had it already when that was told."""
    admitted_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    output_tokens: int = 0
    pulled: bool = False
    """Whether an engine has had it."""
    held: bool = False
    """Whether it had to wait for its tenant's fair share."""
    over: bool = False
    _ticket: Ticket | None = None
    _admitted: asyncio.Future[Ticket] | None = None

    async def ticket(self) -> Ticket:
        """Its output; waits until it is let in."""
        if self._ticket is not None:
            return self._ticket
        self._admitted = asyncio.get_running_loop().create_future()
        return await self._admitted

    @property
    def id(self) -> str:
        return self.job.request.id

    @property
    def ended(self) -> bool:
        """Whether its last output is there, read or not."""
        return self._ticket is not None and self._ticket.ended

    def let_in(self, ticket: Ticket) -> None:
        self._ticket = ticket
        if self._admitted is not None and not self._admitted.done():
            self._admitted.set_result(ticket)


class Watcher(Protocol):
    """Hears of first tokens and of requests that are over: the metrics."""

    def first_token(self, entry: Entry) -> None: ...

    def left(self, entry: Entry, outcome: str) -> None: ...

    def refused(self, tenant: str, reason: str) -> None: ...


@dataclass(slots=True)
class _Pace:
    """How often one tenant's requests of one class are let in while others are held."""

    at: float
    interval_s: float = 0.0


class Intake:
    """Every request of the gateway goes through here."""

    def __init__(
        self,
        service: Scheduling,
        windows: FairWindows,
        watcher: Watcher,
        *,
        max_queued: int,
        late_quantile: float | None,
    ) -> None:
        """``late_quantile``: refuse what is late at this quantile of its estimated wait; None: nothing."""
        self.service = service
        self.windows = windows
        self.entries: dict[str, Entry] = {}
        """Every request in the house."""
        self.interactive = 0
        """How many of them are no batch lines."""
        self.draining = False
        self._watcher = watcher
        self._max_queued = max_queued
        self._late_quantile = late_quantile
        self._paces: dict[tuple[str, str], _Pace] = {}
        self._pulled: dict[str, tuple[float, Estimate | None]] = {}
        """By model: the last estimate of a request that an engine had already, and when it was made."""
        service.add_listener(self._settled)

    def refuse_beyond_limits(self, tenant: Tenant, now: float, requests: int) -> None:
        """Refuse with ApiError 429 what is beyond the tenant's own limits."""
        try:
            check_limits(tenant, now, requests)
        except ApiError as error:
            self._watcher.refused(tenant.name, f"tenant_{error.code}")
            raise

    def submit(
        self, job: Job, tenant: Tenant, slo: Slo, *, batch: bool = False, resume: Resume | None = None
    ) -> Entry:
        """Take a request in, or refuse it with ApiError (429, 503)."""
        service = self.service
        now = service.now()
        entry = Entry(job, tenant, slo, job.request.arrived_at, batch, resume)
        if not batch:
            self._check_room(job, tenant)
            self.interactive += 1
            tenant.queued += 1
        self.entries[entry.id] = entry
        self._let_in(self.windows.offer(entry.id, tenant.name, job.request.slo_class), now)
        entry.held = entry.admitted_at is None
        return entry

    def finished(self, entry: Entry, output: Finished) -> None:
        """The request has its whole answer."""
        if entry.over:
            return
        now = self.service.now()
        if entry.first_token_at is None:  # it came with the last one
            entry.first_token_at = now
            self._watcher.first_token(entry)
        entry.finished_at = now
        entry.output_tokens = output.output_tokens
        self.over(entry, "finished")

    def over(self, entry: Entry, outcome: str) -> None:
        """The request is answered otherwise, or its client has gone. Ends it wherever it is."""
        if entry.over:
            return
        entry.over = True
        del self.entries[entry.id]
        if not entry.batch:
            self.interactive -= 1
            entry.tenant.queued -= 1
        if entry.admitted_at is not None and outcome not in ("finished", "failed", "rejected"):
            self.service.cancel(entry.id)
        elif entry.admitted_at is None:
            ticket = Ticket(entry.job)
            ticket.end(Failed(499, "cancelled"))
            entry.let_in(ticket)
        self._watcher.left(entry, outcome)
        self._let_in(self.windows.over(entry.id), self.service.now())

    def waits(self, entry: Entry) -> bool:
        """Whether no engine serves it: it is held, has not begun, or was evicted. Where engines get all that
        comes, those without a first token may wait in them."""
        if entry.admitted_at is None or self.service.waits(entry.id):
            return True
        return entry.first_token_at is None and not self.service.holds_back

    def estimate(self, entry: Entry) -> Estimate | None:
        """What can be told of its wait now; None once its first token is out, or while no engine is up."""
        if entry.first_token_at is not None or entry.over:
            return None
        request = entry.job.request
        if entry.pulled:
            return self._estimate_pulled(entry)
        if entry.admitted_at is not None:
            return _told(self.service.forecast(request.id))
        ahead = self.windows.ahead(entry.id) or 0
        pace = self._paces.get((entry.tenant.name, request.slo_class))
        held_s = ahead * pace.interval_s if pace is not None else 0.0
        told = _told(self.service.forecast_new(as_scheduled(request, self.service.now() + held_s)))
        if told is None:
            return None
        return Estimate(told.position + ahead, told.median_s + held_s, told.p90_s + held_s)

    def _estimate_pulled(self, entry: Entry) -> Estimate | None:
        """Of a request that an engine has: only its prefill is to come, and those that are there before it.

        One asked for within ``FRESH_S`` serves for all of a model: it would be about the same. Not so where
        the scheduler sends on whatever comes: then an engine's own queue may be long.
        """
        if not self.service.holds_back:
            return _told(self.service.forecast(entry.id))
        now = self.service.now()
        model = entry.job.request.model
        at, estimate = self._pulled.get(model, (-FRESH_S, None))
        if now - at >= FRESH_S:
            estimate = _told(self.service.forecast(entry.id))
            self._pulled[model] = now, estimate
        return estimate

    def by_tenant(self) -> dict[str, int]:
        """How many requests each tenant has in the house."""
        return Counter(entry.tenant.name for entry in self.entries.values())

    def _check_room(self, job: Job, tenant: Tenant) -> None:
        if self.draining:
            raise retry_later(503, "The server is shutting down.", 5, "shutting_down")
        if self.interactive >= self._max_queued:
            self._watcher.refused(tenant.name, "queue_full")
            raise retry_later(
                429, f"The queue is full: {self.interactive} requests.", self._wait_s(job), "queue_full"
            )
        if self._late_quantile is not None:
            self._check_late(job, tenant)

    def _check_late(self, job: Job, tenant: Tenant) -> None:
        assert self._late_quantile is not None
        pace = self._paces.get((tenant.name, job.request.slo_class))
        ahead = self.windows.held_by_tenant().get(tenant.name, 0)
        held_s = ahead * pace.interval_s if pace is not None else 0.0
        scheduled = as_scheduled(job.request, self.service.now() + held_s) if held_s else job.request
        forecast = self.service.forecast_new(scheduled)
        if forecast is None:
            return
        wait_s = held_s + forecast.quantile(self._late_quantile)
        late_s = wait_s - job.request.slo_s
        if late_s > 0:
            self._watcher.refused(tenant.name, "late")
            raise retry_later(
                429,
                f"The estimated wait of {wait_s:.1f} s is beyond the target of {job.request.slo_s:g} s.",
                late_s,
                "estimated_wait_too_long",
            )

    def _wait_s(self, job: Job) -> float:
        forecast = self.service.forecast_new(job.request)
        return forecast.quantile(0.5) if forecast is not None else 1.0

    def _let_in(self, ids: Sequence[object], now: float) -> None:
        service = self.service
        for request_id in ids:
            entry = self.entries[request_id]  # type: ignore[index]
            entry.admitted_at = now
            job = entry.job
            if entry.held and not entry.batch:
                job = replace(job, request=as_scheduled(job.request, now))
                self._count_pace(entry, now)
            entry.let_in(service.submit(job, resume=entry.resume))

    def _count_pace(self, entry: Entry, now: float) -> None:
        key = (entry.tenant.name, entry.job.request.slo_class)
        pace = self._paces.get(key)
        if pace is None:
            self._paces[key] = _Pace(now, now - entry.arrived_at)
        else:
            pace.interval_s += ADMISSIONS * (now - pace.at - pace.interval_s)
            pace.at = now

    def _settled(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None:
        entries = self.entries
        for event in events:
            if type(event) is FirstToken:
                entry = entries.get(event.request_id)
                if entry is not None and entry.first_token_at is None:
                    entry.first_token_at = now
                    self._watcher.first_token(entry)
        for action in actions:
            if type(action) is Pull:
                entry = entries.get(action.request_id)
                if entry is not None:
                    entry.pulled = True
                admitted = self.windows.pulled(action.request_id)
                if admitted:
                    asyncio.get_running_loop().call_soon(self._let_in_later, admitted)

    def _let_in_later(self, ids: Sequence[object]) -> None:
        """Outside the settle: a new arrival belongs to the next one."""
        self._let_in([each for each in ids if each in self.entries], self.service.now())


def as_scheduled(request: Request, now: float) -> Request:
    """As the scheduler is to see a request that is held until then.

    Its target is doubled until it is no shorter than it was held: doubled, so that groups stay few.
    """
    held_s = now - request.arrived_at
    slo_s = request.slo_s
    while slo_s < held_s:
        slo_s *= 2
    return structs.replace(request, arrived_at=now, slo_s=slo_s)


def _told(forecast: Forecast | None) -> Estimate | None:
    if forecast is None:
        return None
    return Estimate(forecast.position, forecast.quantile(0.5), forecast.quantile(0.9))
