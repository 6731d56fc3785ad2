"""What a client of the service holds: the output of its job, as it comes."""

import asyncio
from collections.abc import AsyncIterator

from live.jobs import Delta, Job, Output, joined
from qlm_sim.core.types import Request

JOINED = 32
"""Pieces that a job which does not stream may have before they are put together."""


class Ticket:
    """The output of one job: any number of Delta, then one Finished, Failed or Rejected.

    For one reader, in the service's event loop. A job that does not stream gets its Deltas with its end, and
    fewer of them: hundreds of thousands of live objects would hold everybody up when Python collects garbage.
    """

    __slots__ = ("_held", "_ready", "_unjoined", "_waiter", "ended", "request")

    def __init__(self, job: Job) -> None:
        self.request: Request = job.request
        self.ended = False
        """Whether the last output is in; it may be unread."""
        self._ready: list[Output] = []
        self._held: list[Delta] | None = None if job.streams else []
        self._unjoined = 0
        self._waiter: asyncio.Future[None] | None = None

    async def next_batch(self) -> list[Output]:
        """All outputs that are there, at least one; empty when the last one has been read."""
        if not self._ready:
            if self.ended:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        ready, self._ready = self._ready, []
        return ready

    async def __aiter__(self) -> AsyncIterator[Output]:
        while batch := await self.next_batch():
            for output in batch:
                yield output

    # The service's side.

    @property
    def unheard(self) -> bool:
        """Whether the reader can have seen nothing of the output yet."""
        return self._held is not None

    def held_text(self) -> str:
        """The text of a job that does not stream, as far as it has come."""
        return "".join(output.text for output in self._held or ())

    def put(self, output: Delta) -> None:
        if self._held is not None:
            self._held.append(output)
            self._unjoined += 1
            if self._unjoined == JOINED:
                self._unjoined = 0
                self._held[-JOINED:] = joined(self._held[-JOINED:])
        else:
            self._ready.append(output)
            self._wake()

    def forget(self) -> None:
        """Drop what was held for the end: the job starts anew."""
        assert self._held is not None
        self._held.clear()
        self._unjoined = 0

    def end(self, output: Output) -> None:
        if not self.ended:
            self.ended = True
            if self._held is not None:
                self._ready += self._held
            self._ready.append(output)
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
