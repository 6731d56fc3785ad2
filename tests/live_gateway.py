"""A gateway in a process of its own, in front of fake engines, for tests that talk to it over HTTP."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = "llama-2-7b"
LONG = {"model": MODEL, "prompt": "Long", "max_tokens": 2000, "ignore_eos": True}
SHORT = {"model": MODEL, "prompt": "Short", "max_tokens": 2}

ENGINES = """
[gateway]
port = 0

[[model]]
name = "llama-2-7b"

[[engine]]
id = "e0"
kind = "fake"
models = ["llama-2-7b"]
gpu = "A100-80"
max_num_seqs = {slots}
speed = {speed}
"""


def engines(*, slots: int = 16, speed: float = 20.0) -> str:
    """A configuration of one fake engine. ``speed``: how many times faster than an A100."""
    return ENGINES.format(slots=slots, speed=speed)


@dataclass
class GatewayProcess:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str, headers: dict[str, str] | None = None) -> Any:
        """The JSON, or the text, of a GET."""
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers or {})) as answer:
            text = answer.read().decode()
            return json.loads(text) if "json" in answer.headers["content-type"] else text

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Any:
        """The open answer of a POST; an error is an answer too. ``body``: data, or bytes as they are."""
        request = urllib.request.Request(
            self.url + path,
            body if isinstance(body, bytes) else json.dumps(body).encode(),
            {"content-type": "application/json", **(headers or {})},
        )
        try:
            return urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            return error

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series; 0 where it is not there."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for line in self.get("/metrics").splitlines():
            found = re.fullmatch(rf"{re.escape(name)}(?:\{{(.*)\}})? (\S+)", line)
            if found and wanted <= set((found[1] or "").split(",")):
                return float(found[2])
        return 0.0

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def running_gateway(folder: Path, toml: str, *flags: str) -> Iterator[GatewayProcess]:
    """``qlm-live serve``, when it serves and has an engine; killed at the end if it is still there."""
    config = folder / "live.toml"
    config.write_text(toml)
    log = folder / f"gateway-{time.monotonic_ns()}.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "live.cli", "serve", str(config), *flags],
            stderr=stderr,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
    try:
        yield GatewayProcess(_url(process, log), process, log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def running_engine(*flags: str) -> Iterator[GatewayProcess]:
    """``qlm-live fake-engine``, in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "live.cli", "fake-engine", MODEL, "--port", str(port), *flags],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    engine = GatewayProcess(f"http://127.0.0.1:{port}", process, Path(os.devnull))

    def answers() -> bool:
        with suppress(OSError):
            return bool(engine.get("/version"))
        return False

    try:
        eventually(answers, 60)
        yield engine
    finally:
        process.kill()
        process.wait()


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    def serving() -> str | None:
        said = log.read_text()
        assert process.poll() is None, said
        found = re.search(r"serving on (\S+)", said)
        leads = "this gateway schedules now" in said
        return found[1] if found and ("is up, serving" in said or not leads) else None

    try:
        return str(eventually(serving, 120))
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.read_text()}") from None


def eventually(check: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first true answer of ``check``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = check()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {check}")


@contextmanager
def in_background(gateway: GatewayProcess, bodies: list[dict[str, Any]], **headers: str) -> Iterator[None]:
    """Requests that are under way while the block runs; their answers are dropped."""
    answers: list[Any] = []

    def ask(body: dict[str, Any]) -> None:
        with suppress(OSError):  # the gateway may be stopped before it answers
            answers.append(gateway.post("/v1/completions", {**body, "stream": True}, headers))

    threads = [threading.Thread(target=ask, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    yield
    for answer in answers:
        answer.close()


def queued(gateway: GatewayProcess, **headers: str) -> list[dict[str, Any]]:
    waiting: list[dict[str, Any]] = gateway.get("/v1/queue", headers)["requests"]
    return waiting


def batch_file(count: int, max_tokens: int = 40) -> bytes:
    return b"\n".join(
        json.dumps(
            {
                "custom_id": f"line-{number}",
                "method": "POST",
                "url": "/v1/completions",
                "body": {**LONG, "prompt": f"Line {number}", "max_tokens": max_tokens},
            }
        ).encode()
        for number in range(count)
    )


def start_batch(gateway: GatewayProcess, content: bytes, **headers: str) -> str:
    boundary = "zwischen"
    form = (
        f'--{boundary}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
    ).encode() + content
    request = urllib.request.Request(
        f"{gateway.url}/v1/files",
        form + f"\r\n--{boundary}--\r\n".encode(),
        {"content-type": f"multipart/form-data; boundary={boundary}", **headers},
    )
    file_id = json.loads(urllib.request.urlopen(request).read())["id"]
    body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch_id: str = json.loads(gateway.post("/v1/batches", body, headers).read())["id"]
    return batch_id


def answers_of(gateway: GatewayProcess, batch_id: str, seconds: float = 120) -> list[dict[str, Any]]:
    """The output file of a batch, when it is completed."""

    def check() -> Any:
        batch = gateway.get(f"/v1/batches/{batch_id}")
        return batch if batch["status"] == "completed" else None

    batch = eventually(check, seconds)
    assert batch["request_counts"]["failed"] == 0
    content = gateway.get(f"/v1/files/{batch['output_file_id']}/content")
    return [json.loads(row) for row in content.splitlines()]


def answered_lines(gateway: GatewayProcess, batch_id: str) -> int:
    return int(gateway.get(f"/v1/batches/{batch_id}")["request_counts"]["completed"])
