"""One simulated instance: carries out orders, takes its time and tells what happened.

An iteration in which only decoding goes on is followed by others like it, so the engine leaps over
them to the next finish or to the step at which KV blocks run out, and is called back only then. An
order that comes in between cuts the leap at the end of the iteration under way. With ``longest_leap``
1 the same code steps through every iteration.

Knows the true output lengths. Knows nothing of the scheduler core beyond the orders it gets.
"""

from collections.abc import Callable

from qlm_sim.cluster.clock import Alarm, Clock
from qlm_sim.cluster.host_memory import HostMemory
from qlm_sim.cluster.leap import Leap
from qlm_sim.cluster.requests import SimRequest
from qlm_sim.cluster.scheduler import Scheduler
from qlm_sim.cluster.step_times import StepTimes
from qlm_sim.core.events import (
    EngineReported,
    Event,
    FirstToken,
    ModelSwapped,
    RequestEvicted,
    RequestFailed,
    RequestFinished,
)
from qlm_sim.core.types import InstanceSpec, ModelOnInstance, StepCost
from qlm_sim.models.engine_config import EngineConfig

# What an engine is doing.
ASLEEP = "asleep"
DUE = "due"
"""Between two iterations: it begins the next one when this instant has been decided upon."""
RUNNING = "running"
COPYING = "copying"
"""KV cache is on its way to host memory."""
SWAPPING = "swapping"


class _Model:
    """One model that an engine may serve, with the requests that it has for it."""

    __slots__ = ("name", "profile", "scheduler", "times")

    def __init__(self, name: str, profile: ModelOnInstance, scheduler: Scheduler, times: StepTimes) -> None:
        self.name = name
        self.profile = profile
        self.scheduler = scheduler
        self.times = times


class SimEngine:
    """Orders come in by ``pull``, ``evict`` and ``swap``; ``post`` takes the events.

    It puts itself on the list ``due`` when it wants ``begin`` to be called at the end of the instant.
    Requests come from ``store`` and leave it when they are over.
    """

    def __init__(
        self,
        spec: InstanceSpec,
        config: EngineConfig,
        clock: Clock,
        store: dict[str, SimRequest],
        due: list["SimEngine"],
        post: Callable[[Event], None],
        *,
        longest_leap: int,
        times_of: Callable[[StepCost], StepTimes],
    ) -> None:
        self.spec = spec
        self.state = ASLEEP
        self.host = HostMemory(spec)
        self._id = spec.id
        self._store = store
        self._due = due
        self._post = post
        self._longest_leap = longest_leap
        self._models = {
            name: _Model(name, profile, Scheduler(profile, config), times_of(profile.step))
            for name, profile in spec.models.items()
        }
        self._caches = [
            each.scheduler.cache for each in self._models.values() if each.scheduler.cache is not None
        ]
        self._loaded = self._models[spec.resident] if spec.resident is not None else None
        self._leap = Leap()
        self._alarm = Alarm(clock, self._ring)
        self._evictions: list[tuple[SimRequest, int, bool]] = []
        """Ordered in mid-iteration: the request, its attempt, whether to keep its KV cache."""
        self._copied_at = 0.0
        """When the last copy of KV cache to host memory is done."""
        self._loading: _Model | None = None
        """What to load next, as soon as the loaded model has run empty."""
        self._swap_s = 0.0
        self._intake_s = 0.0
        """What the requests that came since the last iteration began take before the next one."""
        self._busy_s = 0.0

    # Orders.

    def pull(self, now: float, request_id: str, attempt: int) -> None:
        """Take a request in. One that can never fit fails at once."""
        seq = self._store.get(request_id)
        if seq is None or seq.engine is not None:
            raise RuntimeError(
                f"Pull of {request_id!r}, attempt {attempt}, to {self._id}: "
                + ("it is over or never arrived" if seq is None else f"an engine has it already: {seq!r}")
            )
        model = self._loading or self._loaded
        if model is None or seq.request.model != model.name:
            raise RuntimeError(f"Pull to {self._id}, which {self._doing()}: {seq!r}")
        seq.attempt = attempt
        seq.engine = self
        seq.announced = False
        if seq.host is not None and seq.host is not self.host:
            seq.host.release(seq)
        scheduler = model.scheduler
        context = seq.request.prompt_tokens + seq.generated
        if context >= scheduler.longest_context:
            self._fail(seq, f"{context} tokens leave no room to generate, {scheduler.longest_context} fit")
            return
        to_cut = scheduler.add(seq)
        if intake_s := model.profile.intake_s:
            self._intake_s += intake_s
            to_cut = True
        if self.state is ASLEEP:
            self._wake_up()
        elif to_cut and self.state is RUNNING and self._leap.iterations > 1:
            self._cut(now)

    def evict(self, now: float, request_id: str, attempt: int, keep_kv: bool) -> None:
        """Give a request back at the end of the iteration under way; at once if it has no part in it.

        One that is not here any more is ignored.
        """
        seq = self._store.get(request_id)
        if seq is None or seq.engine is not self or seq.attempt != attempt:
            return
        scheduler = self._models[seq.request.model].scheduler
        if request_id not in scheduler.running:
            may_start = scheduler.withdraw(seq)
            self._give_back(seq)
            if may_start and self.state is RUNNING:
                self._cut(now)
        elif self.state is RUNNING:
            self._evictions.append((seq, attempt, keep_kv))
            self._cut(now)
        else:
            self._evict_running(now, seq, keep_kv)

    def swap(self, now: float, model: str) -> None:
        """Load ``model`` as soon as the engine has run empty."""
        if self._loading is not None or model not in self._models:
            raise RuntimeError(f"SwapModel to {model} on {self._id}, which {self._doing()}")
        self._loading = self._models[model]
        if self.state is ASLEEP:
            self._wake_up()

    def _doing(self) -> str:
        loaded, loading = (each.name if each else None for each in (self._loaded, self._loading))
        return f"serves {loaded}, is loading {loading}, and is {self.state}"

    # The loop: begin, ring, begin, ring, ...

    def _wake_up(self) -> None:
        self.state = DUE
        self._due.append(self)

    def begin(self, now: float) -> None:
        """Start what comes next. Called at the end of the instant, when all its orders are in."""
        if self._copied_at > now:
            self.state = COPYING
            self._alarm.set(self._copied_at)
        elif (loaded := self._loaded) is not None and (
            (scheduler := loaded.scheduler).running or scheduler.waiting
        ):
            self.state = RUNNING
            times = loaded.times
            iterations = scheduler.schedule(self._longest_leap)
            seqs, kv_tokens, kv_token_s = scheduler.seqs, scheduler.kv_tokens, times.kv_token_s
            growth_s = kv_token_s * seqs
            decode_s = times.base_s[scheduler.tokens] + times.seq_s * seqs
            first_s = decode_s + kv_token_s * kv_tokens
            if scheduler.pairs:
                first_s += times.prefill_pair_s * scheduler.pairs
            if scheduler.restored_tokens:
                now += scheduler.restored_tokens * loaded.profile.kv_restore_token_s
            if self._intake_s:
                now += self._intake_s
                self._intake_s = 0.0
            leap = self._leap
            if scheduler.preempting and iterations > 1:
                second_s = decode_s + kv_token_s * (kv_tokens + seqs)
                self._alarm.set(leap.set(now + first_s, iterations - 1, second_s, growth_s))
                leap.put_before(now)
            else:
                self._alarm.set(leap.set(now, iterations, first_s, growth_s))
        elif self._loading is not None:
            self._start_swap(now, self._loading)
        else:
            self.state = ASLEEP

    def _ring(self, now: float) -> None:
        if self.state is RUNNING:
            leap = self._leap
            if leap.lead:
                self._busy_s += leap.start - leap.began_at
            self._busy_s += now - leap.start
            post, own_id = self._post, self._id
            begun, finished = self._loaded.scheduler.complete(leap.iterations)  # type: ignore[union-attr]
            for seq in begun:
                if not seq.announced:
                    seq.announced = True
                    post(FirstToken(seq.request.id, seq.attempt, own_id))
            for seq in finished:
                request_id = seq.request.id
                del self._store[request_id]
                seq.engine = None
                post(RequestFinished(request_id, seq.attempt, own_id, seq.generated))
        elif self.state is SWAPPING:
            self._end_swap()
        self.state = DUE
        self._due.append(self)
        if self._evictions:
            for seq, attempt, keep_kv in self._evictions:
                self.evict(now, seq.request.id, attempt, keep_kv)
            self._evictions.clear()

    def _cut(self, now: float) -> None:
        """An order came in mid-leap: stop at the end of the iteration under way."""
        leap = self._leap
        iterations = leap.iterations
        end = leap.cut(now)
        if leap.iterations < iterations:
            if end > now:
                self._alarm.set(end)
            else:
                self._alarm.clear()
                self._ring(now)

    # Leaving.

    def _evict_running(self, now: float, seq: SimRequest, keep_kv: bool) -> None:
        model = self._models[seq.request.model]
        model.scheduler.stop(seq)
        profile = model.profile
        if keep_kv and seq.computed and self.host.keep(seq, seq.computed * profile.kv_bytes_per_token):
            self._copied_at = max(self._copied_at, now) + seq.computed * profile.kv_restore_token_s
        self._give_back(seq)

    def _give_back(self, seq: SimRequest) -> None:
        seq.engine = None
        self._post(RequestEvicted(seq.request.id, seq.attempt, self._id, seq.generated, seq.host is not None))

    def _fail(self, seq: SimRequest, reason: str) -> None:
        if seq.host is not None:
            seq.host.release(seq)
        seq.engine = None
        del self._store[seq.request.id]
        self._post(RequestFailed(seq.request.id, seq.attempt, self._id, reason))

    # Swapping models.

    def _start_swap(self, now: float, model: _Model) -> None:
        in_host = self.host.models.holds(model.name)
        self._swap_s = model.profile.swap_in_s if in_host else model.profile.load_s
        if self._loaded is not None and self._loaded.scheduler.cache is not None:
            self._loaded.scheduler.cache.clear()
        self.state = SWAPPING
        self._alarm.set(now + self._swap_s)

    def _end_swap(self) -> None:
        model = self._loading
        assert model is not None
        self.host.load(model.name, model.profile.weight_bytes)
        self._loaded = model
        self._loading = None
        self._post(ModelSwapped(self._id, model.name, self._swap_s))

    # Reporting.

    def report(self, now: float) -> EngineReported:
        """The engine's state at ``now``, in mid-leap as exact as between two iterations."""
        busy_s = self._busy_s
        running = waiting = kv_tokens = preemptions = done = 0
        kv_utilization = 0.0
        under_way = False
        if self.state is RUNNING:
            leap = self._leap
            done = leap.done(now)
            under_way = leap.end(done) < now
            if leap.lead and now > leap.began_at:
                busy_s += min(now, leap.start) - leap.began_at
            if now > leap.start:
                busy_s += now - leap.start
        if self._loaded is not None:
            scheduler = self._loaded.scheduler
            running = len(scheduler.running)
            kv_tokens = scheduler.cached_tokens(done)
            kv_utilization = scheduler.used_blocks(done, under_way=under_way) / scheduler.blocks
        for model in self._models.values():
            waiting += len(model.scheduler.waiting)
            preemptions += model.scheduler.preemptions
        return EngineReported(
            self._id,
            running,
            waiting,
            kv_tokens,
            kv_utilization,
            busy_s,
            preemptions,
            sum([cache.queried_tokens for cache in self._caches]) if self._caches else 0,
            sum([cache.hit_tokens for cache in self._caches]) if self._caches else 0,
        )
