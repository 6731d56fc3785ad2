"""One instance: a place that serves one model at a time, with the attempts that run there.

Carries out the core's orders, reports, and finds out when its engine is gone or hangs. What was running
there then goes on elsewhere, from the tokens that were heard of it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from enum import Enum

from live.engines.attempt import MOST_CRASHES, MOST_LOST, Attempt, LiveRequest
from live.engines.backend import Backend, EngineError, EngineState
from live.engines.busy_clock import BusyClock
from live.engines.capacity import fitted
from live.engines.residency import Residency
from live.engines.watch import MOST_MISSES, Watch
from live.jobs import Failed
from qlm_sim.core.events import (
    EngineReported,
    Event,
    InstanceDown,
    InstanceUp,
    ModelSwapped,
    Progress,
    RequestEvicted,
    RequestFailed,
)
from qlm_sim.core.types import InstanceSpec, ModelOnInstance

log = logging.getLogger(__name__)


class Status(Enum):
    STARTING = "starting"
    UP = "up"
    SWAPPING = "swapping"
    DOWN = "down"
    """Gone; it is being started or looked for again."""
    LEFT = "left"


class Instance:
    """One instance of the live cluster."""

    def __init__(
        self,
        instance_id: str,
        residency: Residency,
        models: Mapping[str, ModelOnInstance],
        resident: str,
        *,
        watch: Watch | None = None,
        host_bytes: int = 0,
    ) -> None:
        """``models``: what the profile promises of each; what the engine tells of its capacity counts more.

        ``host_bytes``: host memory in which the weights of sleeping models lie; 0 where a swap loads them
        from storage.
        """
        self.id = instance_id
        self.status = Status.STARTING
        self.models = dict(models)
        self.model = resident
        """The model that is loaded, or that is to be at the start."""
        self.swapping_to: str | None = None
        self.running: dict[str, Attempt] = {}
        self.crashes = 0
        self._residency = residency
        self._resident = resident
        self._watch = watch = watch or Watch()
        self._host_bytes = host_bytes
        self._backend: Backend | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard_at = 0.0
        self._backoff_s = watch.backoff_s
        self._up_at = 0.0
        self._busy = BusyClock()
        self._misses = 0
        self._swapped_to: set[str] = set()

    def connect(
        self,
        requests: dict[str, LiveRequest],
        post: Callable[[Event], None],
        settle_now: Callable[[], None],
        now: Callable[[], float],
    ) -> None:
        """Become part of a service: its requests by id, and the way to its core."""
        self._requests = requests
        self._post = post
        self._settle_now = settle_now
        self._now = now

    @property
    def spec(self) -> InstanceSpec:
        """What the core may know of it now."""
        held = tuple(self.models) if self._host_bytes else ()
        return InstanceSpec(self.id, dict(self.models), self.model, self._host_bytes, held)

    @property
    def backend(self) -> Backend | None:
        """The engine of the loaded model, once it is up."""
        return self._backend

    # Coming and going.

    def start(self) -> None:
        """Come up, and be watched from then on. Does not wait."""
        self._residency.when_gone(self.go_down)
        self._spawn(self._come_up(0.0))
        self._spawn(self._keep_watch())

    async def leave(self) -> None:
        """Go away for good. What runs here goes on elsewhere."""
        self._abandon()
        self.status = Status.LEFT
        await self.stop()

    async def stop(self) -> None:
        """End everything, the engine included where it is ours."""
        self.status = Status.LEFT
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._residency.stop(kill=False)

    def go_down(self, reason: str) -> None:
        """The engine is of no use any more: tell the core, and bring it back."""
        if self.status not in (Status.UP, Status.SWAPPING):
            return
        log.error("engine %s is down: %s", self.id, reason)
        self.crashes += 1
        self._abandon()
        if self._now() - self._up_at > 2 * self._backoff_s + 10 * self._watch.report_s:
            self._backoff_s = self._watch.backoff_s  # it had been well for a while
        self._spawn(self._come_up(self._backoff_s))

    def _abandon(self) -> None:
        if self.status not in (Status.UP, Status.SWAPPING):
            return
        self.status = Status.DOWN
        self.swapping_to = None
        attempts = list(self.running.values())
        self.running.clear()
        self._busy.stop(self._now())
        for attempt in attempts:
            live = attempt.live
            if not attempt.over:
                if self._backend is not None:
                    self._backend.forget(attempt)
                attempt.detach()
            live.crashes += 1
            if live.movable:
                self._post(Progress(live.id, attempt.number, self.id, live.cut()))
            if live.cancelled:
                self._requests.pop(live.id, None)
        if attempts:
            self._settle_now()  # so that the core knows what they have generated when it hears the rest
        self._post(InstanceDown(self.id))

    async def _come_up(self, delay_s: float) -> None:
        while True:
            try:
                if delay_s:
                    await self._residency.stop(kill=True)
                    await asyncio.sleep(delay_s)
                backend = await self._residency.start(self._resident)
                facts_of = self._residency.facts_of
                self.models = {name: fitted(each, facts_of(name)) for name, each in self.models.items()}
                break
            except EngineError as error:
                log.error("engine %s does not start: %s", self.id, error)
            except Exception:
                log.exception("engine %s does not start", self.id)
            delay_s = self._backoff_s
            self._backoff_s = min(2 * self._backoff_s, self._watch.most_backoff_s)
        self._backend = backend
        self.model = self._resident
        self.status = Status.UP
        self._misses = 0
        self._up_at = self._heard_at = self._now()
        log.info("engine %s is up, serving %s", self.id, self.model)
        self._post(InstanceUp(self.spec))

    # Orders.

    def pull(self, live: LiveRequest, number: int) -> None:
        """Begin attempt ``number`` of the request."""
        if self.status is not Status.UP:
            return  # it went down in this instant; the core hears of it next
        if not live.movable:
            self._refuse(
                live, number, 502, "the engine was lost, and the output cannot be taken up elsewhere"
            )
            return
        if live.lost > MOST_LOST or live.crashes > MOST_CRASHES:
            self._refuse(live, number, 502, "every engine that had it was lost")
            return
        assert self._backend is not None
        backend = self._backend
        try:
            self._begin(live, number, backend)
        except Exception as error:  # whatever a client may have sent must not break the core
            log.exception("request %s cannot be sent to engine %s", live.id, self.id)
            if live.attempt is not None:
                backend.forget(live.attempt)
                self._drop(live.attempt)
                live.attempt.detach()
            self._refuse(live, number, 400, f"the request cannot be sent to an engine: {error}")

    def _begin(self, live: LiveRequest, number: int, backend: Backend) -> None:
        attempt = live.attempt = Attempt(live, number, self, self._post)
        self.running[live.id] = attempt
        if len(self.running) == 1:
            self._heard_at = self._now()
            self._busy.start(self._heard_at)
        if attempt.max_tokens is not None and attempt.max_tokens <= 0:
            attempt.finish(attempt.output_tokens)
        else:
            backend.start(attempt)

    def _refuse(self, live: LiveRequest, number: int, status: int, reason: str) -> None:
        self._post(RequestFailed(live.id, number, self.id, reason))
        self._requests.pop(live.id, None)
        live.ticket.end(Failed(status, reason))

    def evict(self, live: LiveRequest, number: int) -> None:
        """Take the request back, unless it can only go on here."""
        attempt = live.attempt
        if attempt is None or attempt.number != number or attempt.instance is not self or attempt.over:
            return
        if live.movable or live.cancelled:
            attempt.evicting = True
            assert self._backend is not None
            self._backend.abort(attempt)

    def swap(self, model: str) -> None:
        """Serve ``model`` instead of the loaded one. Nothing runs here."""
        if self.status is Status.UP:
            self.status = Status.SWAPPING
            self.swapping_to = model
            self._spawn(self._swap(model))

    async def _swap(self, model: str) -> None:
        start = self._now()
        try:
            backend = await self._residency.swap(self.model, model, self._patience_s(model))
        except Exception as error:
            if not isinstance(error, EngineError):
                log.exception("engine %s does not swap to %s", self.id, model)
            self.go_down(f"swap to {model}: {error}")
            return
        if self.status is not Status.SWAPPING:
            return
        swap_s = self._now() - start
        self._backend = backend
        self.model = model
        self.swapping_to = None
        self.status = Status.UP
        self._swapped_to.add(model)
        before = self.models[model]
        self.models[model] = (
            replace(before, swap_in_s=swap_s) if self._host_bytes else replace(before, load_s=swap_s)
        )
        self._post(ModelSwapped(self.id, model, swap_s))

    def _patience_s(self, model: str) -> float:
        """After which a swap to the model is given up."""
        profile = self.models[model]
        expected_s = profile.swap_in_s if self._host_bytes else profile.load_s
        return self._watch.swap_patience_s(expected_s, measured=model in self._swapped_to)

    # What the attempts tell.

    def heard(self) -> None:
        self._heard_at = self._now()

    def over(self, attempt: Attempt) -> None:
        """It is finished."""
        self._drop(attempt)
        self._requests.pop(attempt.live.id, None)

    def failed(self, attempt: Attempt, reason: str) -> None:
        self._drop(attempt)
        self._requests.pop(attempt.live.id, None)
        self._post(RequestFailed(attempt.live.id, attempt.number, self.id, reason))

    def gave_back(self, attempt: Attempt) -> None:
        """It is off the engine, and can go on elsewhere."""
        if self.running.get(attempt.live.id) is not attempt:
            return
        self._drop(attempt)
        live = attempt.live
        if live.cancelled:
            self._requests.pop(live.id, None)
        kept = live.cut() if live.movable else attempt.output_tokens
        self._post(RequestEvicted(live.id, attempt.number, self.id, kept, kv_on_host=False))

    def lost(self, attempt: Attempt, reason: str) -> None:
        """Its connection broke. Is the engine still there? Then the request alone is tried again."""
        log.warning("engine %s lost request %s: %s", self.id, attempt.live.id, reason)
        attempt.live.lost += 1
        self._spawn(self._look_after(attempt))

    async def _look_after(self, attempt: Attempt) -> None:
        if not await self._answers():
            self.go_down("it does not answer")
            return
        await asyncio.sleep(min(2.0, self._watch.retry_s * 2 ** (attempt.live.lost - 1)))
        self.gave_back(attempt)

    def _drop(self, attempt: Attempt) -> None:
        self.running.pop(attempt.live.id, None)
        if not self.running:
            self._busy.stop(self._now())

    # Watching.

    async def _answers(self) -> bool:
        if self.status is not Status.UP or self._backend is None:
            return True  # somebody knows already
        try:
            async with asyncio.timeout(self._watch.answer_s):
                return await self._backend.healthy()
        except Exception as error:
            if not isinstance(error, (EngineError, TimeoutError)):
                log.exception("engine %s does not say whether it is well", self.id)
            return False

    async def _keep_watch(self) -> None:
        watch = self._watch
        while True:
            await asyncio.sleep(watch.report_s)
            backend = self._backend
            if self.status is not Status.UP or backend is None:
                continue
            try:
                async with asyncio.timeout(watch.answer_s):
                    state = await backend.state()
            except Exception as error:
                if not isinstance(error, (EngineError, TimeoutError)):
                    log.exception("engine %s does not report", self.id)
                self._misses += 1
                if self._misses >= MOST_MISSES and self._backend is backend:
                    self.go_down(f"no report: {error or 'it does not answer'}")
                continue
            if self.status is not Status.UP or self._backend is not backend:
                continue
            self._misses = 0
            self._report(state)
            silent_s = self._now() - self._heard_at
            if self.running and silent_s > watch.stall_s:
                self.go_down(f"it has said nothing for {silent_s:.0f} s, with {len(self.running)} running")

    def _report(self, state: EngineState) -> None:
        """Tell the core how it stands. The tokens are ours to know: we have heard each of them."""
        kv_tokens = 0
        for live_id, attempt in self.running.items():
            if attempt.began and not attempt.over:
                kv_tokens += attempt.context_tokens
                self._post(Progress(live_id, attempt.number, self.id, attempt.output_tokens))
        ours = len(self.running)
        self._post(
            EngineReported(
                instance=self.id,
                running=max(state.running, ours - state.waiting),
                waiting=state.waiting,
                kv_tokens=kv_tokens,
                kv_utilization=state.kv_utilization,
                busy_s=self._busy.seconds(self._now()),
                preemptions=state.preemptions,
            )
        )

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
