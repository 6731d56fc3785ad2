"""The gateway under load: waits told, excess refused, shares kept, decisions recorded."""

import asyncio
import errno
import json
import shutil
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from live_gateway import (
    LONG,
    MODEL,
    SHORT,
    answers_of,
    batch_file,
    engines,
    eventually,
    in_background,
    queued,
    running_gateway,
    start_batch,
)
from starlette.requests import Request as HttpRequest

from live.config import ModelConfig, load_config
from live.gateway.answers import AnswerHead
from live.gateway.bodies import ChatBody, StreamOptions, check, is_pinned
from live.gateway.completions import _Reply
from live.gateway.errors import ApiError
from live.gateway.files import Files
from live.gateway.intake import Entry, as_scheduled
from live.gateway.prompts import PromptCounter, prompt_characters
from live.gateway.server import Recording
from live.gateway.slo import Slo
from live.gateway.tenants import RateLimit, Tenant, Tenants
from live.jobs import CHAT, COMPLETIONS, Delta, Failed, Job
from live.ticket import Ticket
from qlm_sim.core.types import Request

TENANTS = """
[[tenant]]
name = "a"
api_key = "key-a"
[[tenant]]
name = "b"
api_key = "key-b"
"""


def test_a_client_is_told_where_it_stands_and_how_long_it_will_take(tmp_path: Path) -> None:
    with (
        running_gateway(tmp_path, engines(slots=2, speed=0.5)) as gateway,
        in_background(gateway, [LONG] * 8),
    ):
        begun = "vllm:time_to_first_token_seconds_count"
        eventually(lambda: gateway.metric(begun, model_name=MODEL) == 2 and len(queued(gateway)) == 6)
        waiting = queued(gateway)
        assert sorted(each["queue_position"] for each in waiting) == list(range(6))
        waits = [each["estimated_wait_seconds"] for each in waiting]
        assert all(wait > 0 for wait in waits)
        answer = gateway.post("/v1/completions", {**SHORT, "stream": True}, {"x-qlm-progress": "0.1"})
        assert int(answer.headers["x-qlm-queue-position"]) == 6
        assert int(answer.headers["x-qlm-estimated-wait-ms"]) > 0
        comments = [answer.readline().decode() for _ in range(4)]
        assert comments[0].startswith(": queued position=6 estimated_wait_ms=")
        assert comments[2].startswith(": queued position=")
        found = gateway.get(f"/v1/queue/{answer.headers['x-request-id']}")
        assert (found["status"], found["queue_position"]) == ("queued", 6)
        answer.close()
        eventually(lambda: len(queued(gateway)) == 6)  # a client that goes away leaves the queue


def test_an_evicted_request_waits_as_well(tmp_path: Path) -> None:
    """It has its first token; it is told all the same, and counted with what has no engine."""
    loose, urgent = {"x-slo-ttft-ms": "3600000"}, {"x-slo-ttft-ms": "300"}
    with running_gateway(tmp_path, engines(slots=1)) as gateway, ThreadPoolExecutor() as pool:
        assert gateway.metric("vllm:num_requests_waiting", model_name=MODEL) == 0
        assert "vllm:num_requests_waiting{" in gateway.get("/metrics")
        pool.submit(gateway.post, "/v1/completions", LONG, loose)
        begun = "vllm:time_to_first_token_seconds_count"
        eventually(lambda: gateway.metric(begun, model_name=MODEL) == 1)
        assert queued(gateway) == []
        pool.submit(gateway.post, "/v1/completions", LONG, urgent)
        (evicted,) = eventually(lambda: [each for each in queued(gateway) if each["status"] == "evicted"])
        assert gateway.metric("vllm:num_requests_waiting", model_name=MODEL) == 1
        assert gateway.get(f"/v1/queue/{evicted['id']}")["status"] == "evicted"
        gateway.kill()


def test_what_waits_inside_an_engine_waits_as_well(tmp_path: Path) -> None:
    """Under a policy that sends all that comes on at once."""
    config = engines(slots=1, speed=0.5) + '[scheduler]\npolicy = "vllm"\n'
    with running_gateway(tmp_path, config) as gateway, in_background(gateway, [LONG] * 4):
        begun = "vllm:time_to_first_token_seconds_count"
        eventually(lambda: gateway.metric(begun, model_name=MODEL) == 1 and len(queued(gateway)) == 3)
        assert gateway.metric("vllm:num_requests_waiting", model_name=MODEL) == 3


def test_estimates_are_scored_by_what_came(tmp_path: Path) -> None:
    """The metrics tell of the gateway's estimates what a client reckons from its own headers."""
    names = ("x-qlm-estimated-wait-ms", "x-qlm-estimated-wait-p90-ms", "x-qlm-wait-ms")
    body = {**SHORT, "max_tokens": 40, "ignore_eos": True}
    with running_gateway(tmp_path, engines(slots=2)) as gateway:
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: gateway.post("/v1/completions", body), range(48)))
        told = [[int(answer.headers[name]) for name in names] for answer in answers]
        assert gateway.metric("qlm_estimate_scored_total") == len(told)
        for column, quantile in enumerate(("0.5", "0.9")):
            within = sum(row[2] <= row[column] for row in told) / len(told)
            coverage = gateway.metric("qlm_estimate_coverage", requests="all", quantile=quantile)
            equal = sum(row[2] == row[column] for row in told) / len(told)  # to the millisecond
            assert within - equal <= coverage <= within
        error_s = sum(abs(row[2] - row[0]) for row in told) / len(told) / 1000
        shown_s = gateway.metric("qlm_estimate_error_seconds", requests="all", kind="mean_absolute")
        assert shown_s == pytest.approx(error_s, abs=0.001)
        assert gateway.metric("qlm_actual_wait_seconds_count", slo_class="interactive") == len(told)


def test_what_would_be_late_is_refused_with_the_time_to_come_again(tmp_path: Path) -> None:
    config = (
        engines(slots=1, speed=1.0)
        + """
[scheduler]
policy = "vllm"
[admission]
refuse_late = true
"""
    )
    many = {**LONG, "prompt": ["Long"] * 40}
    with running_gateway(tmp_path, config) as gateway, in_background(gateway, [many]):
        eventually(lambda: len(queued(gateway)) == 39)
        refused = gateway.post("/v1/completions", SHORT, {"x-slo-ttft-ms": "1000"})
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        error = json.loads(refused.read())["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "estimated_wait_too_long")
        assert gateway.metric("qlm_refused_total", tenant="default", reason="late") == 1
        patient = gateway.post("/v1/completions", {**SHORT, "stream": True}, {"x-slo-ttft-ms": "9000000"})
        assert patient.status == 200
        patient.close()


def test_queues_and_rates_have_limits(tmp_path: Path) -> None:
    tenants = TENANTS.replace('api_key = "key-a"', 'api_key = "key-a"\nmax_queued = 3').replace(
        'api_key = "key-b"', 'api_key = "key-b"\nrate_rps = 0.05'
    )
    with running_gateway(tmp_path, engines(slots=2, speed=0.5) + tenants) as gateway:
        key_a, key_b = ({"authorization": f"Bearer key-{name}"} for name in "ab")
        with in_background(gateway, [LONG] * 3, **key_a):
            eventually(lambda: gateway.metric("qlm_tenant_queued", tenant="a") == 3)
            refused = gateway.post("/v1/completions", SHORT, key_a)
            assert (refused.status, json.loads(refused.read())["error"]["code"]) == (429, "queue_full")
            answers = [gateway.post("/v1/completions", {**SHORT, "stream": True}, key_b) for _ in "12"]
            assert [answer.status for answer in answers] == [200, 429]
            assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
        for tenant, reason in (("a", "tenant_queue_full"), ("b", "tenant_rate_limit_exceeded")):
            assert gateway.metric("qlm_refused_total", tenant=tenant, reason=reason) == 1
        large = gateway.post("/v1/completions", {"model": MODEL, "prompt": "x" * 40_000_000}, key_a)
        assert large.status == 413


def test_what_is_no_good_batch_is_refused(tmp_path: Path) -> None:
    config = engines().replace("port = 0", "port = 0\nmax_body_mib = 0.25")
    batch = {"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"}
    deep = json.dumps({**batch, "output_expires_after": "DEEP"}).replace('"DEEP"', "[" * 5000 + "]" * 5000)
    with running_gateway(tmp_path, config) as gateway:
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(urllib.request.Request(f"{gateway.url}/v1/batches", deep.encode()))
        large = gateway.post("/v1/batches", {**batch, "metadata": {"a": "x" * 300_000}})
        assert (large.status, json.loads(large.read())["error"]["code"]) == (413, "request_too_large")


@pytest.mark.anyio
async def test_an_error_of_one_prompt_is_the_answer_though_another_begins_to_speak() -> None:
    """In the same instant, when the stream has not begun."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    class Quiet:
        def estimate(self, entry: Entry) -> None:
            return None

        def over(self, entry: Entry, outcome: str) -> None:
            pass

    intake: Any = Quiet()
    entries, tickets = [], []
    for number in range(2):
        job = Job(Request(f"r{number}", MODEL, "batch-1", 60.0, 0.0, 3, 10), COMPLETIONS, {"stream": True})
        entries.append(Entry(job, Tenant("a"), Slo("batch-1", 60.0, None, None, None), 0.0, False))
        tickets.append(Ticket(job))
        entries[-1].let_in(tickets[-1])
    reply = _Reply(AnswerHead("cmpl-1", COMPLETIONS, MODEL, None), intake, entries, receive, send)
    running = asyncio.create_task(reply.run(options=StreamOptions(), token_ids=False, progress_s=None))
    for _ in range(3):
        await asyncio.sleep(0)
    tickets[0].end(Failed(400, "it is too long"))
    tickets[1].put(Delta({"index": 0, "text": "x", "logprobs": None, "finish_reason": None}, (5,)))
    with pytest.raises(ApiError, match="too long"):
        await running
    reply.close()
    assert sent == []


@pytest.mark.anyio
async def test_an_upload_that_never_ends_is_refused_at_the_limit(tmp_path: Path) -> None:
    """It need not say how long it is."""
    (tmp_path / "live.toml").write_text(engines() + "[batch]\nmax_file_mib = 1\n")
    sent = [b'--x\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n']

    async def receive() -> Any:
        sent.append(b"x" * 2**16)
        assert len(sent) < 100, "the limit is beyond 20"
        return {"type": "http.request", "body": sent[-2], "more_body": True}

    headers = [(b"content-type", b"multipart/form-data; boundary=x"), (b"transfer-encoding", b"chunked")]
    request = HttpRequest(
        {"type": "http", "method": "POST", "path": "/v1/files", "headers": headers}, receive
    )
    store: Any = None
    with pytest.raises(ApiError) as refused:
        await Files(load_config(tmp_path / "live.toml"), store, Tenants(())).create(request)
    assert (refused.value.status, refused.value.code) == (413, "file_too_large")


@pytest.mark.anyio
async def test_a_client_that_goes_away_while_it_uploads_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "live.toml").write_text(engines())

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    request = HttpRequest(
        {"type": "http", "method": "POST", "path": "/v1/files", "headers": headers}, receive
    )
    store: Any = None
    with pytest.raises(ApiError, match="went away"):
        await Files(load_config(tmp_path / "live.toml"), store, Tenants(())).create(request)


def test_a_rate_is_averaged_over_ten_seconds() -> None:
    limit = RateLimit(2.0)
    assert [limit.take(0.0) for _ in range(20)] == [0.0] * 20
    assert limit.take(0.0) == 0.5
    assert limit.take(0.5) == 0.0
    assert limit.take(0.75) == pytest.approx(0.25)


def test_each_prompt_of_a_body_counts(tmp_path: Path) -> None:
    limit = RateLimit(2.0)
    assert limit.take(0.0, requests=15) == 0.0
    assert limit.take(0.0, requests=15) == 5.0
    assert limit.take(7.5, requests=50) == 0.0
    assert limit.take(7.5) == 15.5
    tenants = TENANTS.replace('api_key = "key-a"', 'api_key = "key-a"\nmax_queued = 3')
    with running_gateway(tmp_path, engines() + tenants) as gateway:
        for prompts, status in ((3, 200), (4, 429), (2049, 400)):
            body = {**SHORT, "prompt": ["a"] * prompts}
            assert gateway.post("/v1/completions", body, {"authorization": "Bearer key-a"}).status == status


def test_a_rate_goes_on_when_the_time_begins_anew() -> None:
    limit = RateLimit(2.0)
    assert [limit.take(5000.0) for _ in range(20)] == [0.0] * 20
    assert limit.take(1.0) == 0.5
    assert limit.take(1.5) == 0.0


@pytest.mark.parametrize(
    ("more", "pinned"),
    [
        ({}, False),
        ({"response_format": {"type": "text"}}, False),
        ({"response_format": {"type": "json_object"}}, True),
        ({"logprobs": 0}, True),
    ],
)
def test_a_completion_stays_where_its_form_or_its_probabilities_are_known(
    more: dict[str, Any], pinned: bool
) -> None:
    body = {**SHORT, **more}
    assert is_pinned(body, check(body, COMPLETIONS)) == pinned


def test_of_a_message_only_its_texts_are_counted() -> None:
    def tokens_and_characters(content: object) -> tuple[int, int]:
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
        fields = check(body, CHAT)
        assert isinstance(fields, ChatBody)
        characters = prompt_characters(fields, None)
        assert is_pinned(body, fields) == (characters == 0), "an image would be lost on the way"
        return PromptCounter(ModelConfig(MODEL)).of_chat(fields), characters

    text = {"type": "text", "text": "What is this?"}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 40_000}}
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    tokens, characters = tokens_and_characters("What is this?")
    assert (tokens, characters) == tokens_and_characters([text])
    for other in (image, nested):
        assert tokens_and_characters([text, other]) == (tokens, 0), "nothing is learnt of its length"


def test_a_flood_of_one_tenant_does_not_move_the_waits_of_another(tmp_path: Path) -> None:
    """Of the hundreds that a has queued before them, few are served before b's requests."""
    flood, slots, window = 200, 4, 4
    config = engines(slots=slots, speed=2.0) + TENANTS + f"[fairness]\nwindow = {window}\n"
    body = {"model": MODEL, "prompt": ["Flood"] * flood, "max_tokens": 60, "ignore_eos": True}
    with (
        running_gateway(tmp_path, config) as gateway,
        in_background(gateway, [body], authorization="Bearer key-a"),
    ):
        eventually(lambda: gateway.metric("qlm_tenant_queued", tenant="a") == flood)
        served_before = []
        for _ in range(5):
            before = gateway.metric("qlm_tenant_queued", tenant="a")
            gateway.post("/v1/completions", SHORT, {"authorization": "Bearer key-b"}).read()
            served_before.append(before - gateway.metric("qlm_tenant_queued", tenant="a"))
        assert gateway.metric("qlm_tenant_queued", tenant="a") > flood / 3, "the flood must last"
    # Those that run and a window of those that wait, and what ends while the figures are read.
    assert max(served_before) <= 2 * (slots + window)


def test_a_flood_is_no_more_urgent_than_a_wider_class_of_another(tmp_path: Path) -> None:
    """What missed its target while it was held does not go before what can still meet one."""
    held = Request("r", MODEL, "interactive", 0.2, arrived_at=1.0, prompt_tokens=1, max_tokens=1)
    assert (as_scheduled(held, 1.1).arrived_at, as_scheduled(held, 1.1).slo_s) == (1.1, 0.2)
    assert [as_scheduled(held, now).slo_s for now in (1.3, 2.5)] == [0.4, 1.6]
    config = engines(slots=4, speed=2.0) + TENANTS
    body = {"model": MODEL, "prompt": ["Flood"] * 300, "max_tokens": 60, "ignore_eos": True}
    flood = {"authorization": "Bearer key-a", "x-slo-ttft-ms": "200"}
    wider = {"authorization": "Bearer key-b", "x-slo-ttft-ms": "8000", "x-qlm-slo-class": "batch-1"}
    with running_gateway(tmp_path, config) as gateway, in_background(gateway, [body], **flood):
        eventually(lambda: gateway.metric("qlm_held_requests", tenant="a") > 100)
        # Until they are let in with targets of 12.8 s.
        eventually(lambda: max(each["waited_seconds"] for each in queued(gateway, **flood)) > 6.5)
        waits = [
            int(gateway.post("/v1/completions", SHORT, wider).headers["x-qlm-wait-ms"]) for _ in range(3)
        ]
        assert gateway.metric("qlm_held_requests", tenant="a") > 0
    assert max(waits) < 2000


def test_a_run_is_recorded_and_every_decision_comes_out_the_same(tmp_path: Path) -> None:
    """Of batch lines, and of interactive requests for which they are evicted."""
    events = tmp_path / "events.jsonl"
    events.write_text("of an earlier life")
    with running_gateway(tmp_path, engines(slots=4, speed=4.0), "--record", str(events)) as gateway:
        batch_id = start_batch(gateway, batch_file(30, 200))
        eventually(lambda: gateway.metric("vllm:num_requests_running", model_name=MODEL) == 4)
        for _ in range(10):
            answer = gateway.post("/v1/completions", SHORT, {"x-slo-ttft-ms": "300"})
            assert json.loads(answer.read())["usage"]["completion_tokens"] == 2
        answers_of(gateway, batch_id)
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(60) == 0
    out = tmp_path / "replayed"
    replay = [sys.executable, "-c", "import sys; from qlm_sim.cli import main; sys.exit(main())", "replay"]
    said = subprocess.run(
        [*replay, str(events), "--json", "--out", str(out)], capture_output=True, check=True
    )
    told = json.loads(said.stdout)
    assert told["decisions"]["difference"] is None
    (figures,) = told["policies"].values()
    assert figures["requests"] == 40
    assert figures["evictions"] >= 1
    assert (tmp_path / "events.jsonl.before").read_text() == "of an earlier life"


def test_a_full_disk_ends_the_record_and_not_the_service(caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        calls = 0

        def record(self, *given: object) -> None:
            self.calls += 1
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = close = record

    full: Any = Full()
    recording = Recording(full)
    recording.record(0.0, [], [])
    recording.record(1.0, [], [])
    recording.flush()
    recording.close()
    assert full.calls == 1
    assert [each.message for each in caplog.records] == [
        "the event log cannot be written and ends here: [Errno 28] No space left on device"
    ]


def test_tls_by_config(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not on PATH")
    command = "req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 1 -subj /CN=127.0.0.1"
    arguments = [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([openssl, *arguments], cwd=tmp_path, check=True, capture_output=True)
    config = engines().replace("port = 0", 'port = 0\ntls_cert = "cert.pem"\ntls_key = "key.pem"')
    with running_gateway(tmp_path, config) as gateway:
        assert gateway.url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        with urllib.request.urlopen(f"{gateway.url}/health", context=trusted) as answer:
            assert answer.status == 200
