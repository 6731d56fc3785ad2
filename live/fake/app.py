"""The fake's HTTP surface: that of vLLM's OpenAI server, development endpoints included."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from live.fake.engine import FakeEngine, Generation
from live.fake.language import detokenize, tokenize
from live.transcript import held_back

VERSION = "0.32.0+fake"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode
_STREAM_HEAD = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")],
}


class BadRequest(Exception):
    """The client's fault."""


def fake_app(
    engine: FakeEngine, served_model: str | None = None, *, max_queued: int | None = None
) -> Starlette:
    """The ASGI application. ``max_queued``: vLLM's --max-num-queued-reqs, beyond which it answers 503."""
    name = served_model or engine.model
    completions = _Completions(engine, name, max_queued)
    control = _Control(engine, name, completions)
    return Starlette(
        routes=[
            Route("/v1/completions", completions.of(chat=False), methods=["POST"]),
            Route("/v1/chat/completions", completions.of(chat=True), methods=["POST"]),
            *control.routes(),
        ]
    )


class _Endpoint:
    """A raw ASGI endpoint: a class instance, which Starlette's Route does not wrap."""

    def __init__(self, completions: "_Completions", chat: bool) -> None:
        self._completions = completions
        self._chat = chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._completions.serve(receive, send, self._chat)


class _Completions:
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
            self.prompt = tokenize("".join(f"{each['role']}: {_content(each)}\n" for each in messages))
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


class _Control:
    """Everything but the completions."""

    def __init__(self, engine: FakeEngine, name: str, completions: _Completions) -> None:
        self._engine = engine
        self._name = name
        self._completions = completions

    def routes(self) -> list[Route]:
        get = {
            "/health": self.health,
            "/version": self.version,
            "/v1/models": self.models,
            "/metrics": self.metrics,
            "/load": self.load,
            "/is_sleeping": self.is_sleeping,
            "/is_paused": self.is_paused,
            "/server_info": self.server_info,
        }
        post = {
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
            "/sleep": self.sleep,
            "/wake_up": self.wake_up,
            "/pause": self.pause,
            "/resume": self.resume,
            "/abort_requests": self.abort_requests,
            "/collective_rpc": self.collective_rpc,
            "/reset_prefix_cache": self.done,
        }
        return [Route(path, method, methods=["GET"]) for path, method in get.items()] + [
            Route(path, method, methods=["POST"]) for path, method in post.items()
        ]

    async def health(self, request: HttpRequest) -> Response:
        return Response()

    async def done(self, request: HttpRequest) -> Response:
        return Response()

    async def version(self, request: HttpRequest) -> Response:
        return JSONResponse({"version": VERSION})

    async def models(self, request: HttpRequest) -> Response:
        entry = {
            "id": self._name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "vllm",
            "root": self._name,
            "parent": None,
            "max_model_len": self._engine.scheduler.longest_context,
        }
        return JSONResponse({"object": "list", "data": [entry]})

    async def load(self, request: HttpRequest) -> Response:
        return JSONResponse({"server_load": len(self._completions.calls)})

    async def server_info(self, request: HttpRequest) -> Response:
        profile = self._engine.profile
        limits = {
            "max_num_seqs": profile.max_num_seqs,
            "max_num_batched_tokens": profile.max_num_batched_tokens,
        }
        return JSONResponse({"vllm_config": {"scheduler_config": limits}})

    async def metrics(self, request: HttpRequest) -> Response:
        engine = self._engine
        scheduler = engine.scheduler
        label = f'{{engine="0",model_name="{self._name}"}}'
        asleep = int(engine.sleep_level is not None)
        values = (
            ("gauge", "vllm:num_requests_running", engine.running),
            ("gauge", "vllm:num_requests_waiting", engine.waiting),
            ("gauge", "vllm:kv_cache_usage_perc", engine.kv_utilization),
            ("counter", "vllm:num_preemptions_total", scheduler.preemptions),
            ("counter", "vllm:generation_tokens_total", engine.generated_tokens),
            ("gauge", "vllm:engine_sleep_state", 1 - asleep),
        )
        lines = []
        for kind, metric, value in values:
            lines += [f"# TYPE {metric} {kind}", f"{metric}{label} {float(value)}"]
        cache = f'block_size="{scheduler.block_size}",engine="0",num_gpu_blocks="{scheduler.blocks}"'
        lines += ["# TYPE vllm:cache_config_info gauge", f"vllm:cache_config_info{{{cache}}} 1.0", ""]
        return PlainTextResponse("\n".join(lines))

    async def tokenize(self, request: HttpRequest) -> Response:
        body = _decode(await request.body())
        if "messages" in body:
            text = "".join(f"{each['role']}: {_content(each)}\n" for each in body["messages"])
        else:
            text = body["prompt"]
        tokens = tokenize(text)
        longest = self._engine.scheduler.longest_context
        return JSONResponse({"count": len(tokens), "max_model_len": longest, "tokens": tokens})

    async def detokenize(self, request: HttpRequest) -> Response:
        return JSONResponse({"prompt": detokenize(_decode(await request.body())["tokens"])})

    async def sleep(self, request: HttpRequest) -> Response:
        await self._engine.sleep(int(request.query_params.get("level", 1)))
        return Response()

    async def wake_up(self, request: HttpRequest) -> Response:
        tags = request.query_params.getlist("tags")
        if not tags or "kv_cache" in tags:
            if not self._engine.weights:
                return JSONResponse({"error": "vLLM would speak nonsense: no weights were loaded"}, 500)
            await self._engine.wake_up()
        return Response()

    async def collective_rpc(self, request: HttpRequest) -> Response:
        if _decode(await request.body()).get("method") == "reload_weights":
            await self._engine.reload_weights()
        return JSONResponse({"results": [None]})

    async def is_sleeping(self, request: HttpRequest) -> Response:
        return JSONResponse({"is_sleeping": self._engine.sleep_level is not None})

    async def pause(self, request: HttpRequest) -> Response:
        engine = self._engine
        mode = request.query_params.get("mode", "abort")
        if mode == "abort":
            engine.abort_all()
        elif mode == "wait":
            while engine.running or engine.waiting:
                await asyncio.sleep(0.001)
        engine.paused = True
        return JSONResponse({"status": "paused"})

    async def resume(self, request: HttpRequest) -> Response:
        self._engine.paused = False
        self._engine.go_on()
        return JSONResponse({"status": "resumed"})

    async def is_paused(self, request: HttpRequest) -> Response:
        return JSONResponse({"is_paused": self._engine.paused})

    async def abort_requests(self, request: HttpRequest) -> Response:
        for call_id in _decode(await request.body()).get("request_ids", ()):
            generation = self._completions.calls.get(call_id)
            if generation is not None:
                self._engine.abort(generation)
        return Response()


def _prompt(prompt: Any) -> list[int]:
    if isinstance(prompt, str) and prompt:
        return tokenize(prompt)
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt):
        return prompt
    if isinstance(prompt, list) and len(prompt) == 1:
        return _prompt(prompt[0])
    raise BadRequest("prompt must be a text or a list of token ids, and not empty")


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
