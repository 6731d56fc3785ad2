"""Answers one line of a batch: a request like any other, tried again where it was the server that failed.

Knows no other lines, and nothing of the store: what becomes of a result is its caller's business.
"""

import asyncio
import logging

from live.config import LiveConfig
from live.gateway.answers import AnswerHead, whole
from live.gateway.batch_lines import answered, unanswered
from live.gateway.batches import window_seconds
from live.gateway.bodies import check, parse
from live.gateway.errors import ApiError
from live.gateway.intake import Entry, Intake
from live.gateway.job_maker import JobMaker
from live.gateway.keeping import Keeper, resume_of
from live.gateway.slo import SloResolver
from live.gateway.tenants import Tenants
from live.jobs import Delta, Failed, Finished
from live.store.interface import BatchRecord, Line, Result

log = logging.getLogger(__name__)

TRIES = 5
"""Times that a line may fail for the server's own reasons."""
RETRY_S = 1.0
"""Before the second try; doubles with each."""


class LineAnswers:
    """Cancelling ``result`` gives the line up."""

    def __init__(
        self, config: LiveConfig, intake: Intake, tenants: Tenants, maker: JobMaker, keeper: Keeper
    ) -> None:
        """``keeper``: told every line that is under way."""
        self._intake = intake
        self._tenants = tenants
        self._maker = maker
        self._keeper = keeper
        self._class = config.batch_class
        self._slo = SloResolver(config)

    async def result(self, batch: BatchRecord, line: Line) -> Result | None:
        """What the store is to keep; None where the service broke."""
        for tried in range(TRIES):
            try:
                result = await self._try(batch, line, tried)
            except Exception:
                log.exception("batch %s: line %d failed", batch.id, line.number + 1)
                return None if self._broken else unanswered(line, "internal_error", "The server failed.")
            if result is not None or self._broken:
                return result
            await asyncio.sleep(RETRY_S * 2**tried)
        raise AssertionError("the last try has a result")

    async def _try(self, batch: BatchRecord, line: Line, tried: int) -> Result | None:
        """The answer; None where the server itself failed and another try or leader may do better."""
        # What comes in one instant is ordered by id: lines are to be served in the order of their file.
        answer_id = f"{batch.id}-{line.number:06d}" + (f"-{tried}" if tried else "")
        tenant = self._tenants.by_name(batch.tenant)
        slo = self._slo.of_class(self._class, window_seconds(batch.completion_window))
        entries: list[Entry] = []
        try:
            body = parse(line.body)
            fields = check(body, batch.endpoint)
            self._maker.check_model(fields.model)
            jobs = self._maker.jobs(
                body,
                fields,
                batch.endpoint,
                answer_id,
                slo=slo,
                tenant=tenant.name,
                arrived_at=self._intake.service.clock.since_start(batch.created_at),
            )
            # Several prompts, or a line that failed with what was kept of it, begin anew.
            resume = resume_of(line.kept) if len(jobs) == 1 and not tried else None
            entries.extend(self._intake.submit(job, tenant, slo, batch=True, resume=resume) for job in jobs)
            if len(jobs) == 1:
                self._keeper.watch(batch.id, line.number, entries[0], resume)
            pieces, ends = [], []
            for entry in entries:
                deltas, end = await self._output(entry)
                pieces.append(deltas)
                ends.append(end)
            head = AnswerHead(answer_id, batch.endpoint, fields.model, None)
            return answered(line, 200, answer_id, whole(head, pieces, ends))
        except ApiError as error:
            if (error.status >= 500 or error.status == 429) and (tried + 1 < TRIES or self._broken):
                return None
            return answered(line, error.status, answer_id, error.json())
        finally:
            self._keeper.leave(batch.id, line.number)
            for entry in entries:
                self._intake.over(entry, "cancelled")

    async def _output(self, entry: Entry) -> tuple[list[Delta], Finished]:
        deltas: list[Delta] = []
        ticket = await entry.ticket()
        while batch := await ticket.next_batch():
            for output in batch:
                if isinstance(output, Delta):
                    deltas.append(output)
                elif isinstance(output, Finished):
                    self._intake.finished(entry, output)
                    return deltas, output
                elif isinstance(output, Failed):
                    self._intake.over(entry, "failed")
                    raise ApiError(output.status, output.reason)
                else:
                    self._intake.over(entry, "rejected")
                    raise ApiError(429, "Refused by admission control.")
        raise AssertionError(f"the output of {entry.id} ended without an end")

    @property
    def _broken(self) -> bool:
        """Whether the service can serve nothing any more."""
        return self._intake.service.failure is not None
