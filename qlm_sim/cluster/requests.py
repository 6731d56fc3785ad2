"""A request as the simulated world knows it, its true output length included.

The scheduler core never sees these. Each request has one, from its arrival until it is over; the
engine that has the request writes to it, and no two engines have it at once.
"""

from typing import TYPE_CHECKING

from qlm_sim.core.types import Request
from qlm_sim.workload.content import Content

if TYPE_CHECKING:
    from qlm_sim.cluster.engine import SimEngine
    from qlm_sim.cluster.host_memory import HostMemory
    from qlm_sim.cluster.prefix_cache import Block


class SimRequest:
    """The physical truth about one request."""

    __slots__ = (
        "announced",
        "attempt",
        "blocks",
        "computed",
        "content",
        "context",
        "engine",
        "finish_entry",
        "generated",
        "host",
        "host_tokens",
        "last_token",
        "offset",
        "output_tokens",
        "rank",
        "request",
    )

    # Set by the engine when it takes the request in.
    context: int
    """Tokens to compute before it decodes: prompt and generated ones."""
    announced: bool
    """Whether this attempt's FirstToken is out."""
    last_token: int
    """What ``computed`` will be when it finishes: prompt + output - 1, for the last token generated is never
    computed upon."""
    # Set while it decodes.
    offset: int
    """The engine's iteration number less ``computed``."""
    finish_entry: "tuple[int, int, SimRequest] | None"
    """Its entry in the heap of finishes."""
    # Set where prefix caching is on, and only there.
    content: Content
    blocks: "list[Block]"
    """The full KV blocks that it holds, from the first on."""
    rank: int
    """Its place in the order of admissions; 0 until an engine has admitted this attempt."""

    def __init__(self, request: Request, output_tokens: int) -> None:
        self.request = request
        self.output_tokens = output_tokens
        """Tokens it will generate if nothing cuts it short; at least 1."""
        self.generated = 0
        """Tokens generated, all attempts together. Not kept up while it decodes: see Decodes."""
        self.engine: SimEngine | None = None
        """The engine that has it now."""
        self.attempt = 0
        self.host: HostMemory | None = None
        """The host memory that holds its KV cache."""
        self.host_tokens = 0
        """Tokens of that KV cache."""
        self.computed = 0
        """Tokens whose KV cache is on the GPU. Not kept up while it decodes."""

    def __repr__(self) -> str:
        return (
            f"SimRequest({self.request.id!r}, model={self.request.model!r}, attempt={self.attempt}, "
            f"engine={self.engine.spec.id if self.engine else None!r}, prompt={self.request.prompt_tokens}, "
            f"output={self.output_tokens}, generated={self.generated}, computed={self.computed})"
        )
