"""vLLM's AsyncLLM in this very process: no server between. The only module that imports vllm.

What computes is a child process that vLLM makes, which a guard ends if we are killed. For plain text: what
needs the server's own machinery (tools, structured output, logprobs) is refused.
"""

import asyncio
import contextlib
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import vllm.exceptions
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.reader import get_metrics_snapshot

from live.engines.backend import Backend, EngineError, EngineFacts, EngineState, Listener
from live.engines.guard import Guard, dismiss, watch_over
from live.jobs import CHAT
from qlm_sim.errors import InputError

_TAKEN = (
    "n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids",
    "ignore_eos", "min_tokens", "include_stop_str_in_output", "skip_special_tokens",
    "spaces_between_special_tokens", "bad_words", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "allowed_token_ids",
)  # fmt: skip
_REFUSED = (
    "tools", "response_format", "structured_outputs", "logprobs", "top_logprobs", "prompt_logprobs", "echo",
    "best_of", "use_beam_search", "suffix",
)  # fmt: skip
_CLIENT_ERRORS = (ValueError, getattr(vllm.exceptions, "VLLMClientError", ValueError))
"""What a request is at fault for; the second since vLLM 0.30 or so."""


GUARD_S = 0.1
"""While an engine starts: between two looks for child processes to guard."""


class InProcessBackend:
    """One AsyncLLM."""

    def __init__(self, engine: AsyncLLM, served_model: str) -> None:
        self._engine = engine
        self._served_model = served_model
        self._calls: dict[Listener, asyncio.Task[None]] = {}
        self._defaults: Mapping[str, Any] = engine.model_config.get_diff_sampling_param()

    def start(self, listener: Listener) -> None:
        task = asyncio.get_running_loop().create_task(self._run(listener))
        self._calls[listener] = task
        task.add_done_callback(lambda _: self._calls.pop(listener, None))

    def abort(self, listener: Listener) -> None:
        if self._end(listener):
            listener.aborted()

    def forget(self, listener: Listener) -> None:
        self._end(listener)

    def _end(self, listener: Listener) -> bool:
        """Cancelling what generates aborts it in the engine."""
        task = self._calls.pop(listener, None)
        return task is not None and task.cancel()

    async def _run(self, listener: Listener) -> None:
        call = listener.call
        chat = call.endpoint == CHAT
        try:
            prompt = self._prompt(call.body, chat)
            params = self._sampling(call.body)
        except Exception as error:  # of the template too, which may refuse a chat in words of its own
            listener.refused(400, str(error))
            return
        usage: dict[str, Any] = {"prompt_tokens": 0, "completion_tokens": 0}
        try:
            async for output in self._engine.generate(prompt, params, call.id):
                usage["prompt_tokens"] = len(output.prompt_token_ids or ())
                usage["prompt_tokens_details"] = {"cached_tokens": output.num_cached_tokens or 0}
                for piece in output.outputs:
                    usage["completion_tokens"] += len(piece.token_ids)
                    text = {"delta": {"content": piece.text}} if chat else {"text": piece.text}
                    choice = {"index": piece.index, **text, "logprobs": None}
                    choice["finish_reason"] = piece.finish_reason
                    listener.said(choice, tuple(piece.token_ids), output.prompt_token_ids)
        except asyncio.CancelledError:
            raise
        except _CLIENT_ERRORS as error:
            listener.refused(400, str(error))
        except Exception as error:
            listener.lost(f"{type(error).__name__}: {error}")
        else:
            listener.ended(usage)

    def _prompt(self, body: Mapping[str, Any], chat: bool) -> Any:
        if not chat:
            prompt = body["prompt"]
            return {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        tokenizer = self._engine.get_tokenizer()
        ids = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return {"prompt_token_ids": list(ids)}

    def _sampling(self, body: Mapping[str, Any]) -> SamplingParams:
        for name in _REFUSED:
            if body.get(name):
                raise ValueError(f"{name} takes a server: this engine runs in process")
        given = {name: body[name] for name in _TAKEN if body.get(name) is not None}
        if "logit_bias" in given:
            given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
        return SamplingParams(
            **{"max_tokens": None, **self._defaults, **given},
            output_kind=RequestOutputKind.DELTA,
        )

    async def healthy(self) -> bool:
        return not self._engine.errored

    async def probe(self) -> None:
        params = SamplingParams(max_tokens=1, temperature=0.0)
        try:
            async for _ in self._engine.generate({"prompt_token_ids": [100, 101]}, params, "probe"):
                pass
        except Exception as error:
            raise EngineError(f"{type(error).__name__}: {error}") from None

    async def state(self) -> EngineState:
        if self._engine.errored:
            raise EngineError("the engine is dead")
        values: dict[str, float] = {}
        for metric in get_metrics_snapshot():
            if metric.labels.get("model_name") == self._served_model and hasattr(metric, "value"):
                values[metric.name] = values.get(metric.name, 0.0) + metric.value
        return EngineState(
            running=int(values.get("vllm:num_requests_running", 0)),
            waiting=int(values.get("vllm:num_requests_waiting", 0)),
            kv_utilization=values.get("vllm:kv_cache_usage_perc", 0.0),
            preemptions=int(values.get("vllm:num_preemptions", 0)),
        )

    async def facts(self) -> EngineFacts:
        config = self._engine.vllm_config
        return EngineFacts(
            version=None,
            max_model_len=config.model_config.max_model_len,
            num_gpu_blocks=config.cache_config.num_gpu_blocks,
            block_size=config.cache_config.block_size,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        )

    async def asleep(self) -> bool:
        return bool(await self._engine.is_sleeping())

    async def sleep(self, level: int) -> None:
        await _order(self._engine.sleep(level))

    async def wake_up(self, level: int) -> None:
        if level < 2:
            await _order(self._engine.wake_up())
            return
        await _order(self._engine.wake_up(["weights"]))
        await _order(self._engine.collective_rpc("reload_weights"))
        await _order(self._engine.wake_up(["kv_cache"]))

    async def close(self) -> None:
        for task in list(self._calls.values()):
            task.cancel()
        self._calls.clear()


async def _order(order: Any) -> None:
    try:
        await order
    except Exception as error:
        raise EngineError(f"{type(error).__name__}: {error}") from None


def _parsed(flags: Sequence[str]) -> Any:
    """vLLM's own arguments. Raises InputError, where argparse would end the process."""

    def refuse(message: str) -> NoReturn:
        raise InputError(f"command: {' '.join(message.split())}")

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False))
    parser.error = refuse
    try:
        return parser.parse_args(flags)
    except (ValueError, OSError) as error:  # of a --config file
        refuse(str(error))


def _make(args: Any) -> AsyncLLM:
    return AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))


class InProcessServer:
    """Starts an engine in this process."""

    def __init__(self, flags: Sequence[str], paths: Mapping[str, str], env: Mapping[str, str]) -> None:
        """``flags``: those of ``vllm serve``. Raises InputError where vLLM does not take them."""
        self._args = {
            model: _parsed(["--model", path, "--served-model-name", model, *flags])
            for model, path in paths.items()
        }
        self._env = env
        self._engine: AsyncLLM | None = None
        self._backend: InProcessBackend | None = None
        self._guard: Guard | None = None
        self._guarded: set[int] = set()

    @property
    def backend(self) -> Backend:
        assert self._backend is not None, "the engine has not been started yet"
        return self._backend

    def when_gone(self, gone: Any) -> None:
        """An engine that dies is found by its health."""

    async def start(self, model: str) -> None:
        await self.stop(kill=True)
        os.environ.update(self._env)
        # Loading takes long, and the event loop has other engines to hear.
        loading = asyncio.ensure_future(asyncio.to_thread(_make, self._args[model]))
        while not loading.done():
            await asyncio.wait({loading}, timeout=GUARD_S)
            self._guard_children()
        try:
            engine = loading.result()
        except Exception as error:
            raise EngineError(f"{type(error).__name__}: {error}") from None
        self._engine = engine
        self._backend = InProcessBackend(engine, model)
        await self._backend.probe()

    def _guard_children(self) -> None:
        """A guard for all child processes; those of another engine are to end with us as well."""
        children = {child.pid for child in multiprocessing.active_children() if child.pid is not None}
        if children - self._guarded:
            before, self._guard = self._guard, watch_over(children)
            self._guarded = children
            if before is not None:
                dismiss(before)

    async def stop(self, *, kill: bool) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await self.backend.close()
            with contextlib.suppress(Exception):
                await asyncio.to_thread(engine.shutdown)
        guard, self._guard = self._guard, None
        self._guarded.clear()
        if guard is not None:
            dismiss(guard)
