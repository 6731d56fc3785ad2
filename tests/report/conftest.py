"""Runs to report on, from a small queue simulation that writes an event log as a real run does."""

import heapq
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from qlm_sim.core.actions import Action, Evict, Pull, Reject, SwapModel
from qlm_sim.core.events import (
    EngineReported,
    Event,
    FirstToken,
    ModelSwapped,
    RequestArrived,
    RequestEvicted,
    RequestFinished,
)
from qlm_sim.core.types import InstanceSpec, Request, SloClass
from qlm_sim.metrics.recorder import RunRecorder
from qlm_sim.metrics.run import PolicyRun, conclude

CLASSES = (
    SloClass("interactive", ttft_s=20.0),
    SloClass("batch-1", ttft_s=60.0),
    SloClass("batch-2", ttft_s=3600.0),
)
MODELS = ("mistral-7b", "vicuna-13b", "llama-2-70b")

Order = Callable[[Request], tuple[float, ...]]
ORDERS: dict[str, Order] = {
    "vllm": lambda request: (request.arrived_at,),
    "edf": lambda request: (request.deadline,),
    "shepherd": lambda request: (request.slo_s, request.arrived_at),
    "qlm": lambda request: (request.slo_s > 100, request.deadline),
}


def simulate(
    name: str,
    requests: int = 400,
    rate_rps: float = 7.5,
    instances: int = 4,
    slots: int = 8,
    end_s: float = 300.0,
    seed: int = 1,
) -> PolicyRun:
    """Serve Poisson arrivals in the order of the policy, one model per instance at a time."""
    rng = np.random.default_rng(seed)
    arrival_s = np.cumsum(rng.exponential(1 / rate_rps, requests))
    queue = [
        Request(
            id=f"r{n}",
            model=MODELS[rng.integers(len(MODELS))],
            slo_class=slo.name,
            slo_s=slo.ttft_s or 0.0,
            arrived_at=float(at),
            prompt_tokens=int(rng.integers(20, 800)),
            max_tokens=1000,
        )
        for n, at in enumerate(arrival_s)
        for slo in [CLASSES[rng.choice(3, p=(0.4, 0.35, 0.25))]]
    ]
    service_s = rng.gamma(2.0, 2.5, requests) * (1 + 0.15 * (name in ("vllm", "shepherd")))
    specs = [InstanceSpec(f"i{n}", {}, MODELS[n % len(MODELS)], 0, ()) for n in range(instances)]
    recorder = RunRecorder(specs)
    held = {spec.id: str(spec.resident) for spec in specs}
    running: dict[str, dict[str, Request]] = {spec.id: {} for spec in specs}
    busy_s = dict.fromkeys(held, 0.0)
    swapping: set[str] = set()
    attempt = dict.fromkeys((request.id for request in queue), 0)
    waiting: list[Request] = []
    agenda: list[tuple[float, int, str, object]] = [
        (r.arrived_at, n, "arrive", r) for n, r in enumerate(queue)
    ]
    agenda += [(float(t), requests + t, "report", None) for t in range(0, int(end_s) + 1)]
    heapq.heapify(agenda)
    ticket = 10 * requests + int(end_s)
    while agenda:
        now, _, what, about = heapq.heappop(agenda)
        if now > end_s:
            break
        events: list[Event] = []
        actions: list[Action] = []
        if what == "arrive":
            assert isinstance(about, Request)
            events.append(RequestArrived(about))
            waiting.append(about)
        elif what == "report":
            for inst in held:
                busy_s[inst] += 1.0 * bool(running[inst])
                load = len(running[inst])
                events.append(EngineReported(inst, load, 0, 100 * load, load / slots, busy_s[inst], 0))
        else:
            assert isinstance(about, tuple)
            request, inst, nth = about
            if what == "swapped":
                held[inst] = request
                swapping.discard(inst)
                events.append(ModelSwapped(inst, request, nth))
            elif running[inst].get(request.id) is request and attempt[request.id] == nth:
                if what == "token":
                    events.append(FirstToken(request.id, nth, inst))
                else:
                    events.append(RequestFinished(request.id, nth, inst, int(rng.integers(2, 400))))
                    del running[inst][request.id]
        waiting.sort(key=ORDERS.get(name, ORDERS["vllm"]))
        for inst in held:
            if inst in swapping:
                continue
            fitting = [request for request in waiting if request.model == held[inst]]
            if name == "qlm" and fitting and fitting[0].slo_s < 30 and len(running[inst]) == slots:
                lazy = [r for r in running[inst].values() if r.slo_s > 100 and attempt[r.id] < 3]
                for victim in lazy[:1]:
                    del running[inst][victim.id]
                    waiting.append(victim)
                    actions.append(Evict(victim.id, attempt[victim.id], inst, keep_kv=True))
                    events.append(RequestEvicted(victim.id, attempt[victim.id], inst, 1, kv_on_host=True))
            for request in fitting[: slots - len(running[inst])]:
                waiting.remove(request)
                attempt[request.id] += 1
                running[inst][request.id] = request
                actions.append(Pull(request.id, attempt[request.id], inst))
                for delay, kind in ((0.3, "token"), (service_s[int(request.id[1:])], "done")):
                    ticket += 1
                    heapq.heappush(agenda, (now + delay, ticket, kind, (request, inst, attempt[request.id])))
            if waiting and not running[inst] and not fitting:
                swapping.add(inst)
                ticket += 1
                swap_s = 1.5 if name == "qlm" else 4.0
                actions.append(SwapModel(inst, waiting[0].model))
                heapq.heappush(agenda, (now + swap_s, ticket, "swapped", (waiting[0].model, inst, swap_s)))
        if name == "shepherd" and what == "arrive" and len(waiting) > 200:
            late = waiting.pop()
            actions.append(Reject(late.id, 1000.0))
        recorder.record(now, events, actions)
    return conclude(name, recorder, CLASSES, end_s)


@pytest.fixture(scope="session")
def runs() -> Sequence[PolicyRun]:
    return [simulate(name) for name in ORDERS]
