"""A scripted core over live instances, in the running event loop."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

from contract.scenarios import Ask, Run, Scenario, ScriptedCore
from fakes import text_of

from live.clock import Settler, WallClock
from live.engines.attempt import LiveRequest
from live.engines.instance import Instance, Status
from live.engines.port import LiveEngines
from live.jobs import COMPLETIONS, Job
from qlm_sim.core.events import FirstToken, RequestArrived, RequestEvicted
from qlm_sim.core.plan import Plan, PlanProblem
from qlm_sim.core.types import Request
from qlm_sim.runtime import Runtime


class NoSolver:
    """A script asks for no plans."""

    ready_at = float("inf")

    def submit(self, now: float, problem: PlanProblem) -> None:
        raise AssertionError("a script asked for a plan")

    def collect(self) -> Plan:
        raise AssertionError("no plan was asked for")


Crash = Callable[[], Awaitable[None]]


def prompt_of(ask: Ask) -> list[int]:
    chance = random.Random(ask.id)
    return [chance.randrange(300, 3000) for _ in range(ask.prompt_tokens)]


def body_of(ask: Ask) -> dict[str, object]:
    return {
        "prompt": prompt_of(ask),
        "max_tokens": ask.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }


async def play(
    scenario: Scenario,
    instances: Sequence[Instance],
    *,
    crash: Crash | None = None,
    timeout_s: float = 30.0,
) -> Run:
    """Run the scenario to its end. ``crash`` breaks the first instance, once its requests have begun."""
    run = Run()
    engines = LiveEngines()
    clock = WallClock()
    runtime = Runtime(ScriptedCore(scenario.script()), engines, NoSolver(), run)
    broken: list[Exception] = []
    settler = Settler(runtime, clock, broken.append)
    engines.connect(instances, settler.post, settler.settle_now, clock.now)
    crashing: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(timeout_s):
            for instance in instances:
                instance.start()
            while any(instance.status is not Status.UP for instance in instances):
                await asyncio.sleep(0.005)
            tickets = {}
            for ask in scenario.asks:
                request = Request(
                    ask.id, ask.model, "all", 60.0, clock.now(), ask.prompt_tokens, ask.output_tokens
                )
                live = LiveRequest(Job(request, COMPLETIONS, body_of(ask)), None)
                engines.requests[ask.id] = live
                tickets[ask.id] = live.ticket
                settler.post(RequestArrived(request))
            gone = scenario.evicted - scenario.finishing
            while not (
                run.over() >= scenario.finishing | scenario.failed
                and {event.request_id for event in run.events(RequestEvicted)} >= gone
            ):
                assert not broken, broken
                if (
                    crash is not None
                    and crashing is None
                    and len(run.events(FirstToken)) >= len(scenario.asks)
                ):
                    crashing = asyncio.ensure_future(_after(0.02, crash))
                await asyncio.sleep(0.005)
            for name, ticket in tickets.items():
                if ticket.ended:
                    run.texts[name] = text_of([output async for output in ticket])
            if crashing is not None:
                await crashing
    finally:
        settler.stop()
        await asyncio.gather(*(instance.stop() for instance in instances))
    return run


async def _after(seconds: float, crash: Crash) -> None:
    await asyncio.sleep(seconds)
    await crash()
