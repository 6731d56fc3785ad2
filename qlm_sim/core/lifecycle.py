"""The life of one request inside the scheduler.

    WAITING -> RUNNING -> finished | failed
       ^          |
       +- EVICTING+

Knows no policy and no engine. Only QueueManager changes what is kept here.
"""

from enum import Enum
from typing import TYPE_CHECKING

from qlm_sim.core.types import Request

if TYPE_CHECKING:
    from qlm_sim.core.groups import RequestGroup


class State(Enum):
    """Where a live request is."""

    WAITING = "waiting"
    RUNNING = "running"
    """Pulled: its engine has it, whether it computes already or not."""
    EVICTING = "evicting"
    """Ordered back from its engine, which has not answered yet."""


# Python 3.11 takes ten times as long to find a member of an Enum as a name of the module.
WAITING, RUNNING, EVICTING = State


class Tracked:
    """A live request with what the scheduler knows of it beyond the request itself."""

    __slots__ = (
        "attempt",
        "cancelled",
        "deadline",
        "evictions",
        "first_token_at",
        "group",
        "instance",
        "kv_home",
        "output_tokens",
        "pulled_at",
        "pulled_context",
        "request",
        "served",
        "state",
    )

    # Of the current attempt, once it is pulled.
    pulled_at: float
    """When it was sent to its engine."""
    pulled_context: int
    """Tokens it brought along: prompt and what was generated before."""

    def __init__(self, request: Request, output_tokens: int = 0) -> None:
        self.request = request
        self.state: State = WAITING
        self.deadline = request.arrived_at + request.slo_s
        """When the next token that somebody waits for is due: the first one, until it is out. A policy may
        set a late request another."""
        self.attempt = 0
        self.instance = ""
        """Where the current attempt runs; the last one's engine while waiting."""
        self.output_tokens = output_tokens
        """Tokens generated, as last reported."""
        self.first_token_at: float | None = None
        """When the current attempt began to decode; None while it waits or prefills."""
        self.served = False
        """Whether its first token ever came out, so that TTFT is decided."""
        self.evictions = 0
        self.kv_home: str | None = None
        """The instance whose host memory holds its KV cache, if one does."""
        self.cancelled = False
        self.group: RequestGroup | None = None

    @property
    def context_tokens(self) -> int:
        """Tokens whose KV cache it needs to go on."""
        return self.request.prompt_tokens + self.output_tokens

    def __repr__(self) -> str:
        return (
            f"Tracked({self.request.id!r}, {self.state.value}, model={self.request.model!r}, "
            f"attempt={self.attempt}, instance={self.instance!r}, output_tokens={self.output_tokens})"
        )
