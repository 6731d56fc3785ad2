"""Works off the batches of the store, on the leader alone.

Lines stay in the store and trickle into the scheduler: of each tenant at most ``batch.window`` are there at
once, those of the batch that expires first in front, so that memory and the time of a decision do not grow
with the backlog. A line's answer is in the store before its place is given to another. A new leader takes
over what the last one had claimed, as far as it had come; nothing is lost by a death at any point, and the
store keeps one answer a line.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from live.config import LiveConfig
from live.gateway.batch_answers import LineAnswers
from live.gateway.batch_lines import EXPIRED as EXPIRED_ERROR
from live.gateway.batch_lines import LineReader, unanswered, write_files
from live.gateway.bodies import check, parse
from live.gateway.ending import end_tasks
from live.gateway.errors import ApiError
from live.gateway.intake import Intake
from live.gateway.job_maker import JobMaker
from live.gateway.keeping import Keeper
from live.gateway.metrics import wall_seconds
from live.gateway.pace import LinePace
from live.gateway.tenants import Tenants
from live.store.interface import (
    CANCELLED,
    CANCELLING,
    COMPLETED,
    EXPIRED,
    FAILED,
    FINALIZING,
    IN_PROGRESS,
    VALIDATING,
    BatchRecord,
    Counts,
    Line,
    Result,
    Store,
    StoreError,
)

log = logging.getLogger(__name__)

POLL_S = 1.0
"""How often the store is asked for batches that another gateway accepted, and for expiry."""
PIECE = 500
"""Lines written to the store at once."""
BREATH = 16
"""Lines validated, or begun, between two chances for interactive requests to be served."""
RETRY_S = 1.0
"""Before the second try of what the store did not take; doubles with each."""
MOST_RETRY_S = 30.0
FILE_GONE = {
    "code": "file_not_found",
    "message": "The input file was deleted before it had been read.",
    "param": "input_file_id",
    "line": None,
}
CHECK_FAILED = {
    "code": "internal_error",
    "message": "The server failed at checking the input file.",
    "param": None,
    "line": None,
}


class _FileGone(Exception):
    """Somebody has deleted the input file."""


class BatchRunner:
    """``start`` and ``close`` belong to the event loop. What was claimed stays so, for the next leader.

    A line whose service ends or breaks under it is not answered for that: it stays claimed too.
    """

    def __init__(
        self, config: LiveConfig, store: Store, intake: Intake, tenants: Tenants, maker: JobMaker
    ) -> None:
        self.lines: dict[str, int] = {"queued": 0, "running": 0}
        """Lines of unfinished batches, for the metrics."""
        self.pace = LinePace()
        self._store = store
        self._service = intake.service
        self._maker = maker
        self._keeper = Keeper(store, intake)
        self._answers = LineAnswers(config, intake, tenants, maker, self._keeper)
        self._owner = uuid.uuid4().hex
        """This life of this gateway's scheduling."""
        self._window = config.batch.window
        self._max_requests = config.batch.max_requests
        self._woken = asyncio.Event()
        self._steps: dict[str, asyncio.Task[None]] = {}
        """Work on whole batches: validating, finalizing."""
        self._running: dict[str, dict[int, asyncio.Task[None]]] = {}
        """Lines under way, by batch and number."""
        self._of_tenant: dict[str, int] = {}
        """Lines under way, by tenant."""
        self._recovered: dict[str, list[Line]] = {}
        """Lines that the last leader had claimed and this one has not started yet."""
        self._seen: set[str] = set()
        self._rounds: list[asyncio.Task[None]] = []
        """What goes on until the end: the rounds over the batches, and the keeping."""

    def wake(self) -> None:
        self._woken.set()

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._rounds = [loop.create_task(self._run()), loop.create_task(self._keeper.run())]

    async def close(self, *, keep: bool) -> None:
        """Stop. Lines under way are given up; ``keep``: the store has first what they have said."""
        await end_tasks(self._rounds)
        if keep:
            await self._keeper.keep_all()
        await end_tasks(self._steps.values())
        await end_tasks([task for each in self._running.values() for task in each.values()])

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            try:
                await self._round()
            except Exception:
                log.exception("a round over the batches failed; trying again")
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._woken.wait()

    async def _round(self) -> None:
        queued = 0
        now = wall_seconds()
        for batch, counts in await self._store.open_batches():
            if batch.id in self._steps:
                continue
            if batch.id not in self._seen:
                self._recovered[batch.id] = await self._store.recover(batch.id, self._owner)
                self._seen.add(batch.id)
            queued += counts.left
            if batch.status == CANCELLING:
                self._begin(batch, self._close(batch, CANCELLED, "cancelled_at"))
            elif batch.status == FINALIZING:
                self._begin(batch, self._close(batch, COMPLETED, "completed_at"))
            elif now >= batch.expires_at:
                self._begin(batch, self._expire(batch))
            elif batch.status == VALIDATING:
                self._begin(batch, self._validate(batch))
            elif counts.left == 0:
                await self._store.move_batch(batch.id, (IN_PROGRESS,), status=FINALIZING, finalizing_at=now)
                self.wake()
            elif self._service.failure is None:
                await self._feed(batch, counts)
        running = sum(len(each) for each in self._running.values())
        if not running:
            self.pace.idle(self._service.now())
        self.lines = {"queued": max(0, queued - running), "running": running}

    def _begin(self, batch: BatchRecord, work: Any) -> None:
        async def step() -> None:
            try:
                await work
            except Exception:
                log.exception("batch %s: %s failed; trying again", batch.id, batch.status)
                await asyncio.sleep(RETRY_S)
            finally:
                del self._steps[batch.id]
                self.wake()

        self._steps[batch.id] = asyncio.get_running_loop().create_task(step())

    # Validating

    async def _validate(self, batch: BatchRecord) -> None:
        reader = LineReader(batch.endpoint, lambda raw: self._check(raw, batch.endpoint), self._max_requests)
        try:
            await self._add_lines(batch, reader)
        except StoreError:
            raise
        except _FileGone:
            reader.errors = [FILE_GONE]
        except Exception:
            log.exception("batch %s: its input file cannot be checked", batch.id)
            reader.errors = [CHECK_FAILED]
        now = wall_seconds()
        if reader.errors:
            await self._store.move_batch(
                batch.id, (VALIDATING,), status=FAILED, failed_at=now, errors=reader.errors
            )
            await self._store.drop_lines(batch.id)
            return
        await self._store.move_batch(batch.id, (VALIDATING,), status=IN_PROGRESS, in_progress_at=now)
        log.info("batch %s: %d requests accepted", batch.id, reader.lines)

    async def _add_lines(self, batch: BatchRecord, reader: LineReader) -> None:
        held: list[Line] = []
        async for line in reader.read(self._content(batch.input_file_id)):
            held.append(line)
            if len(held) % BREATH == 0:
                await asyncio.sleep(0)
            if len(held) == PIECE:
                await self._store.add_lines(batch.id, held)
                held = []
        if not reader.errors:
            await self._store.add_lines(batch.id, held)

    async def _content(self, file_id: str) -> AsyncIterator[bytes]:
        """All of a file. Raises _FileGone where it ends early: half of its lines are no batch."""
        file = await self._store.file(file_id)
        left = file.bytes if file is not None else -1
        async for piece in self._store.read_file(file_id):
            left -= len(piece)
            yield piece
        if left:
            raise _FileGone

    def _check(self, raw: bytes, endpoint: str) -> None:
        body = parse(raw)
        fields = check(body, endpoint)
        if fields.stream:
            raise ApiError(400, "stream: found true, expected no streaming in a batch.", param="stream")
        self._maker.check_model(fields.model)

    # Working off

    async def _feed(self, batch: BatchRecord, counts: Counts) -> None:
        running = self._running.setdefault(batch.id, {})
        room = self._window - self._of_tenant.get(batch.tenant, 0)
        recovered = self._recovered.pop(batch.id, [])
        if recovered:
            taken, rest = recovered[: max(0, room)], recovered[max(0, room) :]
            if rest:
                self._recovered[batch.id] = rest
        elif room >= min(self._window // 8 + 1, counts.left):
            taken = await self._store.claim(batch.id, self._owner, room)
            if not taken and not running:
                # Lines are left and nobody has them: the answer to a claim was lost.
                self._seen.discard(batch.id)
        else:
            taken = []
        for started, line in enumerate(taken):
            if started % BREATH == BREATH - 1:
                await asyncio.sleep(0)
            running[line.number] = asyncio.get_running_loop().create_task(self._answer(batch, line))
            self._of_tenant[batch.tenant] = self._of_tenant.get(batch.tenant, 0) + 1

    async def _answer(self, batch: BatchRecord, line: Line) -> None:
        try:
            result = await self._answers.result(batch, line)
            if result is not None:
                await self._finish(batch.id, result)
                self.pace.answered(self._service.now())
        finally:
            running = self._running[batch.id]
            del running[line.number]
            self._of_tenant[batch.tenant] -= 1
            room = self._window - self._of_tenant[batch.tenant]
            if room > self._window // 8 or not running:
                self.wake()

    async def _finish(self, batch_id: str, result: Result) -> None:
        """Keep a result. It was worth its work, so this goes on until the store takes it."""
        wait_s = RETRY_S
        while True:
            try:
                await self._store.finish(batch_id, result)
                return
            except Exception as error:
                log.warning(
                    "batch %s: the answer to line %d cannot be kept, trying again: %s",
                    batch_id,
                    result.number + 1,
                    error or type(error).__name__,
                )
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, MOST_RETRY_S)

    async def _halt(self, batch: BatchRecord) -> None:
        """End the batch's lines that are under way. Answers that were on their way are kept."""
        await end_tasks(self._running.get(batch.id, {}).values())

    # Closing

    async def _expire(self, batch: BatchRecord) -> None:
        await self._halt(batch)
        self._recovered.pop(batch.id, None)
        store, owner = self._store, self._owner
        while left := await store.recover(batch.id, owner) or await store.claim(batch.id, owner, PIECE):
            await asyncio.gather(*(store.finish(batch.id, unanswered(line, *EXPIRED_ERROR)) for line in left))
        await self._close(batch, EXPIRED, "expired_at")

    async def _close(self, batch: BatchRecord, status: str, stamp: str) -> None:
        """Write the output and error files, then give the batch its last state."""
        await self._halt(batch)
        changes = await write_files(self._store, batch)
        await self._store.move_batch(
            batch.id,
            (VALIDATING, IN_PROGRESS, FINALIZING, CANCELLING),
            status=status,
            **{stamp: wall_seconds()},
            **changes,
        )
        await self._store.drop_lines(batch.id)
        for held in (self._running, self._recovered):
            held.pop(batch.id, None)
        self._seen.discard(batch.id)
        log.info("batch %s: %s", batch.id, status)
