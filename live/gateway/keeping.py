"""Keeps how far batch lines have come, so that after a crash or a drain they go on from there.

A line is kept anew when it has grown enough: what a crash costs is bounded, and so is the work of keeping. A
drain costs nothing.
"""

import asyncio
import logging
from dataclasses import dataclass

import msgspec

from live.gateway.intake import Entry, Intake
from live.jobs import Resume
from live.store.interface import Store

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between two looks at the lines under way."""
LEAST_TOKENS = 64
GROWTH = 0.25
"""A line is kept when it has this share more tokens than were kept of it, and at least ``LEAST_TOKENS``."""
KEEP_ALL_S = 5.0
"""What keeping everything at the end may take."""
BREATH = 16
"""Lines kept between two chances for interactive requests to be served."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Resume).decode


def resume_of(kept: bytes) -> Resume | None:
    """From what the store has of a line."""
    return _decode(kept) if kept else None


@dataclass(slots=True, eq=False)
class _Watched:
    entry: Entry
    tokens: int
    """So many are kept."""


class Keeper:
    """Start ``run`` as a task; cancel it to stop."""

    def __init__(self, store: Store, intake: Intake) -> None:
        self._store = store
        self._intake = intake
        self._lines: dict[tuple[str, int], _Watched] = {}

    def watch(self, batch_id: str, number: int, entry: Entry, resume: Resume | None) -> None:
        """``resume``: what the store has of it already."""
        self._lines[batch_id, number] = _Watched(entry, len(resume.token_ids) if resume is not None else 0)

    def leave(self, batch_id: str, number: int) -> None:
        self._lines.pop((batch_id, number), None)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self._keep(LEAST_TOKENS, GROWTH)
            except Exception:
                log.exception("batch lines could not be kept; trying again")

    async def keep_all(self) -> None:
        """Keep every line as far as it has come now. What the store does not take is left as it was."""
        try:
            async with asyncio.timeout(KEEP_ALL_S):
                await self._keep(1, 0.0)
        except Exception as error:
            log.warning("batch lines go on from what was kept before: %s", error or type(error).__name__)

    async def _keep(self, least_tokens: int, growth: float) -> None:
        """Keep what has grown by so many tokens, and by so much of what is kept of it."""
        kept: dict[str, dict[int, bytes]] = {}
        grown: dict[str, list[tuple[_Watched, int]]] = {}
        service = self._intake.service
        for looked, ((batch_id, number), line) in enumerate(list(self._lines.items())):
            least = line.tokens + max(least_tokens, int(growth * line.tokens))
            resume = service.checkpoint(line.entry.id, least)
            if resume is not None:
                kept.setdefault(batch_id, {})[number] = _encode(resume)
                grown.setdefault(batch_id, []).append((line, len(resume.token_ids)))
            if looked % BREATH == 0:
                await asyncio.sleep(0)
        for batch_id, lines in kept.items():
            await self._store.keep(batch_id, lines)
            for line, tokens in grown[batch_id]:
                line.tokens = tokens
