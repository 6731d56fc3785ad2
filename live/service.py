"""The live service: the scheduler core in front of real engines, as one object.

Puts core, runtime, engines, solver and clock together. Decides nothing: jobs go in, orders go out to the
engines, and what these say comes back on the jobs' tickets.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from live.clock import Settler, WallClock
from live.engines.attempt import LiveRequest
from live.engines.instance import Instance, Status
from live.engines.port import LiveEngines
from live.jobs import Failed, Job, Resume
from live.snapshot import snapshot
from live.solver import ProcessSolver
from live.ticket import Ticket
from qlm_sim.core.actions import Action
from qlm_sim.core.events import Event, RequestArrived, RequestCancelled
from qlm_sim.core.forecast import Forecast
from qlm_sim.core.lifecycle import State
from qlm_sim.core.types import Request
from qlm_sim.policies import SchedulerSettings, make_core
from qlm_sim.runtime import Runtime

log = logging.getLogger(__name__)

Listener = Callable[[float, Sequence[Event], Sequence[Action]], None]
"""Told each settle: (seconds since the start, events, actions)."""

DRAIN_POLL_S = 0.05
QUICK_S, FORECASTING = 1e-3, 0.2
"""Forecasts that take longer may take this share of the time, so that there is time to serve ..."""
MOST_FRESH_S = 1.0
"""... but none serves for longer: one that the machine held up says nothing of the others."""
CANCELLED = 499
"""nginx's status for a client that went away."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model."""

    name: str
    max_model_len: int
    """Longest prompt and output in tokens that any of its instances takes."""
    instances: tuple[str, ...]


class _Listeners:
    """The runtime's recorder port: passes every settle on."""

    def __init__(self) -> None:
        self.all: list[Listener] = []

    def record(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None:
        for listener in self.all:
            listener(now, events, actions)


class Service:
    """Made anywhere; ``start`` and all that follows belong to one event loop."""

    def __init__(
        self,
        instances: Iterable[Instance],
        *,
        policy: str = "qlm",
        settings: SchedulerSettings | None = None,
        solver_process: bool = True,
    ) -> None:
        """``solver_process``: solve plans in a process of its own, not in place."""
        self.clock = WallClock()
        self.engines = LiveEngines()
        self.core = make_core(policy, [], replace(settings or SchedulerSettings(), forecasts=True))
        self.solver = ProcessSolver(self._plan_ready)
        self.draining = False
        self.failure: Exception | None = None
        """What broke the core, if something did: nothing is served any more."""
        self._instances = list(instances)
        self._listeners = _Listeners()
        self._runtime = Runtime(self.core, self.engines, self.solver, self._listeners)
        self._solver_process = solver_process
        self._settler: Settler | None = None
        self._unsettled: set[str] = set()
        """Arrived since the last settle."""
        self._models: dict[str, int] = {}
        """Instances by the models that they may serve."""
        self._cancels: list[str] = []
        """Cancelled since, before the core has heard of them."""

    # Life.

    async def start(self) -> None:
        """Bring the engines up. Does not wait for them: their work waits in the queue."""
        self._settler = Settler(self._runtime, self.clock, self._crashed)
        self._listeners.all.append(self._settled)
        if self._solver_process:
            self.solver.start()
        for instance in self._instances:
            self.add_instance(instance)

    def add_instance(self, instance: Instance) -> None:
        """Let an instance join."""
        settler = self._on()
        self.engines.connect([instance], settler.post, settler.settle_now, self.clock.now)
        for model in instance.models:
            self._models[model] = self._models.get(model, 0) + 1
        instance.start()

    async def remove_instance(self, instance_id: str) -> None:
        """Let an instance leave. What runs there goes on elsewhere."""
        instance = self.engines.instances[instance_id]
        for model in instance.models:
            self._models[model] -= 1
            if not self._models[model]:
                del self._models[model]
        await instance.leave()
        del self.engines.instances[instance_id]

    async def wait_up(self, timeout_s: float | None = None) -> None:
        """Until every instance serves. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while any(each.status is Status.STARTING for each in self.engines.instances.values()):
                await asyncio.sleep(0.02)
            await asyncio.sleep(0)  # the core hears of the last

    async def drain(self, timeout_s: float) -> None:
        """Take no new work, give back what waits (503), let what runs end, then stop."""
        self.draining = True
        core = self.core
        for request_id, live in list(self.engines.requests.items()):
            item = core.requests.get(request_id)
            if live.attempt is None or item is None or item.state is State.WAITING:
                self._end(live, Failed(503, "the server is shutting down"))
        try:
            async with asyncio.timeout(timeout_s):
                while self.engines.requests:
                    await asyncio.sleep(DRAIN_POLL_S)
        except TimeoutError:
            log.warning("%d requests are cut off", len(self.engines.requests))
        await self.stop()

    async def stop(self) -> None:
        """End everything at once."""
        self.draining = True
        if self._settler is not None:
            self._settler.stop()
        self.solver.stop()
        await asyncio.gather(*(instance.stop() for instance in self.engines.instances.values()))
        for live in list(self.engines.requests.values()):
            live.ticket.end(Failed(503, "the server is shutting down"))
        self.engines.requests.clear()

    # Jobs.

    def now(self) -> float:
        """Seconds since the service's start: what the core is told."""
        return self.clock.now()

    def submit(self, job: Job, *, resume: Resume | None = None) -> Ticket:
        """Queue a job. ``resume``: how far it had come before a restart, from ``checkpoint``."""
        live = LiveRequest(job, resume)
        request = job.request
        if self.draining or self.failure is not None:
            live.ticket.end(Failed(503, "the server is shutting down"))
        elif request.model not in self._models:
            live.ticket.end(Failed(404, f"model {request.model!r} is not served"))
        else:
            assert request.id not in self.engines.requests, f"two requests have the id {request.id}"
            self.engines.requests[request.id] = live
            self._unsettled.add(request.id)
            self._on().post(RequestArrived(request, len(resume.token_ids) if resume is not None else 0))
        return live.ticket

    def cancel(self, request_id: str) -> None:
        """End a job that nobody wants any more. One that is over is ignored."""
        live = self.engines.requests.get(request_id)
        if live is not None:
            self._end(live, Failed(CANCELLED, "cancelled"))

    def waits(self, request_id: str) -> bool:
        """Whether a job is in the scheduler and no engine has it: it has not begun, or was evicted."""
        item = self.core.requests.get(request_id)
        return item is not None and item.state is State.WAITING

    def forecast(self, request_id: str) -> Forecast | None:
        """The wait, from now, for the first token of a job; None where it has one, or where its model has
        no engine now."""
        return self._forecast(partial(self.core.forecast, request_id))

    def forecast_new(self, request: Request) -> Forecast | None:
        """The wait of a request if it arrived now; None where its model has no engine now."""
        if not self.core.serves(request.model):
            return None
        return self._forecast(partial(self.core.forecast_new, request))

    def _forecast(self, ask: Callable[[float], Forecast | None]) -> Forecast | None:
        """In a burst everybody asks, of a line that always changes: what takes long serves for a while."""
        began = time.perf_counter()
        forecast = ask(self.now())
        took_s = time.perf_counter() - began
        if took_s > QUICK_S:
            self.core.forecaster.fresh_s = min(MOST_FRESH_S, took_s / FORECASTING)
        return forecast

    def checkpoint(self, request_id: str, least_tokens: int) -> Resume | None:
        """How far a job that does not stream has come, to go on from there after a restart.

        None where it has not generated so many tokens, or where it can only begin anew.
        """
        live = self.engines.requests.get(request_id)
        if live is None or live.job.pinned or len(live.transcript.token_ids) < least_tokens:
            return None
        return live.transcript.checkpoint(live.ticket.held_text())

    def _end(self, live: LiveRequest, output: Failed) -> None:
        live.ticket.end(output)
        if live.cancelled:
            return
        live.cancelled = True
        if live.id in self._unsettled:
            self._cancels.append(live.id)  # the core takes an arrival after a cancellation of one instant
        else:
            self._cancel(live)

    def _cancel(self, live: LiveRequest) -> None:
        item = self.core.requests.get(live.id)
        if item is None or item.state is State.WAITING:
            self.engines.requests.pop(live.id, None)
        elif item.state is State.EVICTING and live.attempt is not None:
            # It was to be evicted and could not go on elsewhere, so it was left alone; now it can end.
            live.attempt.instance.evict(live, live.attempt.number)
        self._on().post(RequestCancelled(live.id))

    # What the gateway shows.

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """By name, what any instance may serve, up or not."""
        found: dict[str, list[tuple[str, int]]] = {}
        for instance in self._known():
            for name, profile in instance.models.items():
                found.setdefault(name, []).append((instance.id, profile.max_model_len))
        return {
            name: ModelInfo(name, max(length for _, length in each), tuple(i for i, _ in each))
            for name, each in found.items()
        }

    @property
    def holds_back(self) -> bool:
        """Whether engines get only what they can run at once, and all else waits in the scheduler."""
        return self.core.policy.holds_back

    def snapshot(self) -> dict[str, Any]:
        """The instances, their virtual queues and what runs, as plain data."""
        return snapshot(self.core, self.engines.instances, self.now())

    def add_listener(self, listener: Listener) -> None:
        self._listeners.all.append(listener)

    def _known(self) -> Iterable[Instance]:
        return self.engines.instances.values() or self._instances

    # Inside.

    def _on(self) -> Settler:
        assert self._settler is not None, "the service has not been started"
        return self._settler

    def _plan_ready(self) -> None:
        if self._settler is not None:
            self._settler.settle_soon()

    def _settled(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None:
        self._unsettled.clear()
        if self._cancels:
            cancels, self._cancels = self._cancels, []
            for request_id in cancels:
                live = self.engines.requests.get(request_id)
                if live is not None:
                    asyncio.get_running_loop().call_soon(self._cancel, live)

    def _crashed(self, error: Exception) -> None:
        log.critical("the scheduler core broke: nothing is served any more", exc_info=error)
        self.failure = error
        for live in list(self.engines.requests.values()):
            live.ticket.end(Failed(500, "the scheduler broke"))
        self.engines.requests.clear()
