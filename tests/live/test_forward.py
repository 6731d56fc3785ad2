"""A gateway that does not schedule: what passes through it is served as by the one that does."""

import json
import signal
import socket
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from live_gateway import (
    LONG,
    SHORT,
    GatewayProcess,
    answers_of,
    batch_file,
    engines,
    eventually,
    running_gateway,
    start_batch,
)

from live.gateway.forward import Forwarder
from live.store.interface import StoreError


@contextmanager
def two_gateways(folder: Path, toml: str) -> Iterator[tuple[GatewayProcess, GatewayProcess]]:
    """The one that schedules, and another one of the same store."""
    with running_gateway(folder, toml) as leader, running_gateway(folder, toml) as follower:
        assert leader.get("/health")["leader"]
        assert not follower.get("/health")["leader"]
        yield leader, follower


def ask(gateway: GatewayProcess) -> HTTPConnection:
    """The open connection of a client whose answer takes long."""
    url = urllib.parse.urlparse(gateway.url)
    assert url.hostname is not None
    client = HTTPConnection(url.hostname, url.port)
    client.request("POST", "/v1/completions", json.dumps(LONG), {"content-type": "application/json"})
    return client


def test_all_that_comes_is_passed_on_at_once_and_ends_with_its_client(tmp_path: Path) -> None:
    """Nothing queues up outside the scheduler; nothing is computed for clients that are gone."""
    with two_gateways(tmp_path, engines(slots=4, speed=1.0)) as (leader, follower):
        clients = [ask(follower) for _ in range(140)]
        eventually(lambda: leader.metric("qlm_tenant_queued", tenant="default") == 140, 15)
        for client in clients:
            client.close()
        eventually(lambda: leader.metric("qlm_tenant_queued", tenant="default") == 0, 15)


def test_every_gateway_tells_the_same_of_its_models(tmp_path: Path) -> None:
    """The context of Llama 2, which no key of the configuration tells."""
    with two_gateways(tmp_path, engines()) as gateways:
        for gateway in gateways:
            (model,) = gateway.get("/v1/models")["data"]
            assert model["max_model_len"] == 4096


def test_a_file_that_passes_through_may_be_as_large_as_a_file(tmp_path: Path) -> None:
    config = engines().replace("port = 0", "port = 0\nmax_body_mib = 0.01")
    with two_gateways(tmp_path, config) as (_, follower):
        large = {"model": SHORT["model"], "prompt": "x" * 20_000, "max_tokens": 1}
        assert follower.post("/v1/completions", large).status == 413
        batch = start_batch(follower, batch_file(100))
        assert len(answers_of(follower, batch)) == 100


def test_sigterm_lets_streams_that_pass_through_end(tmp_path: Path) -> None:
    with two_gateways(tmp_path, engines(slots=4, speed=4.0)) as (_, follower):
        stream = follower.post("/v1/completions", {**LONG, "max_tokens": 1000, "stream": True})
        rows = [stream.readline() for _ in range(3)]
        follower.process.send_signal(signal.SIGTERM)
        eventually(lambda: "draining" in follower.log.read_text())
        assert follower.post("/v1/completions", SHORT).status == 503
        rows += stream.readlines()
        assert [row for row in rows if row.strip()][-1] == b"data: [DONE]\n"
        assert follower.process.wait(20) == 0
        assert "Traceback" not in follower.log.read_text()


def with_gateway(port: int, advertise: str) -> str:
    """Two of one store, though they listen at different ports, need two configurations."""
    return engines().replace("port = 0", f'port = {port}\nadvertise = "{advertise}"')


def test_a_gateway_with_the_address_of_the_one_that_schedules_says_so_and_takes_over(tmp_path: Path) -> None:
    config = with_gateway(0, "http://both:8000") + "[store]\nlease_s = 0.3\n"
    with running_gateway(tmp_path, config) as leader, running_gateway(tmp_path, config) as other:
        said = [row for row in other.log.read_text().splitlines() if '"level":"error"' in row]
        assert len(said) == 1
        assert "has this one's address, http://both:8000: nothing can be passed on to it" in said[0]
        refused = other.post("/v1/completions", SHORT)
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        leader.kill()
        eventually(lambda: other.get("/health")["leader"])
        eventually(lambda: other.post("/v1/completions", SHORT).status == 200)
        assert "has this one's address" not in leader.log.read_text()


def test_what_would_go_round_in_a_circle_is_refused(tmp_path: Path) -> None:
    """Here the leader's address leads to the other gateway, as that of a load balancer would at times."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        running_gateway(tmp_path, with_gateway(0, f"http://127.0.0.1:{port}")),
        running_gateway(tmp_path, with_gateway(port, "http://other:8000")) as other,
    ):
        for _ in range(2):
            refused = other.post("/v1/completions", SHORT)
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")
            assert json.loads(refused.read())["error"]["code"] == "no_leader"
        assert other.log.read_text().count("must lead to it alone") == 1


async def answer_of(forwarder: Forwarder, body: bytes) -> tuple[int, str]:
    """Status and code of what it says to a request."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
    await forwarder(scope, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])["error"]["code"]


@pytest.mark.anyio
async def test_what_cannot_be_passed_on_is_refused() -> None:
    async def itself() -> str | None:
        return "http://me:8000"

    async def unknown() -> str | None:
        raise StoreError("store: it does not answer")

    async def another() -> str | None:
        return "http://another:8000"

    for leader in (itself, unknown):
        forwarder = Forwarder(leader, "http://me:8000", 100)
        assert await answer_of(forwarder, b"{}") == (503, "no_leader")
    forwarder = Forwarder(another, "http://me:8000", 100)
    assert await answer_of(forwarder, b"x" * 101) == (413, "request_too_large")
    await forwarder.close(0)
    assert await answer_of(forwarder, b"{}") == (503, "shutting_down")
