"""What goes into the service, and what comes out of it: one job, and its output piece by piece.

Plain data. Knows no engine, no socket and no scheduler beyond the request that it may know.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

from qlm_sim.core.types import Request

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Job:
    """A client's request with its body."""

    request: Request
    """What the scheduler may know of it."""
    endpoint: str
    """``CHAT`` or ``COMPLETIONS``."""
    body: Mapping[str, Any]
    """The client's body, validated. Model, stream, token ids and max_tokens are set by the drivers."""
    tenant: str = ""
    pinned: bool = False
    """It cannot be resumed from its tokens (n > 1, tools, structured output, penalties, logprobs ...): an
    eviction leaves it running once it has said something."""

    @property
    def streams(self) -> bool:
        """Whether the client wants the output piece by piece."""
        return bool(self.body.get("stream"))


@dataclass(frozen=True, slots=True)
class Resume:
    """What a request had said when it was last on an engine, to go on from there."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Generated tokens that are to be kept."""
    text: str
    """All text that has been given out."""
    skip: int = 0
    """Characters that the next attempt will say again, and which are out already."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of output."""

    choice: Mapping[str, Any]
    """OpenAI's choice: {"index", "delta"} of a chat, {"index", "text", "logprobs"} of a completion."""
    token_ids: tuple[int, ...]

    @property
    def text(self) -> str:
        delta = self.choice.get("delta")
        return (self.choice.get("text") if delta is None else delta.get("content")) or ""


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """The same output in fewer pieces: those of one choice in a row that are nothing but text become one."""
    pieces: list[Delta] = []
    for index, group in groupby(deltas, _index_of_text):
        row = list(group)
        if index is None or len(row) == 1:
            pieces += row
            continue
        text = "".join(delta.text for delta in row)
        choice = dict(row[0].choice)
        choice |= {"text": text} if "text" in choice else {"delta": {"content": text}}
        pieces.append(Delta(choice, tuple(chain.from_iterable(delta.token_ids for delta in row))))
    return pieces


def _index_of_text(delta: Delta) -> int | None:
    """The index of the choice, if the piece tells nothing but text."""
    index = None
    for name, value in delta.choice.items():
        if name == "index":
            index = value
        elif name == "delta":
            if any(told is not None for part, told in value.items() if part != "content"):
                return None
        elif name != "text" and value is not None:
            return None
    return index


@dataclass(frozen=True, slots=True)
class Finished:
    finish_reason: str
    """Of the first choice, as the engine says: "stop" or "length" mostly."""
    prompt_tokens: int
    output_tokens: int
    """All attempts and choices together."""
    cached_tokens: int = 0
    """Prompt tokens that the first attempt found in the engine's prefix cache."""


@dataclass(frozen=True, slots=True)
class Failed:
    status: int
    """HTTP status that fits."""
    reason: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """Refused by admission control before it ran."""

    estimated_wait_s: float


Output = Delta | Finished | Failed | Rejected
