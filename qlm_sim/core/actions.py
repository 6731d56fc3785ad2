"""Orders that leave the core. An engine carries them out; the facts come back as events."""

from qlm_sim.core.fact import fact
from qlm_sim.core.plan import PlanProblem


@fact
class Pull:
    """Send a request to an engine. Attempts of a request count from 1 and never repeat."""

    request_id: str
    attempt: int
    instance: str


@fact
class Evict:
    """Take a request back from an engine. Generated tokens are kept.

    ``keep_kv`` asks the engine to move the KV cache to host memory, to be restored at the next
    pull on the same instance; otherwise the KV cache is dropped and recomputed.
    """

    request_id: str
    attempt: int
    instance: str
    keep_kv: bool


@fact
class SwapModel:
    """Load ``model`` on the instance. The engine holds no request when this is ordered."""

    instance: str
    model: str


@fact
class Reject:
    """Refuse a request at once instead of missing its SLO late (admission control)."""

    request_id: str
    estimated_wait_s: float


@fact
class Replan:
    """Solve this snapshot off the serving path; the answer comes back as PlanReady."""

    problem: PlanProblem


Action = Pull | Evict | SwapModel | Reject | Replan
