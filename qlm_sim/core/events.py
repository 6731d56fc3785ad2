"""Facts that reach the core. Every event holds what happened; when is the settle's ``now``.

Events of one request on one engine carry (instance, attempt): the attempt number is that of the
Pull that sent the request there, so an event that was overtaken by an eviction can be told.
"""

from msgspec import Struct

from qlm_sim.core.plan import Plan
from qlm_sim.core.types import InstanceSpec, Request


class RequestArrived(Struct, frozen=True, gc=False):
    request: Request
    output_tokens: int = 0
    """What it had said before a restart, and goes on from."""


class RequestCancelled(Struct, frozen=True, gc=False):
    request_id: str


class FirstToken(Struct, frozen=True, gc=False):
    """The attempt's prefill is done and it decodes now. On a resumed request this is not its first."""

    request_id: str
    attempt: int
    instance: str


class Progress(Struct, frozen=True, gc=False):
    """Tokens generated so far, all attempts together."""

    request_id: str
    attempt: int
    instance: str
    output_tokens: int


class RequestFinished(Struct, frozen=True, gc=False):
    request_id: str
    attempt: int
    instance: str
    output_tokens: int


class RequestEvicted(Struct, frozen=True, gc=False):
    """The engine gave the request back. Its generated tokens are kept.

    ``kv_on_host``: its KV cache lies in that instance's host memory and can be restored there.
    """

    request_id: str
    attempt: int
    instance: str
    output_tokens: int
    kv_on_host: bool


class RequestFailed(Struct, frozen=True, gc=False):
    request_id: str
    attempt: int
    instance: str
    reason: str


class ModelSwapped(Struct, frozen=True, gc=False):
    """The instance serves ``model`` now; the swap took ``swap_s`` seconds."""

    instance: str
    model: str
    swap_s: float


class InstanceUp(Struct, frozen=True, gc=False):
    spec: InstanceSpec


class InstanceDown(Struct, frozen=True, gc=False):
    """The instance is gone, and with it the progress that was not reported."""

    instance: str


class EngineReported(Struct, frozen=True, gc=False):
    """Periodic state of an engine, as old as the report. Totals count from the engine's start."""

    instance: str
    running: int
    waiting: int
    kv_tokens: int
    """Tokens whose KV cache is on the GPU."""
    kv_utilization: float
    """Share of KV blocks in use, 0 to 1."""
    busy_s: float
    """Total seconds spent executing iterations."""
    preemptions: int
    """Total requests preempted because KV blocks ran out."""
    prefix_queries: int = 0
    """Total tokens looked up in the prefix cache; 0 where there is none. A request that comes back from a
    preemption is not counted."""
    prefix_hits: int = 0
    """Those of them that were found."""


class PlanReady(Struct, frozen=True, gc=False):
    """The solver's answer to the last Replan."""

    plan: Plan


class TimerFired(Struct, frozen=True, gc=False):
    """The time that the core asked to be woken at (``QueueManager.wake_at``) has come."""


Event = (
    RequestArrived
    | RequestCancelled
    | FirstToken
    | Progress
    | RequestFinished
    | RequestEvicted
    | RequestFailed
    | ModelSwapped
    | InstanceUp
    | InstanceDown
    | EngineReported
    | PlanReady
    | TimerFired
)
