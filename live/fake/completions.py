"""The fake's completions and chat completions, streamed as vLLM streams them or whole."""

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from live.fake.engine import FakeEngine, Generation
from live.fake.language import tokenize
from live.transcript import held_back

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode
_STREAM_HEAD = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")],
}


class BadRequest(Exception):
    """The client's fault."""


class _Endpoint:
    """A raw ASGI endpoint: a class instance, which Starlette's Route does not wrap."""

    def __init__(self, completions: "Completions", chat: bool) -> None:
        self._completions = completions
        self._chat = chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._completions.serve(receive, send, self._chat)


class Completions:
    """Both completion endpoints."""

    def __init__(self, engine: FakeEngine, name: str, max_queued: int | None) -> None:
        self._engine = engine
        self._name = name
        self._max_queued = max_queued
        self.calls: dict[str, Generation] = {}
        """What is under way, by the id that the answer has."""
        self._number = 0

    def of(self, *, chat: bool) -> _Endpoint:
        return _Endpoint(self, chat)

    async def serve(self, receive: Receive, send: Send, chat: bool) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        try:
            call = _Call(_decode(body), chat, self._name, self._engine)
        except (BadRequest, msgspec.DecodeError) as error:
            await _answer(send, 400, _error(str(error), "BadRequestError", 400))
            return
        if call.model != self._name:
            await _answer(
                send, 404, _error(f"The model `{call.model}` does not exist.", "NotFoundError", 404)
            )
            return
        if self._max_queued is not None and self._engine.waiting >= self._max_queued:
            await _answer(send, 503, _error("The server is overloaded.", "ServiceUnavailableError", 503))
            return
        self._number += 1
        call.id = ("chatcmpl-" if chat else "cmpl-") + str(call.body.get("request_id") or self._number)
        if not chat:
            call.id += "-0"
        try:
            generation = call.begin()
        except ValueError as error:
            await _answer(send, 400, _error(str(error), "BadRequestError", 400))
            return
        self.calls[call.id] = generation
        watch = asyncio.ensure_future(self._watch(receive, generation))
        try:
            if call.body.get("stream"):
                await _stream(send, call, generation)
            else:
                await _whole(send, call, generation)
        finally:
            watch.cancel()
            self._engine.abort(generation)
            self.calls.pop(call.id, None)

    async def _watch(self, receive: Receive, generation: Generation) -> None:
        """Abort when the client hangs up."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._engine.abort(generation)


class _Call:
    """One request for text."""

    def __init__(self, body: Any, chat: bool, name: str, engine: FakeEngine) -> None:
        if not isinstance(body, dict):
            raise BadRequest("the body is no JSON object")
        self.body = body
        self.chat = chat
        self.id = ""
        self.created = int(time.time())
        self.model = body.get("model", name)
        self.told = body.get("return_token_ids")
        self._engine = engine
        if chat:
            messages = body.get("messages")
            if not isinstance(messages, list) or not messages:
                raise BadRequest("messages must be a list of at least one message")
            self.prompt = tokenize(chat_text(messages))
        else:
            self.prompt = _prompt(body.get("prompt"))
        room = engine.scheduler.longest_context - len(self.prompt)
        most = body.get("max_completion_tokens", body.get("max_tokens"))
        self.max_tokens = int(most) if most is not None else room if chat else 16
        if self.max_tokens < 1:
            raise BadRequest(f"max_tokens must be at least 1, got {self.max_tokens}.")
        self.held_back = held_back(body)

    def begin(self) -> Generation:
        stop = self.body.get("stop") or ()
        return self._engine.add(
            self.id,
            self.prompt,
            self.max_tokens,
            ignore_end=bool(self.body.get("ignore_eos")),
            stop=[stop] if isinstance(stop, str) else stop,
            priority=float(self.body.get("priority") or 0),
        )

    def usage(self, generation: Generation) -> dict[str, Any]:
        said = generation.emitted
        return {
            "prompt_tokens": len(self.prompt),
            "total_tokens": len(self.prompt) + said,
            "completion_tokens": said,
            "prompt_tokens_details": {"cached_tokens": 0},
        }


async def _stream(send: Send, call: _Call, generation: Generation) -> None:
    await send(dict(_STREAM_HEAD))
    kind = "chat.completion.chunk" if call.chat else "text_completion"
    head = _encode({"id": call.id, "object": kind, "created": call.created, "model": call.model})[:-1]
    head = b"data: " + head + b',"choices":[{"index":0,'
    piece = b'"delta":{"content":' if call.chat else b'"text":'
    close = b"}," if call.chat else b","
    first_ids = b',"prompt_token_ids":' + _encode(call.prompt) if call.told else b""
    out = b""
    if call.chat:
        out = b'%b"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]%b}\n\n'
        out %= (head, first_ids)
        first_ids = b""
    held = _Held(generation, call.held_back)
    while True:
        new = await generation.more()
        done = generation.done
        for at in new:
            last = done and at == generation.emitted - 1
            reason = _encode(generation.finish_reason) if last else b"null"
            text = _encode(held.text(at, last=last))
            ids = b',"token_ids":[%d]%b' % (generation.tokens[at], first_ids) if call.told else b""
            first_ids = b""
            out += b'%b%b%b%b"logprobs":null,"finish_reason":%b%b}]}\n\n' % (
                head, piece, text, close, reason, ids,
            )  # fmt: skip
        if done:
            break
        await send({"type": "http.response.body", "body": out, "more_body": True})
        out = b""
    if generation.finish_reason == "abort":
        out += b'%b%b""%b"logprobs":null,"finish_reason":"abort"}]}\n\n' % (head, piece, close)
    if (call.body.get("stream_options") or {}).get("include_usage"):
        end = {"id": call.id, "object": kind, "created": call.created, "model": call.model}
        out += b"data: " + _encode({**end, "choices": [], "usage": call.usage(generation)}) + b"\n\n"
    await send({"type": "http.response.body", "body": out + b"data: [DONE]\n\n"})


class _Held:
    """The text of each token, less what is held back while it might begin a stop string."""

    def __init__(self, generation: Generation, held_back: int) -> None:
        self._texts = generation.texts
        self._held_back = held_back
        self._pending = ""

    def text(self, at: int, *, last: bool) -> str:
        if not self._held_back:
            return self._texts[at]
        self._pending += self._texts[at]
        ready = len(self._pending) if last else max(0, len(self._pending) - self._held_back)
        text, self._pending = self._pending[:ready], self._pending[ready:]
        return text


async def _whole(send: Send, call: _Call, generation: Generation) -> None:
    while not generation.done:
        await generation.more()
    text = "".join(generation.texts[: generation.emitted])
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": generation.finish_reason}
    if call.chat:
        choice["message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    answer: dict[str, Any] = {
        "id": call.id,
        "object": "chat.completion" if call.chat else "text_completion",
        "created": call.created,
        "model": call.model,
        "choices": [choice],
        "usage": call.usage(generation),
    }
    if call.told:
        choice["token_ids"] = generation.tokens
        (answer if call.chat else choice)["prompt_token_ids"] = call.prompt
    await _answer(send, 200, answer)


def _prompt(prompt: Any) -> list[int]:
    if isinstance(prompt, str) and prompt:
        return tokenize(prompt)
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt):
        return prompt
    if isinstance(prompt, list) and len(prompt) == 1:
        return _prompt(prompt[0])
    raise BadRequest("prompt must be a text or a list of token ids, and not empty")


def chat_text(messages: Iterable[Mapping[str, Any]]) -> str:
    """What the model reads of a conversation."""
    return "".join(f"{each['role']}: {_content(each)}\n" for each in messages)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def _error(message: str, kind: str, code: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def _answer(send: Send, status: int, body: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": _encode(body)})
