"""A vLLM OpenAI server over HTTP, or anything that speaks as it does.

What a server can do is found out by asking it, not by its version: it may or may not tell token ids, abort
by id, sleep, or tell its configuration.
"""

import json
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec

from live.engines.backend import EngineError, EngineFacts, EngineState, Listener
from live.engines.exposition import metric_labels, metric_sum
from live.engines.wire import Exchange, Wire
from live.jobs import COMPLETIONS

HEALTH_S = 5.0
SERVER_INFO_S = 60.0
"""vLLM looks at the whole machine before it answers the first time."""
CONTROL_S = 600.0
"""Sleeping and waking move whole models."""

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


class HttpBackend:
    def __init__(self, url: str, served_model: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._served_model = served_model
        self._wire = Wire(url, api_key)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None
        self._calls: dict[Listener, _Stream] = {}

    def start(self, listener: Listener) -> None:
        stream = self._calls[listener] = _Stream(listener, self._calls)
        call = listener.call
        body = _encode({**call.body, "model": self._served_model})
        stream.exchange = self._wire.post(call.endpoint, body, stream)

    def abort(self, listener: Listener) -> None:
        """Hang up, upon which the server aborts within a few hundredths of a second."""
        stream = self._calls.pop(listener, None)
        if stream is not None:
            stream.hang_up()
            listener.aborted()

    def forget(self, listener: Listener) -> None:
        stream = self._calls.pop(listener, None)
        if stream is not None:
            stream.hang_up()

    async def close(self) -> None:
        for stream in list(self._calls.values()):
            stream.hang_up()
        self._calls.clear()
        self._wire.close()
        if self._session is not None:
            await self._session.close()

    # What is asked now and then.

    async def healthy(self) -> bool:
        try:
            status, _ = await self._ask("GET", "/health", HEALTH_S)
        except EngineError:
            return False
        return status == 200

    async def probe(self) -> None:
        body = {"model": self._served_model, "prompt": [100, 101], "max_tokens": 1, "temperature": 0}
        await self._order("POST", COMPLETIONS, CONTROL_S, body)

    async def state(self) -> EngineState:
        metrics = await self._order("GET", "/metrics", HEALTH_S)
        return EngineState(
            running=int(metric_sum(metrics, "vllm:num_requests_running")),
            waiting=int(metric_sum(metrics, "vllm:num_requests_waiting")),
            kv_utilization=metric_sum(metrics, "vllm:kv_cache_usage_perc"),
            preemptions=int(metric_sum(metrics, "vllm:num_preemptions_total")),
        )

    async def facts(self) -> EngineFacts:
        models = _decode(await self._order("GET", "/v1/models", HEALTH_S))["data"]
        names = [each["id"] for each in models]
        if self._served_model not in names:
            raise EngineError(f"{self.url} serves {', '.join(names)}, not {self._served_model}")
        entry = models[names.index(self._served_model)]
        cache = metric_labels(await self._maybe("/metrics") or "", "vllm:cache_config_info")
        version = await self._maybe("/version")
        limits = _limits(await self._maybe("/server_info?config_format=json", SERVER_INFO_S))
        return EngineFacts(
            version=_decode(version).get("version") if version else None,
            max_model_len=entry.get("max_model_len"),
            num_gpu_blocks=_number(cache.get("num_gpu_blocks")),
            block_size=_number(cache.get("block_size")),
            max_num_seqs=limits.get("max_num_seqs"),
            max_num_batched_tokens=limits.get("max_num_batched_tokens"),
        )

    async def asleep(self) -> bool:
        said = await self._maybe("/is_sleeping")
        return bool(said and _decode(said).get("is_sleeping"))

    async def sleep(self, level: int) -> None:
        await self._order("POST", f"/sleep?level={level}", CONTROL_S)

    async def wake_up(self, level: int) -> None:
        if level < 2:
            await self._order("POST", "/wake_up", CONTROL_S)
            return
        await self._order("POST", "/wake_up?tags=weights", CONTROL_S)
        await self._order("POST", "/collective_rpc", CONTROL_S, {"method": "reload_weights"})
        await self._order("POST", "/wake_up?tags=kv_cache", CONTROL_S)

    async def _maybe(self, path: str, timeout_s: float = HEALTH_S) -> str | None:
        """What the server says there, or None if it does not know the path."""
        status, text = await self._ask("GET", path, timeout_s)
        return text if status == 200 else None

    async def _order(self, method: str, path: str, timeout_s: float, body: Any = None) -> str:
        status, text = await self._ask(method, path, timeout_s, body)
        if status != 200:
            raise EngineError(f"{self.url}{path}: HTTP {status} {' '.join(text.split())[:200]}")
        return text

    async def _ask(self, method: str, path: str, timeout_s: float, body: Any = None) -> tuple[int, str]:
        if self._session is None:
            self._session = aiohttp.ClientSession(headers=self._headers)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(method, self.url + path, json=body, timeout=timeout) as response:
                return response.status, await response.text()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineError(f"{self.url}{path}: {error or 'timed out'}") from None


class _Stream:
    """Hears the events of one call and tells the listener."""

    __slots__ = ("_body", "_calls", "_listener", "_status", "_usage", "exchange")

    def __init__(self, listener: Listener, calls: "dict[Listener, _Stream]") -> None:
        self._listener = listener
        self._calls = calls
        self._status = 0
        self._usage: Mapping[str, Any] | None = None
        self._body = b""
        self.exchange: Exchange | None = None

    def hang_up(self) -> None:
        if self.exchange is not None:
            self.exchange.cancel()

    def status(self, status: int) -> None:
        self._status = status

    def data(self, event: bytes) -> None:
        if self._status != 200:
            self._body = event
            return
        if event == b"[DONE]":
            return
        chunk = _decode(event)
        usage = chunk.get("usage")
        if usage is not None:
            self._usage = usage
        for choice in chunk.get("choices", ()):
            said = choice.pop("prompt_token_ids", None)
            self._listener.said(
                choice, choice.pop("token_ids", None) or (), said or chunk.get("prompt_token_ids")
            )
        if "error" in chunk:
            self._body = event
            self._status = int((chunk["error"] or {}).get("code") or 500)

    def closed(self, error: str | None) -> None:
        listener = self._listener
        if self._calls.pop(listener, None) is None:
            return
        if error is not None:
            listener.lost(error)
        elif self._status != 200:
            listener.refused(self._status, _reason(self._body))
        else:
            listener.ended(self._usage)


def _reason(body: bytes) -> str:
    """The message of an error in OpenAI's shape, or the body itself."""
    try:
        said = _decode(body)
        return str((said.get("error") or said).get("message") or said)
    except (msgspec.DecodeError, AttributeError):
        return " ".join(body.decode("utf-8", "replace").split())[:200]


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _limits(server_info: str | None) -> dict[str, int]:
    """The scheduler's limits from /server_info, where the server has that."""
    if not server_info:
        return {}
    try:
        config = json.loads(server_info)["vllm_config"]["scheduler_config"]
        return {name: int(config[name]) for name in ("max_num_seqs", "max_num_batched_tokens")}
    except (ValueError, KeyError, TypeError):
        return {}
