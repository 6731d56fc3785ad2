"""Small worlds for tests of the simulated cluster: costs, instances, workloads, cores and a log."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlm_sim.cluster.simulation import SimulationEnd, simulate
from qlm_sim.core.actions import Action, Evict, Pull, SwapModel
from qlm_sim.core.events import (
    EngineReported,
    Event,
    FirstToken,
    ModelSwapped,
    RequestArrived,
    RequestEvicted,
    RequestFailed,
    RequestFinished,
    TimerFired,
)
from qlm_sim.core.types import InstanceSpec, ModelOnInstance, Request, SloClass, StepCost
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.workload.workload import Workload

NEVER = float("inf")


@dataclass(frozen=True)
class Step:
    """base + token * tokens + ... With powers of two, sums of times are exact and ties are true ties."""

    base: float = 2**-6
    token: float = 2**-12
    seq_s: float = 2**-12
    kv_token_s: float = 2**-16
    prefill_pair_s: float = 2**-18

    def base_s(self, tokens: int) -> float:
        return self.base + self.token * tokens


SECOND = Step(base=1.0, token=0.0, seq_s=0.0, kv_token_s=0.0, prefill_pair_s=0.0)
"""Every iteration takes one second."""


def model(step: StepCost = SECOND, **changes: float) -> ModelOnInstance:
    numbers = {
        "kv_capacity_tokens": 1 << 20,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
        "max_model_len": 1 << 20,
        "weight_bytes": 1000,
        "kv_bytes_per_token": 1,
        "swap_in_s": 2.0,
        "load_s": 8.0,
        "kv_restore_token_s": 0.0,
    }
    return ModelOnInstance(step=step, **{**numbers, **changes})  # type: ignore[arg-type]


def instance(
    name: str = "i0",
    models: dict[str, ModelOnInstance] | None = None,
    resident: str | None = "m",
    host_bytes: int = 1 << 20,
    host_models: tuple[str, ...] = (),
    **changes: float,
) -> InstanceSpec:
    return InstanceSpec(
        name,
        models or {"m": model(**changes)},
        resident,
        host_bytes,
        host_models,  # type: ignore[arg-type]
    )


def workload(
    rows: Sequence[tuple[float, int, int]],
    models: Sequence[str] = (),
    slo_s: Sequence[float] = (),
    content: Sequence[str] | None = None,
) -> Workload:
    """Rows of (arrival, prompt tokens, output tokens), named r0, r1, ... in sorting order; SLOs on TTFT."""
    names = tuple(dict.fromkeys(models)) or ("m",)
    slos = tuple(dict.fromkeys(slo_s)) or (20.0,)
    count = len(rows)
    return Workload(
        ids=[f"r{i:0{len(str(count - 1))}}" for i in range(count)],
        arrival_s=np.array([row[0] for row in rows], dtype=np.float64),
        prompt_tokens=np.array([row[1] for row in rows], dtype=np.int64),
        output_tokens=np.array([row[2] for row in rows], dtype=np.int64),
        max_tokens=np.full(count, 1 << 20, dtype=np.int64),
        models=names,
        model_index=np.array([names.index(m) for m in models] or [0] * count, dtype=np.int64),
        slo_classes=tuple(SloClass(f"slo{s}", ttft_s=s) for s in slos),
        slo_index=np.array([slos.index(s) for s in slo_s] or [0] * count, dtype=np.int64),
        content=content,
    )


class Log:
    """A recorder that keeps everything."""

    def __init__(self) -> None:
        self.settles: list[tuple[float, tuple[Event, ...], tuple[Action, ...]]] = []

    def record(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None:
        self.settles.append((now, tuple(events), tuple(actions)))

    def times(self, kind: type) -> dict[str, list[float]]:
        """When each request had events of that kind."""
        found: dict[str, list[float]] = {}
        for now, events, _ in self.settles:
            for event in events:
                if type(event) is kind:
                    name = event.request.id if kind is RequestArrived else event.request_id
                    found.setdefault(name, []).append(now)
        return found

    def first_tokens(self) -> dict[str, float]:
        return {name: times[0] for name, times in self.times(FirstToken).items()}

    def finishes(self) -> dict[str, float]:
        return {name: times[0] for name, times in self.times(RequestFinished).items()}

    def of(self, kind: type) -> list[tuple[float, Event]]:
        return [(now, event) for now, events, _ in self.settles for event in events if type(event) is kind]

    def reports(self) -> list[tuple[float, EngineReported]]:
        return self.of(EngineReported)  # type: ignore[return-value]


class Push:
    """Sends each request, when it arrives, to the instance that has the fewest."""

    wake_at = NEVER

    def __init__(self, instances: Sequence[InstanceSpec]) -> None:
        self.load = {spec.id: 0 for spec in instances}

    def handle(self, now: float, events: Sequence[Event]) -> list[Action]:
        actions: list[Action] = []
        for event in events:
            if type(event) is RequestArrived:
                name = min(self.load, key=self.load.__getitem__)
                self.load[name] += 1
                actions.append(Pull(event.request.id, 1, name))
            elif type(event) is RequestFinished or type(event) is RequestFailed:
                self.load[event.instance] -= 1
        return actions


class SharedQueue:
    """Holds requests back, first come first served, until an instance has fewer than ``most``."""

    wake_at = NEVER

    def __init__(self, instances: Sequence[InstanceSpec], most: int = 1) -> None:
        self.load = {spec.id: 0 for spec in instances}
        self.most = most
        self.queue: list[str] = []

    def handle(self, now: float, events: Sequence[Event]) -> list[Action]:
        for event in events:
            if type(event) is RequestArrived:
                self.queue.append(event.request.id)
            elif type(event) is RequestFinished:
                self.load[event.instance] -= 1
        actions: list[Action] = []
        for name in self.load:
            while self.queue and self.load[name] < self.most:
                self.load[name] += 1
                actions.append(Pull(self.queue.pop(0), 1, name))
        return actions


@dataclass(frozen=True)
class Order:
    """What a Script does at a time, to whichever request or instance the numbers pick."""

    at: float
    kind: str
    """"evict", "keep" (evict with its KV cache), "pull" or "swap"."""
    which: int = 0
    where: int = 0


class Script:
    """Pulls arrivals at once, evicts, pulls again and swaps as told; then lets all requests finish."""

    def __init__(self, instances: Sequence[InstanceSpec], orders: Sequence[Order]) -> None:
        self.models = {spec.id: sorted(spec.models) for spec in instances}
        self.model = {spec.id: spec.resident for spec in instances}
        """What each serves, or will when its swap is done."""
        self.swapping: set[str] = set()
        self.orders = sorted(orders, key=lambda order: order.at)
        self.requests: dict[str, Request] = {}
        self.attempts: dict[str, int] = {}
        self.waiting: list[str] = []
        self.running: dict[str, str] = {}
        self.evicting: set[str] = set()

    @property
    def wake_at(self) -> float:
        return self.orders[0].at if self.orders else NEVER

    def handle(self, now: float, events: Sequence[Event]) -> list[Action]:
        actions: list[Action] = []
        for event in events:
            if type(event) is RequestArrived:
                self.requests[event.request.id] = event.request
                self.waiting.append(event.request.id)
                self._pull(event.request.id, 0, actions)
            elif type(event) is RequestFinished or type(event) is RequestFailed:
                del self.running[event.request_id]
                self.evicting.discard(event.request_id)
            elif type(event) is RequestEvicted:
                del self.running[event.request_id]
                self.evicting.discard(event.request_id)
                self.waiting.append(event.request_id)
            elif type(event) is ModelSwapped:
                self.swapping.discard(event.instance)
            elif type(event) is TimerFired:
                while self.orders and self.orders[0].at <= now:
                    self._carry_out(self.orders.pop(0), actions)
        if not self.orders:
            for name in self.waiting[:]:
                self._pull(name, 0, actions)
            idle = [name for name in self.model if name not in self.swapping]
            if self.waiting and idle:
                wanted = self.requests[self.waiting[0]].model
                if wanted not in self.model.values():
                    self._swap(idle[0], wanted, actions)
        return actions

    def _carry_out(self, order: Order, actions: list[Action]) -> None:
        if order.kind == "pull" and self.waiting:
            self._pull(self.waiting[order.which % len(self.waiting)], order.where, actions)
        elif order.kind == "swap":
            name = sorted(self.model)[order.where % len(self.model)]
            models = [each for each in self.models[name] if each != self.model[name]]
            if models and name not in self.swapping:
                self._swap(name, models[order.which % len(models)], actions)
        elif order.kind in ("evict", "keep"):
            running = sorted(name for name in self.running if name not in self.evicting)
            if running:
                name = running[order.which % len(running)]
                self.evicting.add(name)
                actions.append(Evict(name, self.attempts[name], self.running[name], order.kind == "keep"))

    def _pull(self, name: str, where: int, actions: list[Action]) -> None:
        able = [each for each, model in self.model.items() if model == self.requests[name].model]
        if able:
            chosen = able[where % len(able)]
            self.waiting.remove(name)
            self.running[name] = chosen
            self.attempts[name] = self.attempts.get(name, 0) + 1
            actions.append(Pull(name, self.attempts[name], chosen))

    def _swap(self, name: str, wanted: str, actions: list[Action]) -> None:
        self.model[name] = wanted
        self.swapping.add(name)
        actions.append(SwapModel(name, wanted))


def run(
    rows: Workload | Sequence[tuple[float, int, int]],
    instances: Sequence[InstanceSpec] | InstanceSpec,
    config: EngineConfig | None = None,
    core: object = None,
    **options: object,
) -> tuple[Log, SimulationEnd]:
    if isinstance(instances, InstanceSpec):
        instances = [instances]
    if not isinstance(rows, Workload):
        rows = workload(rows)
    log = Log()
    end = simulate(
        rows,
        instances,
        config or EngineConfig(),
        core or Push(instances),  # type: ignore[arg-type]
        log,
        **options,  # type: ignore[arg-type]
    )
    return log, end
