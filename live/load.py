"""A load generator: the requests of a workload, at their times, as jobs of a service.

Knows the true lengths: each job asks its engine for exactly so many tokens, while the scheduler is told no
more than a client would. Prompts are random tokens, so that none finds another's in a prefix cache; nor those
of an earlier run, as each begins with tokens that no seed gives.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from msgspec import structs

from live.jobs import COMPLETIONS, Failed, Finished, Job
from live.service import Service
from live.ticket import Ticket
from qlm_sim.workload.workload import Workload

FRESH_TOKENS = 8
"""First tokens of a prompt that no seed gives."""
FIRST_PLAIN_TOKEN = 100
"""Token ids below are left alone: beginnings, ends, padding."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a request was told at its arrival, in seconds until its first token."""

    position: int
    """Requests that were to be served before it."""
    mean_s: float
    median_s: float
    bound_s: float
    """Not exceeded with a probability of 0.9, it was told."""


@dataclass(frozen=True, slots=True)
class Offered:
    """What became of a workload."""

    told: Mapping[str, Told]
    """By request id."""
    finished: int
    failed: Mapping[str, str]
    """By request id: why."""
    tokens: int
    """Output tokens of those that finished."""
    ended_at: float
    """Seconds from the workload's start to the last end."""


async def offer(
    service: Service,
    workload: Workload,
    vocabulary: Mapping[str, int],
    *,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Offered:
    """Submit every request at its time, counted from now, and wait for all to end.

    ``vocabulary``: token ids that each model knows. Loses nothing: a request that fails is in ``failed``.
    """
    generator, fresh = np.random.default_rng(seed), np.random.default_rng()
    began_at = service.now()
    told: dict[str, Told] = {}
    failed: dict[str, str] = {}
    tokens = done = 0

    async def follow(ticket: Ticket) -> None:
        nonlocal tokens, done
        async for output in ticket:
            if isinstance(output, Finished):
                tokens += output.output_tokens
            elif isinstance(output, Failed):
                failed[ticket.request.id] = output.reason
        done += 1
        progress(done, len(workload))

    async with asyncio.TaskGroup() as group:
        for planned, output_tokens in workload.requests():
            arrived_at = began_at + planned.arrived_at
            await asyncio.sleep(max(0.0, arrived_at - service.now()))
            request = structs.replace(planned, arrived_at=arrived_at)
            forecast = service.forecast_new(request)
            if forecast is not None:
                told[request.id] = Told(
                    forecast.position, forecast.mean_s, forecast.median_s, forecast.quantile(0.9)
                )
            prompt = generator.integers(FIRST_PLAIN_TOKEN, vocabulary[request.model], request.prompt_tokens)
            start = prompt[:FRESH_TOKENS]
            start[:] = fresh.integers(FIRST_PLAIN_TOKEN, vocabulary[request.model], len(start))
            body = {
                "prompt": prompt.tolist(),
                "max_tokens": output_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
            }
            group.create_task(follow(service.submit(Job(request, COMPLETIONS, body))))
    return Offered(told, len(workload) - len(failed), failed, tokens, service.now() - began_at)
