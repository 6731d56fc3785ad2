"""A simulated run: requests arrive, the core decides, the engines serve.

All that happens at one time is decided upon once: arrivals and engines post their events, the runtime
settles, its orders reach the engines, and only then do those between two iterations go on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from qlm_sim.cluster.clock import LATE, Alarm, Clock
from qlm_sim.cluster.collector import seldom_collecting
from qlm_sim.cluster.engine import ASLEEP, SimEngine
from qlm_sim.cluster.requests import SimRequest
from qlm_sim.cluster.step_times import StepTimes
from qlm_sim.core.actions import Evict, Pull, Reject, SwapModel
from qlm_sim.core.events import RequestArrived, TimerFired
from qlm_sim.core.plan import Plan, PlanProblem
from qlm_sim.core.types import InstanceSpec, StepCost
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.runtime import Core, Recorder, Runtime, Solver
from qlm_sim.workload.workload import Workload

MOST_IDLE_TIMERS = 100_000
"""Timers in a row, with nothing else going on, after which a core is taken to be stuck."""


@dataclass(frozen=True, slots=True)
class SimulationEnd:
    """How a run ended. Everything else is in the recorder."""

    ended_at: float
    """Seconds since the run's start."""
    arrived: int
    """Requests that arrived until then."""
    unfinished: int
    """Of those, the ones that were neither finished nor failed nor rejected."""


class NoSolver:
    """The solver port of a core that never asks for a plan."""

    ready_at = float("inf")

    def submit(self, now: float, problem: PlanProblem) -> None:
        raise RuntimeError("the core asked for a plan, but the simulation was given no solver")

    def collect(self) -> Plan:
        raise RuntimeError("no plan was asked for")


class Cluster:
    """The engines, the arrivals and the core's timer on one clock; the engines' side of the port."""

    def __init__(
        self,
        workload: Workload,
        instances: Sequence[InstanceSpec],
        config: EngineConfig,
        core: Core,
        recorder: Recorder,
        solver: Solver,
        *,
        longest_leap: int,
        perturb: float | Mapping[str, float],
        order_s: float,
        report_interval_s: float,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.clock = Clock()
        self.runtime = Runtime(core, _Away(self, order_s) if order_s else self, solver, recorder)
        self._inbox = self.runtime.inbox
        self._now = 0.0
        """The instant that is being decided upon."""
        self.store: dict[str, SimRequest] = {}
        """Every request that has arrived and is not over."""
        self.arrived = 0
        self._requests = len(workload)
        self._progress = progress
        self._due: list[SimEngine] = []
        self._times: dict[tuple[int, float], StepTimes] = {}
        """By the id of a StepCost, which like instances share, and the factor on it."""
        self._engines = {
            spec.id: SimEngine(
                spec,
                config,
                self.clock,
                self.store,
                self._due,
                self.runtime.post,
                longest_leap=longest_leap,
                times_of=partial(
                    self._times_of, perturb.get(spec.id, 1.0) if isinstance(perturb, Mapping) else perturb
                ),
            )
            for spec in instances
        }
        self._arrivals = workload.requests()
        self._contents = workload.contents() if config.enable_prefix_caching else None
        self._next = next(self._arrivals, None)
        self._arrival = Alarm(self.clock, self._arrive)
        if self._next is not None:
            self._arrival.set(self._next[0].arrived_at)
        self._timer = Alarm(self.clock, self._timer_rang)
        self._timer_at = float("inf")
        """What the timer is set to."""
        self._fired_at = -1.0
        """When the core last got a TimerFired."""
        self._idle_timers = 0
        self._stuck = False
        self._settle_now = False
        self._reports = Alarm(self.clock, self._reports_rang, LATE)
        self._report_interval_s = report_interval_s
        self._report_number = 0
        """Reports are made at multiples of the interval; of the next one, or the last while none is due."""
        self._reported_at = -1.0
        self._at_work: dict[str, SimEngine] = {}
        """Engines that had an order since they were last reported asleep."""
        self._set_timer(0.0, self.runtime.wake_at)

    def _times_of(self, factor: float, step: StepCost) -> StepTimes:
        return self._times.setdefault((id(step), factor), StepTimes(step, factor))

    def run(self, until_s: float) -> SimulationEnd:
        self.clock.run_instants(self._end_of_instant, until_s)
        now = self._now = self.clock.now
        if self._reported_at != now:
            self._report(now)
        if self._inbox:
            self.runtime.settle(now)
        return SimulationEnd(ended_at=now, arrived=self.arrived, unfinished=len(self.store))

    def execute(self, action: Pull | Evict | SwapModel | Reject) -> None:
        if isinstance(action, Reject):
            seq = self.store.pop(action.request_id)
            if seq.host is not None:
                seq.host.release(seq)
            return
        name, now = action.instance, self._now
        engine = self._engines[name]
        if name not in self._at_work:
            self._start_reporting(now, engine)
        if type(action) is Pull:
            engine.pull(now, action.request_id, action.attempt)
        elif type(action) is Evict:
            engine.evict(now, action.request_id, action.attempt, action.keep_kv)
        elif type(action) is SwapModel:
            engine.swap(now, action.model)

    def execute_late(self, action: Pull | Evict | SwapModel) -> None:
        """Carry out an order that has been on its way until now."""
        self._now = self.clock.now
        self.execute(action)

    def _end_of_instant(self, now: float) -> bool:
        """Decide upon what happened at ``now``, and let the engines go on. False when all is over."""
        inbox = self._inbox
        if inbox or self._settle_now:
            self._now = now
            self._settle_now = False
            while True:
                wake_at = self.runtime.settle(now)
                if wake_at != self._timer_at:
                    self._set_timer(now, wake_at)
                if not inbox:
                    break
            if self._next is None and not self.store:
                return False
        due = self._due
        if due:
            for engine in due:
                engine.begin(now)
            due.clear()
        return not self._stuck

    # Arrivals.

    def _arrive(self, now: float) -> None:
        """Post the arrivals of this time and set the alarm for the next one."""
        arrival = self._next
        while arrival is not None:
            request, output_tokens = arrival
            if request.arrived_at > now:
                self._arrival.set(request.arrived_at)
                break
            seq = self.store[request.id] = SimRequest(request, output_tokens)
            if self._contents is not None:
                seq.content = next(self._contents)
            self._inbox.append(RequestArrived(request))
            self.arrived += 1
            arrival = next(self._arrivals, None)
        self._next = arrival

    # The core's timer.

    def _set_timer(self, now: float, wake_at: float) -> None:
        """Set the timer to when the core or the solver wants it."""
        if wake_at == float("inf") or self._fired_at == now >= wake_at:  # one TimerFired per instant
            self._timer_at = float("inf")
            self._timer.clear()
        else:
            self._timer_at = wake_at
            self._timer.set(max(wake_at, now))

    def _timer_rang(self, now: float) -> None:
        self._timer_at = float("inf")
        self._settle_now = True
        if self.runtime.core.wake_at <= now:
            self._fired_at = now
            self.runtime.post(TimerFired())
        self._idle_timers = self._idle_timers + 1 if self._next is None and not self._at_work else 0
        self._stuck = self._idle_timers >= MOST_IDLE_TIMERS

    # Reports.

    def _start_reporting(self, now: float, engine: SimEngine) -> None:
        if not self._at_work:
            self._set_reports(now)
        self._at_work[engine.spec.id] = engine

    def _set_reports(self, now: float) -> None:
        self._report_number = max(self._report_number, int(now / self._report_interval_s)) + 1
        self._reports.set(self._report_number * self._report_interval_s)

    def _reports_rang(self, now: float) -> None:
        self._report(now)
        if self._at_work:
            self._set_reports(now)

    def _report(self, now: float) -> None:
        """Report the engines at work; one that is asleep by now for the last time."""
        self._reported_at = now
        for name, engine in list(self._at_work.items()):
            self.runtime.post(engine.report(now))
            if engine.state is ASLEEP:
                del self._at_work[name]
        if self._progress is not None:
            self._progress(self.arrived - len(self.store), self._requests)


class _Away:
    """The engines' side of the port, for a core whose orders are ``order_s`` on their way."""

    def __init__(self, cluster: Cluster, order_s: float) -> None:
        self._cluster = cluster
        self._order_s = order_s

    def execute(self, action: Pull | Evict | SwapModel | Reject) -> None:
        cluster = self._cluster
        if isinstance(action, Reject):
            cluster.execute(action)
        else:
            cluster.clock.timeout(self._order_s).callbacks.append(lambda _: cluster.execute_late(action))


def simulate(
    workload: Workload,
    instances: Sequence[InstanceSpec],
    config: EngineConfig,
    core: Core,
    recorder: Recorder,
    *,
    solver: Solver | None = None,
    engine: Literal["leap", "stepping"] = "leap",
    until_s: float | None = None,
    report_interval_s: float = 1.0,
    perturb: float | Mapping[str, float] = 1.0,
    order_s: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> SimulationEnd:
    """Run ``workload`` until every request is over, or until ``until_s``.

    ``engine``: "leap" goes from one change of a batch to the next, "stepping" through every iteration;
    both give the same times. ``perturb``: factor on the engines' step times, of all or by instance, so that
    they differ from what their profiles promise the core. ``order_s``: seconds from an order to its
    engine; one that answers to the end of an iteration then finds the next under way, as over HTTP.
    ``progress(done, requests)`` is called now and then. The run also ends, with requests unfinished, when
    nothing more can happen.
    """
    cluster = Cluster(
        workload,
        instances,
        config,
        core,
        recorder,
        solver or NoSolver(),
        longest_leap=1 if engine == "stepping" else 1 << 62,
        perturb=perturb,
        order_s=order_s,
        report_interval_s=report_interval_s,
        progress=progress,
    )
    with seldom_collecting():
        return cluster.run(float("inf") if until_s is None else until_s)
