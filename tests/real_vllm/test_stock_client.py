"""The stock OpenAI client against ``qlm-live serve`` with two real vLLM engines.

One engine is killed, then the gateway. Interactive requests keep their targets all the same, and a batch file
comes back whole: each line once, with the text that an undisturbed engine says.
"""

import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs real vLLM: make test-vllm")

import httpx
import openai
from contract.scenarios import Run
from live_gateway import GatewayProcess, eventually, running_gateway
from real_vllm.engines_at_hand import ENV, SERVE, Engines, wake

from qlm_sim.core.actions import Evict, Pull
from qlm_sim.core.events import RequestArrived
from qlm_sim.event_log import replay_event_log

pytestmark = pytest.mark.vllm

TTFT_S = 2.0
LINES, LONG_LINES = 500, 12
LONG, SHORT = 800, 12
CONFIG = """
[gateway]
port = 0
[[slo]]
name = "interactive"
ttft_s = {ttft_s}
[[slo]]
name = "batch"
ttft_s = 86400.0
[[model]]
name = "a"
path = "{model}"
config = "{model}/config.json"
tokenizer = "{model}/tokenizer.json"
[[engine]]
id = "kept"
models = ["a"]
url = "{url}"
report_s = 0.5
[[engine]]
id = "doomed"
models = ["a"]
command = {command}
log = "{log}"
report_s = 0.5
backoff_s = 0.2
[engine.env]
{env}
"""


def body_of(number: int) -> dict[str, Any]:
    """A line's request. Long ones come first: they hold all places for seconds when somebody asks."""
    tokens = LONG if number < LONG_LINES else SHORT
    return {
        "model": "a",
        "prompt": f"def line_{number}(self):\n    return ",
        "max_tokens": tokens,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }


def batch_file() -> bytes:
    rows = []
    for number in range(LINES):
        body = body_of(number)
        body |= body.pop("extra_body")
        row = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}
        rows.append(json.dumps(row))
    return "\n".join(rows).encode()


class Interactive:
    """Somebody who asks again and again, one stream after the other."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.ttfts_s: list[float] = []
        self.texts: dict[int, set[str]] = {}
        """By number of the question."""
        self._over = threading.Event()

    @contextmanager
    def asking(self) -> Iterator[None]:
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(self._ask_on)
            try:
                yield
            finally:
                self._over.set()
            asking.result()

    def _ask_on(self) -> None:
        for number in count():
            if self._over.wait(0.1):
                return
            with suppress(openai.APIConnectionError, httpx.TransportError):  # while there is no gateway
                self._ask(1000 + number % 4, self.url)

    def _ask(self, question: int, url: str) -> None:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        start = time.monotonic()
        text, first = "", None
        for chunk in client.completions.create(**body_of(question), stream=True):
            first = first or time.monotonic() - start
            text += chunk.choices[0].text
        assert first is not None
        self.ttfts_s.append(first)
        self.texts.setdefault(question, set()).add(text)


def engine_of(gateway: GatewayProcess) -> int:
    """The process of the gateway's own engine."""
    pid = gateway.process.pid
    (child,) = (
        int(each)
        for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if "api_server" in Path(f"/proc/{each}/cmdline").read_text()
    )
    return child


def kept_lines(folder: Path) -> int:
    """Lines under way of which something is in the store."""
    with closing(sqlite3.connect(folder / "qlm-live.db")) as store:
        return int(store.execute("SELECT count(*) FROM kept").fetchone()[0])


def told(events: Path) -> Run:
    """What a gateway settled. A fresh core decides the same again."""
    run = Run()
    verdict = replay_event_log(str(events), run)
    assert verdict.difference is None
    return run


def undisturbed(url: str, number: int) -> str:
    """What the engine says when it is asked directly."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
    return client.completions.create(**body_of(number)).choices[0].text


def test_nothing_is_lost_or_late_when_gateway_and_engine_are_killed(engines: Engines, tmp_path: Path) -> None:
    kept_url = engines.run(wake(engines, "a"))
    config = CONFIG.format(
        ttft_s=TTFT_S,
        model=engines.paths["a"],
        url=kept_url,
        command=json.dumps(SERVE),
        log=tmp_path / "doomed.log",
        env="\n".join(f"{name} = {json.dumps(value)}" for name, value in ENV.items()),
    )
    logs = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    with ExitStack() as stack:
        gateway = stack.enter_context(running_gateway(tmp_path, config, "--record", str(logs[0])))
        eventually(lambda: gateway.metric("qlm_instance_up", instance="doomed") == 1, 120)
        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any")

        def answered() -> int:
            return client.batches.retrieve(batch.id).request_counts.completed

        file = client.files.create(file=("in.jsonl", batch_file()), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        eventually(lambda: gateway.metric("vllm:num_requests_running", model_name="a") == 8, 60)
        people = Interactive(gateway.url)
        with people.asking():
            eventually(lambda: len(people.ttfts_s) >= 2, 60)
            os.kill(engine_of(gateway), signal.SIGKILL)
            eventually(lambda: answered() >= 1 and kept_lines(tmp_path), 60)
            before = answered()
            gateway.kill()
            gateway = stack.enter_context(running_gateway(tmp_path, config, "--record", str(logs[1])))
            people.url = gateway.url
            client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any")
            assert answered() >= before, "what was answered stays so"
            eventually(lambda: client.batches.retrieve(batch.id).status == "completed", 120)
        done = client.batches.retrieve(batch.id)
        content = client.files.content(done.output_file_id).text
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(20) == 0

    rows = [json.loads(row) for row in content.splitlines()]
    assert [row["custom_id"] for row in rows] == [f"line-{n}" for n in range(LINES)], "each once, none lost"
    assert done.request_counts.failed == 0
    for number, row in enumerate(rows):
        usage = row["response"]["body"]["usage"]
        assert usage["completion_tokens"] == body_of(number)["max_tokens"]

    runs = [told(log) for log in logs]
    actions = [action for run in runs for _, _, actions in run.settles for action in actions]
    assert any(isinstance(action, Evict) for action in actions)
    resumed = {event.request.id for event in runs[1].events(RequestArrived) if event.output_tokens}
    assert resumed, "lines go on where the killed gateway had them"
    again = {action.request_id for action in actions if isinstance(action, Pull) and action.attempt > 1}
    moved = {int(each.rpartition("-")[2]) for each in resumed | again if each.startswith(batch.id)}
    with ThreadPoolExecutor(4) as pool:
        for number, text in zip(moved, pool.map(partial(undisturbed, kept_url), moved), strict=True):
            assert rows[number]["response"]["body"]["choices"][0]["text"] == text
    for question, said in people.texts.items():
        assert said == {undisturbed(kept_url, question)}

    assert len(people.ttfts_s) >= 20
    late = [ttft for ttft in people.ttfts_s if ttft > TTFT_S]
    assert len(late) <= 0.05 * len(people.ttfts_s), f"of {len(people.ttfts_s)} late: {late}"
