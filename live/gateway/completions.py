"""/v1/completions and /v1/chat/completions.

Says at once how long the wait will be: in headers, and on request in comments of the stream. The headers of
a stream are sent before its first token if the request has to wait; otherwise with it, so that what an
engine refuses is answered with its own status.
"""

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.types import Receive, Scope, Send

from live.config import LiveConfig
from live.gateway.answers import AnswerHead, EventStream, whole
from live.gateway.asgi import answer, answer_error, headers_of, raw_headers, read_body
from live.gateway.bodies import ChatBody, CompletionBody, StreamOptions, check, parse
from live.gateway.errors import ApiError, retry_later
from live.gateway.intake import Entry, Estimate, Intake
from live.gateway.job_maker import JobMaker
from live.gateway.prompts import prompt_characters
from live.gateway.slo import SloResolver
from live.gateway.tenants import Tenant, Tenants
from live.jobs import CHAT, Delta, Failed, Finished, Job, Output, Rejected

PROGRESS_HEADER = "x-qlm-progress"
"""Seconds between two comments that tell position and estimated wait, until the first token."""
WAIT_HEADER = "x-qlm-estimated-wait-ms"
WAIT_P90_HEADER = "x-qlm-estimated-wait-p90-ms"
POSITION_HEADER = "x-qlm-queue-position"
ACTUAL_HEADER = "x-qlm-wait-ms"

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Completions:
    """The ASGI application of one of the two endpoints."""

    def __init__(
        self,
        endpoint: str,
        config: LiveConfig,
        intake: Intake,
        tenants: Tenants,
        maker: JobMaker,
    ) -> None:
        self._endpoint = endpoint
        self._most_bytes = int(config.gateway.max_body_mib * 2**20)
        self._intake = intake
        self._tenants = tenants
        self._maker = maker
        self._slo = SloResolver(config)
        self._prefix = "chatcmpl-" if endpoint == CHAT else "cmpl-"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["method"] != "POST":
                raise ApiError(
                    405, f"{scope['method']} is not allowed here, POST is.", headers={"allow": "POST"}
                )
            headers = headers_of(scope)
            tenant = self._tenants.identify(headers.get("authorization"))
            body = parse(await read_body(receive, headers, self._most_bytes))
            fields = check(body, self._endpoint)
            self._maker.check_model(fields.model)
            await self._serve(headers, tenant, body, fields, receive, send)
        except ApiError as error:
            await answer_error(send, error)

    async def _serve(
        self,
        headers: Mapping[str, str],
        tenant: Tenant,
        body: dict[str, Any],
        fields: CompletionBody | ChatBody,
        receive: Receive,
        send: Send,
    ) -> None:
        intake = self._intake
        slo = self._slo.resolve(headers, body.get("service_tier"), tenant, fields.model)
        progress_s = _progress_s(headers)
        answer_id = self._prefix + uuid.uuid4().hex
        now = intake.service.now()
        jobs = self._maker.jobs(
            body, fields, self._endpoint, answer_id, slo=slo, tenant=tenant.name, arrived_at=now
        )
        intake.refuse_beyond_limits(tenant, now, len(jobs))
        entries: list[Entry] = []
        try:
            entries.extend(intake.submit(job, tenant, slo) for job in jobs)  # keeps those before a refusal
        except ApiError:
            for entry in entries:
                intake.over(entry, "cancelled")
            raise
        reply = _Reply(
            AnswerHead(answer_id, self._endpoint, fields.model, slo.tier), intake, entries, receive, send
        )
        try:
            await asyncio.sleep(0)  # the scheduler settles what has arrived
            await reply.run(
                options=fields.stream_options or StreamOptions() if fields.stream else None,
                token_ids=bool(body.get("return_token_ids")),
                progress_s=progress_s,
            )
        finally:
            reply.close()
        self._learn(fields, jobs, reply.ends)

    def _learn(
        self, fields: CompletionBody | ChatBody, jobs: Sequence[Job], ends: Sequence[Finished]
    ) -> None:
        counter = self._maker.counters[fields.model]
        for job, end in zip(jobs, ends, strict=False):
            counter.learn(prompt_characters(fields, job.body.get("prompt")), end.prompt_tokens)


class _Reply:
    """One answer on its way out, of one job or of several."""

    def __init__(
        self, head: AnswerHead, intake: Intake, entries: list[Entry], receive: Receive, send: Send
    ) -> None:
        self.ends: list[Finished] = []
        self._head = head
        self._intake = intake
        self._entries = entries
        self._send = send
        self._started = False
        self._complete = False
        """The last piece is made."""
        self._completed = False
        """It is sent, or an error in place of the whole answer."""
        self._gone = asyncio.get_running_loop().create_task(self._hear_of_end(receive))

    async def _hear_of_end(self, receive: Receive) -> None:
        """A client that goes away takes its requests along."""
        while (await receive())["type"] != "http.disconnect":
            pass
        for entry in self._entries:
            self._intake.over(entry, "cancelled")

    def close(self) -> None:
        self._gone.cancel()
        for entry in self._entries:
            self._intake.over(entry, "cancelled")

    async def run(self, *, options: StreamOptions | None, token_ids: bool, progress_s: float | None) -> None:
        """``options``: of the stream; None answers whole."""
        entries = self._entries
        last = entries[-1]  # of several prompts it waits longest
        first = last.estimate = self._intake.estimate(last)
        last.at_once = last.pulled
        extra = self._headers(first)
        if options is None:
            await self._answer_whole(extra)
            return
        told = sum(entry.job.request.prompt_tokens for entry in entries)
        events = EventStream(
            self._head,
            usage=bool(options.include_usage),
            token_ids=token_ids,
            prompt_tokens=told if options.include_usage and options.continuous_usage_stats else None,
        )
        waits = first is not None and (first.position > 0 or progress_s is not None)
        if waits and not any(entry.ended for entry in entries):
            await self._start(extra)
        choices = entries[0].job.body.get("n") or 1
        streams_of = (
            self._stream(entry, events, number * choices, extra, progress_s)
            for number, entry in enumerate(entries)
        )
        if len(entries) == 1:
            await next(streams_of)
        else:
            await asyncio.gather(*streams_of)

    def _headers(self, estimate: Estimate | None) -> list[tuple[bytes, bytes]]:
        told: dict[str, Any] = {"x-request-id": self._head.id}
        if estimate is not None:
            told[WAIT_HEADER] = round(estimate.median_s * 1000)
            told[WAIT_P90_HEADER] = round(estimate.p90_s * 1000)
            told[POSITION_HEADER] = estimate.position
        return raw_headers(told)

    async def _answer_whole(self, extra: list[tuple[bytes, bytes]]) -> None:
        pieces = []
        for entry in self._entries:
            deltas: list[Delta] = []
            ticket = await entry.ticket()
            while batch := await ticket.next_batch():
                for output in batch:
                    if type(output) is Delta:
                        deltas.append(output)
                    else:
                        self._end(entry, output)
            pieces.append(deltas)
        waited = max((entry.first_token_at or 0.0) - entry.arrived_at for entry in self._entries)
        extra.append((ACTUAL_HEADER.encode(), b"%d" % round(waited * 1000)))
        await answer(self._send, 200, extra, whole(self._head, pieces, self.ends))

    async def _stream(
        self,
        entry: Entry,
        events: EventStream,
        index: int,
        extra: list[tuple[bytes, bytes]],
        progress_s: float | None,
    ) -> None:
        batch = await self._first(entry, progress_s)
        ticket = await entry.ticket()
        while batch:
            out = []
            for output in batch:
                if type(output) is Delta:
                    out.append(events.piece(output, index))
                    continue
                try:
                    self._end(entry, output)
                except ApiError as error:
                    if not self._started:
                        self._completed = True  # what others have to say comes too late
                        raise
                    out.append(EventStream.error(error.content()))
                    self._complete = True
                else:
                    if len(self.ends) == len(self._entries):
                        out.append(events.end(self.ends))
                        self._complete = True
            await self._say(out, extra)
            batch = await ticket.next_batch()

    async def _say(self, out: list[bytes], extra: list[tuple[bytes, bytes]]) -> None:
        """Send events; nothing after those that complete the answer."""
        if self._completed:
            return
        if not self._started:
            await self._start(extra)
        if out:
            self._completed = self._complete
            await self._send(
                {"type": "http.response.body", "body": b"".join(out), "more_body": not self._completed}
            )

    async def _first(self, entry: Entry, progress_s: float | None) -> list[Output]:
        """The first pieces. Until they come, comments of the stream tell how long it will take."""
        if progress_s is None:
            return await (await entry.ticket()).next_batch()

        async def first_batch() -> list[Output]:
            return await (await entry.ticket()).next_batch()

        coming = asyncio.get_running_loop().create_task(first_batch())
        try:
            while not coming.done():
                estimate = self._intake.estimate(entry)
                if estimate is not None and self._started:
                    await self._say([_comment(estimate)], [])
                await asyncio.wait({coming}, timeout=progress_s)
            return coming.result()
        finally:
            coming.cancel()

    async def _start(self, extra: list[tuple[bytes, bytes]]) -> None:
        self._started = True
        await self._send(
            {"type": "http.response.start", "status": 200, "headers": [*_STREAM_HEADERS, *extra]}
        )

    def _end(self, entry: Entry, output: Output) -> None:
        """The last output of a job. Raises ApiError where that is no answer."""
        if isinstance(output, Finished):
            self.ends.append(output)
            self._intake.finished(entry, output)
        elif isinstance(output, Rejected):
            self._intake.over(entry, "rejected")
            raise retry_later(
                429,
                f"The estimated wait of {output.estimated_wait_s:.1f} s is beyond the target.",
                output.estimated_wait_s,
                "estimated_wait_too_long",
            )
        else:
            assert isinstance(output, Failed)
            self._intake.over(entry, "failed")
            if output.status == 503:
                raise retry_later(503, output.reason, 5, "shutting_down")
            raise ApiError(output.status, output.reason)


def _comment(estimate: Estimate) -> bytes:
    return (
        f": queued position={estimate.position} estimated_wait_ms={estimate.median_s * 1000:.0f} "
        f"p90_ms={estimate.p90_s * 1000:.0f}\n\n"
    ).encode()


def _progress_s(headers: Mapping[str, str]) -> float | None:
    text = headers.get(PROGRESS_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.05 <= seconds <= 60:
        raise ApiError(
            400,
            f"Header {PROGRESS_HEADER}: found {text!r}, expected seconds from 0.05 to 60.",
            param=PROGRESS_HEADER,
        )
    return seconds
