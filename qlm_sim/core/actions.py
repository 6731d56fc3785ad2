"""Orders that leave the core. An engine carries them out; the facts come back as events."""

from msgspec import Struct

from qlm_sim.core.plan import PlanProblem


class Pull(Struct, frozen=True, gc=False):
    """Send a request to an engine. Attempts of a request count from 1 and never repeat."""

    request_id: str
    attempt: int
    instance: str


class Evict(Struct, frozen=True, gc=False):
    """Take a request back from an engine. Generated tokens are kept.

    ``keep_kv`` asks the engine to move the KV cache to host memory, to be restored at the next
    pull on the same instance; otherwise the KV cache is dropped and recomputed.
    """

    request_id: str
    attempt: int
    instance: str
    keep_kv: bool


class SwapModel(Struct, frozen=True, gc=False):
    """Load ``model`` on the instance. The engine holds no request when this is ordered."""

    instance: str
    model: str


class Reject(Struct, frozen=True, gc=False):
    """Refuse a request at once instead of missing its SLO late (admission control)."""

    request_id: str
    estimated_wait_s: float


class Replan(Struct, frozen=True, gc=False):
    """Solve this snapshot off the serving path; the answer comes back as PlanReady."""

    problem: PlanProblem


Action = Pull | Evict | SwapModel | Reject | Replan
