"""What an engine can do for us: the interface that every kind of engine has, and what it tells back.

A backend serves one model. It is told to start attempts and to abort them; the rest it tells the attempt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class EngineError(Exception):
    """An engine does not do what it should. The message is one line."""


@dataclass(frozen=True, slots=True)
class Call:
    """One attempt as an engine gets it."""

    id: str
    """Unique over all attempts."""
    endpoint: str
    body: Mapping[str, Any]
    """OpenAI's body, streaming; its model is the backend's business."""


class Listener(Protocol):
    """Hears what becomes of a call: some ``said``, then one of the others. All in the event loop."""

    call: Call

    def said(
        self,
        choice: dict[str, Any],
        token_ids: Sequence[int],
        prompt_token_ids: Sequence[int] | None,
    ) -> None:
        """A piece of output. ``choice`` is the listener's to keep; its finish_reason is told there."""
        ...

    def ended(self, usage: Mapping[str, Any] | None) -> None:
        """All is said."""
        ...

    def aborted(self) -> None:
        """It was aborted, by our order or by the engine's own doing."""
        ...

    def refused(self, status: int, reason: str) -> None:
        """The engine does not take it."""
        ...

    def lost(self, reason: str) -> None:
        """The connection or the engine broke."""
        ...


@dataclass(frozen=True, slots=True)
class EngineState:
    """What an engine says of itself now."""

    running: int
    waiting: int
    kv_utilization: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine says of itself once; None where it does not tell."""

    version: str | None
    max_model_len: int | None
    num_gpu_blocks: int | None
    block_size: int | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None


class Backend(Protocol):
    """One engine that serves one model."""

    def start(self, listener: Listener) -> None:
        """Begin ``listener.call``. Does not wait."""
        ...

    def abort(self, listener: Listener) -> None:
        """Stop it; the listener hears ``aborted``, or that it ended before."""
        ...

    def forget(self, listener: Listener) -> None:
        """Stop it at once; the listener hears nothing more."""
        ...

    async def healthy(self) -> bool: ...

    async def state(self) -> EngineState:
        """Raises EngineError where it does not answer."""
        ...

    async def facts(self) -> EngineFacts:
        """Raises EngineError where it does not answer."""
        ...

    async def probe(self) -> None:
        """Generate one token, to see that it works. Raises EngineError."""
        ...

    async def asleep(self) -> bool:
        """Raises EngineError where it does not answer or cannot sleep."""
        ...

    async def sleep(self, level: int) -> None:
        """Give the GPU's memory free: weights to host memory (1), or away (2). Raises EngineError."""
        ...

    async def wake_up(self, level: int) -> None:
        """Be as before ``sleep(level)``. Raises EngineError."""
        ...

    async def close(self) -> None: ...
