"""The fake's HTTP surface: that of vLLM's OpenAI server, development endpoints included."""

import asyncio
import time

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from live.fake.completions import Completions, chat_text
from live.fake.engine import FakeEngine
from live.fake.language import detokenize, tokenize

VERSION = "0.32.0+fake"

_decode = msgspec.json.Decoder().decode


def fake_app(
    engine: FakeEngine, served_model: str | None = None, *, max_queued: int | None = None
) -> Starlette:
    """The ASGI application. ``max_queued``: vLLM's --max-num-queued-reqs, beyond which it answers 503."""
    name = served_model or engine.model
    completions = Completions(engine, name, max_queued)
    control = _Control(engine, name, completions)
    return Starlette(
        routes=[
            Route("/v1/completions", completions.of(chat=False), methods=["POST"]),
            Route("/v1/chat/completions", completions.of(chat=True), methods=["POST"]),
            *control.routes(),
        ]
    )


class _Control:
    """Everything but the completions."""

    def __init__(self, engine: FakeEngine, name: str, completions: Completions) -> None:
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
        tokens = tokenize(chat_text(body["messages"]) if "messages" in body else body["prompt"])
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
