"""Measures a running OpenAI-compatible server (vLLM): a short sweep of prompts and batches.

Over HTTP, or through whatever else answers. Gives a request log like any other. Knows nothing of profiles or
fits. Blocks while it measures.
"""

import http.client
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import numpy as np

from qlm_sim.errors import InputError
from qlm_sim.validation.request_log import RequestLog

T = TypeVar("T")

TIMEOUT_S = 300.0
FRESH_TOKENS = 8
"""First tokens of a prompt that no seed gives: another sweep's prompts are not found in a prefix cache."""
WARM_UP_TOKENS = 2
"""Output tokens of what only warms up."""
CROWDED = (1, 1)
"""Prompt and output tokens of a request of a crowd. An iteration of such is as long as one of decoding."""
CROWDS = (64, 128, 256, 512)
"""Requests of a crowd."""
LEAST_TOKENS = 8
"""Fewer tokens tell no time per token: a busy server sends some of them together."""


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What is measured. Every kind of request is measured ``repeats`` times, after one short request of each
    that only warms up."""

    prompts: tuple[int, ...] = (16, 64, 128, 256, 512, 1024, 2048, 3072)
    """Prompt tokens of requests that are alone: what a prefill takes."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Requests that come together: what a decode iteration takes."""
    contexts: tuple[int, ...] = (32, 768)
    """Prompt tokens of those, short and long: what reading the KV cache takes."""
    output_tokens: int = 48
    mixed: int = 0
    """Requests that come together with all lengths between the shortest and the longest of those: prefills
    among decodes, and what each request costs the server beside its tokens."""
    crowds: tuple[int, ...] = ()
    """Requests of a single token that come together, and are answered with one: hardly more than what each
    request costs the engine beside its tokens."""
    repeats: int = 3
    most_s: float = math.inf
    """Once it has taken so long, no further repeat is begun. One is made, whatever it takes."""

    def kinds(self, max_model_len: int | None) -> list[list[tuple[int, int]]]:
        """(prompt tokens, output tokens) of the requests that come together, of each kind that fits."""
        room = (max_model_len or 4096) - self.output_tokens - 1
        kinds = [[(prompt, 2)] for prompt in self.prompts if prompt <= room]
        contexts = [prompt for prompt in self.contexts if prompt <= room]
        kinds += [[(prompt, self.output_tokens)] * batch for prompt in contexts for batch in self.batches]
        if self.mixed and contexts:
            prompts = np.linspace(contexts[0], contexts[-1], self.mixed).astype(int)
            outputs = np.linspace(2, self.output_tokens, self.mixed).astype(int)
            apart = np.random.default_rng(0).permutation(self.mixed)
            kinds.append(list(zip(prompts.tolist(), outputs[apart].tolist(), strict=True)))
        return kinds + [[CROWDED] * crowd for crowd in self.crowds]


def plan_for(max_num_seqs: int, max_model_len: int, most_s: float, *, shared: bool) -> SweepPlan:
    """What tells most of an engine with these limits: what fits it at once, and several times as much.

    ``shared``: whether its server runs on its own cores, so that requests as such hold it up.
    """
    whole = SweepPlan()
    batches = {batch for batch in whole.batches if batch < max_num_seqs} | {max_num_seqs, 2 * max_num_seqs}
    return replace(
        whole,
        prompts=tuple(prompt for prompt in whole.prompts if prompt <= max_model_len // 2),
        batches=tuple(sorted(batch for batch in batches if batch <= whole.batches[-1])),
        contexts=tuple(min(prompt, max_model_len // 4) for prompt in whole.contexts),
        mixed=min(4 * max_num_seqs, whole.batches[-1]),
        crowds=CROWDS if shared else (),
        most_s=most_s,
    )


class InStep:
    """Lets sweeps of several servers measure the same kind at the same time, until time is up."""

    def __init__(self, sweeps: int, most_s: float) -> None:
        self._barrier = threading.Barrier(sweeps, self._look)
        self._until = time.monotonic() + most_s
        self._over = False

    def _look(self) -> None:
        self._over = time.monotonic() > self._until

    def time_left(self) -> bool:
        """Waits for the others. Raises threading.BrokenBarrierError once one has given up."""
        self._barrier.wait()
        return not self._over

    def give_up(self) -> None:
        self._barrier.abort()


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself; None where it does not."""

    served_model: str
    max_model_len: int | None
    version: str | None
    num_gpu_blocks: int | None
    block_size: int | None


class Answers(Protocol):
    """What a sweep asks. Called from several threads at once."""

    def complete(self, model: str, prompt: list[int], output_tokens: int) -> tuple[float, float, float, int]:
        """(when it was sent, seconds to the first and to the last token, tokens generated)."""
        ...


class Server:
    """One server. Every call raises InputError in one line where the server does not answer as it should."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"--url: found {url!r}, expected one such as http://127.0.0.1:8000")
        self._url, self._host, self._port = url, parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection

    def facts(self, served_model: str | None) -> ServerFacts:
        """From /v1/models, /version and /metrics; the first model is taken where none is named."""
        said = self._get("/v1/models")
        models = self._json("/v1/models", said, lambda found: {each["id"]: each for each in found["data"]})
        wanted = served_model or next(iter(models), "")
        if wanted not in models:
            raise InputError(f"{self._url}: serves {', '.join(models) or 'no model'}, not {wanted or 'one'}")
        entry = models[wanted]
        version = self._optional("/version")
        metrics = self._optional("/metrics") or ""

        def label(name: str) -> int | None:
            found = re.search(rf'vllm:cache_config_info\{{[^}}]*\b{name}="(\d+)"', metrics)
            return int(found[1]) if found else None

        return ServerFacts(
            served_model=entry["id"],
            max_model_len=entry.get("max_model_len"),
            version=self._json("/version", version, lambda found: str(found["version"])) if version else None,
            num_gpu_blocks=label("num_gpu_blocks"),
            block_size=label("block_size"),
        )

    def _json(self, path: str, answer: str, read: Callable[[Any], T]) -> T:
        """What ``read`` takes from the answer."""
        try:
            return read(json.loads(answer))
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{self._url}: {path} answers {_excerpt(answer.encode())}; is a vLLM server running there?"
            ) from None

    def complete(self, model: str, prompt: list[int], output_tokens: int) -> tuple[float, float, float, int]:
        """(when it was sent, seconds to the first and to the last token, tokens generated), streaming."""
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        connection = self._connect(self._host, self._port, timeout=TIMEOUT_S)
        try:
            connection.connect()
            if connection.sock is not None:
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sent = time.perf_counter()
            connection.request(
                "POST", f"{self._path}/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            if response.status != 200:
                raise InputError(f"{self._url}: {response.status} {_excerpt(response.read())}")
            first = last = math.nan
            tokens = 0
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter() - sent
                chunk = json.loads(line[6:])
                if chunk.get("error"):
                    raise InputError(f"{self._url}: {_excerpt(line)}")
                if chunk.get("choices"):
                    first = now if math.isnan(first) else first
                    last = now
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise InputError(f"{self._url}: {error}; is a vLLM server running there?") from None
        finally:
            connection.close()
        if math.isnan(first):
            raise InputError(f"{self._url}: the answer to {len(prompt)} tokens holds no token")
        return sent, first, last, tokens or output_tokens

    def _get(self, path: str) -> str:
        connection = self._connect(self._host, self._port, timeout=30)
        try:
            connection.request("GET", self._path + path)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"{self._url}: {error}; is a vLLM server running there?") from None
        finally:
            connection.close()
        if response.status != 200:
            raise InputError(f"{self._url}{path}: {response.status} {_excerpt(body)}")
        return body.decode("utf-8", "replace")

    def _optional(self, path: str) -> str | None:
        try:
            return self._get(path)
        except InputError:
            return None


def sweep(
    server: Answers,
    facts: ServerFacts,
    *,
    vocabulary: int,
    seed: int,
    plan: SweepPlan = SweepPlan(),
    in_step: InStep | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RequestLog:
    """Measure: each prompt length alone, then batches that come together, as far as the server takes them.

    All kinds in turn, again and again, so that a machine whose speed drifts is met at all its speeds. Prompts
    are random tokens, and their first ones are never the same, so that no prefix cache helps. ``in_step``:
    shared with the sweeps of other servers, which have the same kinds. ``progress`` is told (done, in all).
    """
    rng, fresh = np.random.default_rng(seed), np.random.default_rng()
    lowest = min(100, vocabulary // 2)

    def prompt_of(tokens: int) -> list[int]:
        start = min(tokens, FRESH_TOKENS)
        parts = (fresh, start), (rng, tokens - start)
        return [token for each, size in parts for token in each.integers(lowest, vocabulary, size).tolist()]

    kinds = plan.kinds(facts.max_model_len)
    if not kinds:
        raise InputError(f"the server takes {facts.max_model_len} tokens a request, too few to measure with")
    in_step = in_step or InStep(1, plan.most_s)
    rows: list[tuple[float, float, float, float, int, int]] = []
    try:
        for repeat in range(plan.repeats + 1):
            if not in_step.time_left() and repeat > 1:
                break
            for number, kind in enumerate(kinds):
                if repeat == 0:
                    kind = [(kind[0][0], WARM_UP_TOKENS)]
                asked = [(prompt_of(prompt), output) for prompt, output in kind]
                in_step.time_left()
                answers = _together(server, facts.served_model, asked)
                if repeat:
                    rows += _rows(kind, answers)
                progress(repeat * len(kinds) + number + 1, (plan.repeats + 1) * len(kinds))
    except BaseException:
        in_step.give_up()
        raise
    rows.sort()
    sent, first, last, ended, tokens, lengths = (np.array(column) for column in zip(*rows, strict=True))
    tpot = np.full(len(rows), np.nan)
    np.divide(last - first, tokens - 1, out=tpot, where=tokens >= LEAST_TOKENS)
    return RequestLog(
        path="the measured server",
        arrival_s=sent - sent[0],
        prompt_tokens=lengths,
        output_tokens=tokens,
        measured={"ttft_s": first, "tpot_s": tpot, "e2e_s": ended},
    )


def _rows(
    kind: list[tuple[int, int]], answers: list[tuple[float, float, float, int]]
) -> list[tuple[float, float, float, float, int, int]]:
    """(sent, seconds to the first token, to the last, to the end, tokens generated, prompt tokens).

    Which of those sent together the engine takes first is chance: only their ends can be compared, of a
    crowd only that of the last.
    """
    alone, crowd = len(kind) == 1, kind[0] == CROWDED
    ends = max(sent + last for sent, _, last, _ in answers)
    rows = []
    for (prompt, _), (sent, first, last, tokens) in zip(kind, answers, strict=True):
        token_s = (first, last) if alone else (math.nan, math.nan)
        end_s = math.nan if crowd and sent + last < ends else last
        rows.append((sent, *token_s, end_s, tokens, prompt))
    return rows


def _together(
    server: Answers, model: str, asked: list[tuple[list[int], int]]
) -> list[tuple[float, float, float, int]]:
    """Send all at once, each a prompt and how many tokens are wanted, and wait for every answer."""
    answers: dict[int, tuple[float, float, float, int]] = {}
    errors: list[Exception] = []
    start = threading.Barrier(len(asked))

    def ask(number: int) -> None:
        start.wait()
        try:
            answers[number] = server.complete(model, *asked[number])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [answers[number] for number in range(len(asked))]


def _excerpt(body: bytes) -> str:
    return " ".join(body.decode("utf-8", "replace").split())[:200]


def log_rows(log: RequestLog) -> Mapping[str, Any]:
    """The log's columns under the names that ``read_request_log`` knows."""
    columns = {"arrival_s": log.arrival_s, "prompt_tokens": log.prompt_tokens}
    return columns | {"output_tokens": log.output_tokens} | dict(log.measured)
