"""One request on its way through engines, and one attempt to serve it on one of them.

An attempt turns what its engine says into the client's output and the core's events. It decides nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from live.engines.backend import Call
from live.jobs import CHAT, COMPLETIONS, Delta, Failed, Finished, Job, Resume
from live.ticket import Ticket
from live.transcript import Transcript
from qlm_sim.core.events import Event, FirstToken, RequestFinished

if TYPE_CHECKING:
    from live.engines.instance import Instance

MOST_LOST = 5
"""Attempts in a row that may be lost without a token, after which the request fails."""
MOST_CRASHES = 5
"""Engines that may go down under a request, after which it fails: it may be what breaks them."""

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "include_stop_str_in_output",
    "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "logit_bias", "bad_words", "allowed_token_ids", "priority",
    "user", "vllm_xargs", "cache_salt", "repetition_detection",
)  # fmt: skip
"""What a resumed attempt keeps of the client's body: what shapes the text and is no part of the prompt."""


class LiveRequest:
    """A job in the service, from its arrival to its end."""

    __slots__ = (
        "attempt", "cached_tokens", "cancelled", "crashes", "job", "lost", "prompt_tokens", "ticket",
        "transcript",
    )  # fmt: skip

    def __init__(self, job: Job, resume: Resume | None) -> None:
        self.job = job
        self.ticket = Ticket(job)
        self.transcript = Transcript(job.body, resume)
        self.attempt: Attempt | None = None
        """The one under way."""
        self.cancelled = False
        self.lost = 0
        """Attempts that were lost in a row without a token in between."""
        self.crashes = 0
        """Engines that went down under it."""
        self.prompt_tokens = job.request.prompt_tokens
        self.cached_tokens = 0
        if resume is not None:
            self.prompt_tokens = len(resume.prompt_token_ids)
            if not job.streams:
                self.ticket.put(Delta(self.choice(resume.text), resume.token_ids))

    @property
    def id(self) -> str:
        return self.job.request.id

    def choice(self, text: str, logprobs: Any = None, finish_reason: str | None = None) -> dict[str, Any]:
        """A piece of text, as the first attempt would have told it."""
        told = {"index": 0, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**told, "delta": {"content": text}} if self.job.endpoint == CHAT else {**told, "text": text}

    @property
    def movable(self) -> bool:
        """Whether it can be taken from its engine and go on elsewhere."""
        transcript = self.transcript
        if not transcript.token_ids and not transcript.said:
            return True
        if self.job.pinned or not transcript.resumable or transcript.prompt_token_ids is None:
            return self.ticket.unheard
        return True

    def cut(self) -> int:
        """Go back to where it can go on. Returns the tokens that are kept."""
        transcript = self.transcript
        if self.job.pinned or not transcript.resumable or transcript.prompt_token_ids is None:
            transcript.restart()
            if self.ticket.unheard:
                self.ticket.forget()
            return 0
        return transcript.cut()


class Attempt:
    """One request on one engine. The listener of its call."""

    __slots__ = (
        "_chat", "_post", "_resumed", "began", "call", "evicting", "finish_reason", "instance", "kept",
        "live", "number", "over",
    )  # fmt: skip

    def __init__(
        self, live: LiveRequest, number: int, instance: "Instance", post: Callable[[Event], None]
    ) -> None:
        self.live = live
        self.number = number
        self.instance = instance
        self.evicting = False
        """The core has ordered it back."""
        self.over = False
        self.began = False
        """Whether this attempt has said a token."""
        self.kept = len(live.transcript.token_ids)
        """Tokens of earlier attempts."""
        self.finish_reason: str | None = None
        self._post = post
        self._resumed = self.kept > 0 or live.transcript.said > 0
        self._chat = live.job.endpoint == CHAT
        self.call = self._make_call()

    def _make_call(self) -> Call:
        job, transcript = self.live.job, self.live.transcript
        call_id = f"{job.request.id}-{self.number}"
        body: dict[str, Any]
        if self._resumed:
            body = {name: job.body[name] for name in _SAMPLING if name in job.body}
            assert transcript.prompt_token_ids is not None
            body["prompt"] = [*transcript.prompt_token_ids, *transcript.token_ids]
            if job.body.get("min_tokens"):
                body["min_tokens"] = max(0, job.body["min_tokens"] - self.kept)
            if not self._chat and job.body.get("logprobs") is not None:
                body["logprobs"] = job.body["logprobs"]
        else:
            body = dict(job.body)
            body.pop("max_completion_tokens", None)
            body.pop("max_tokens", None)
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        body["stream"] = body["return_token_ids"] = True
        body["stream_options"] = {"include_usage": True}
        body["request_id"] = call_id
        return Call(call_id, COMPLETIONS if self._resumed else job.endpoint, body)

    @property
    def max_tokens(self) -> int | None:
        """What is left to generate of what the client asked for.

        A chat without a limit takes what its context leaves. None until the engine has told the prompt's
        length: it sets the limit itself.
        """
        job = self.live.job
        most = job.body.get("max_tokens")
        if self._chat:
            most = job.body.get("max_completion_tokens") or most
        if most is None and not self._chat:
            most = job.request.max_tokens
        if most is None and self._resumed:
            context_tokens = self.instance.models[job.request.model].max_model_len
            most = context_tokens - len(self.live.transcript.prompt_token_ids or ())
        return most - self.kept if most is not None else None

    @property
    def output_tokens(self) -> int:
        """Generated so far, all attempts together."""
        return len(self.live.transcript.token_ids)

    @property
    def context_tokens(self) -> int:
        """Tokens that it has on the engine, about."""
        return self.live.prompt_tokens + len(self.live.transcript.token_ids)

    # What the engine says.

    def said(
        self,
        choice: dict[str, Any],
        token_ids: Sequence[int],
        prompt_token_ids: Sequence[int] | None,
    ) -> None:
        if self.over:
            return
        live = self.live
        transcript = live.transcript
        self.instance.heard()
        if prompt_token_ids and transcript.prompt_token_ids is None:
            transcript.prompt_token_ids = tuple(prompt_token_ids)
            live.prompt_tokens = len(prompt_token_ids)
        reason = choice.get("finish_reason")
        if reason:
            if reason == "abort":
                self.aborted()
                return
            self.finish_reason = self.finish_reason or reason
        if self._chat and not self._resumed:
            delta = choice["delta"]
            text = delta.get("content") or ""
            if len(delta) > 1 and any(delta[k] for k in delta if k not in ("content", "role")):
                transcript.resumable = False  # parsed output: reasoning, tool calls
        else:
            text = choice.get("text") or ""
        new = transcript.add(text, token_ids)
        if not self.began and (token_ids or text):
            self.began = True
            live.lost = 0
            self._post(FirstToken(live.job.request.id, self.number, self.instance.id))
        if self._resumed:
            choice = live.choice(new, choice.get("logprobs"), choice.get("finish_reason"))
        if not (token_ids or reason or new) and self._resumed:
            return
        live.ticket.put(Delta(choice, tuple(token_ids)))

    def ended(self, usage: Mapping[str, Any] | None) -> None:
        if self.over:
            return
        live = self.live
        if self.finish_reason is None:
            self.lost("the stream ended without a finish reason")
            return
        usage = usage or {}
        details = usage.get("prompt_tokens_details") or {}
        if not self._resumed:
            live.prompt_tokens = usage.get("prompt_tokens", live.prompt_tokens)
            live.cached_tokens = details.get("cached_tokens") or 0
        self.finish(max(self.output_tokens, self.kept + usage.get("completion_tokens", 0)))

    def finish(self, output_tokens: int) -> None:
        live = self.live
        self._leave()
        self._post(RequestFinished(live.id, self.number, self.instance.id, output_tokens))
        self.instance.over(self)
        live.ticket.end(
            Finished(self.finish_reason or "length", live.prompt_tokens, output_tokens, live.cached_tokens)
        )

    def aborted(self) -> None:
        if self.over:
            return
        if not self.evicting:
            self.lost("the engine aborted it")
            return
        self._leave()
        self.instance.gave_back(self)

    def refused(self, status: int, reason: str) -> None:
        if self.over:
            return
        if status >= 500 or status == 429:
            self.lost(f"HTTP {status}: {reason}")
            return
        self.fail(status, reason)

    def fail(self, status: int, reason: str) -> None:
        self._leave()
        self.instance.failed(self, reason)
        self.live.ticket.end(Failed(status, reason))

    def lost(self, reason: str) -> None:
        if self.over:
            return
        self._leave()
        self.instance.lost(self, reason)

    def detach(self) -> None:
        """Its engine is gone."""
        self._leave()

    def _leave(self) -> None:
        self.over = True
        self.live.attempt = None
