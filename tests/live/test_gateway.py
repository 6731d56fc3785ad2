"""The gateway under load and under signals: waits told, excess refused, shares kept, nothing lost."""

import asyncio
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, open_page
from live_gateway import MODEL, GatewayProcess, engines, eventually, running_engine, running_gateway

from live.fake.language import generate, tokenize, words
from live.gateway.tenants import RateLimit

TENANTS = """
[[tenant]]
name = "a"
api_key = "key-a"
[[tenant]]
name = "b"
api_key = "key-b"
"""

LONG = {"model": MODEL, "prompt": "Long", "max_tokens": 2000, "ignore_eos": True}
SHORT = {"model": MODEL, "prompt": "Short", "max_tokens": 2}


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
        large = gateway.post("/v1/completions", {"model": MODEL, "prompt": "x" * 40_000_000}, key_a)
        assert large.status == 413


def test_a_rate_is_averaged_over_ten_seconds() -> None:
    limit = RateLimit(2.0)
    assert [limit.take(0.0) for _ in range(20)] == [0.0] * 20
    assert limit.take(0.0) == 0.5
    assert limit.take(0.5) == 0.0
    assert limit.take(0.75) == pytest.approx(0.25)


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


def test_a_batch_survives_kill_9_of_the_gateway(tmp_path: Path) -> None:
    config = engines(slots=8, speed=4.0)
    with running_gateway(tmp_path, config) as gateway:
        batch_id = start_batch(gateway, batch_file(200))
        eventually(lambda: answered_lines(gateway, batch_id) >= 20)
        before = answered_lines(gateway, batch_id)
        gateway.kill()
    with running_gateway(tmp_path, config) as gateway:
        assert answered_lines(gateway, batch_id) >= before, "what was answered stays so"
        eventually(lambda: answered_lines(gateway, batch_id) >= before + 20)
        gateway.kill()
    with running_gateway(tmp_path, config) as gateway:
        rows = answers_of(gateway, batch_id)
    assert [row["custom_id"] for row in rows] == [f"line-{n}" for n in range(200)], "each once, none lost"
    assert {row["response"]["body"]["usage"]["completion_tokens"] for row in rows} == {40}


def test_lines_go_on_where_they_were_when_the_gateway_was_killed(tmp_path: Path) -> None:
    count, tokens = 8, 1000
    with running_engine("--speed", "3", "--max-num-seqs", "8") as engine:
        config = engines(slots=8).replace('kind = "fake"', f'url = "{engine.url}"')
        with running_gateway(tmp_path, config) as gateway:
            batch_id = start_batch(gateway, batch_file(count, tokens))
            eventually(lambda: engine.metric("vllm:generation_tokens_total") > count * 600, 60)
            gateway.kill()
        before = engine.metric("vllm:generation_tokens_total")
        with running_gateway(tmp_path, config) as gateway:
            rows = answers_of(gateway, batch_id)
        generated = engine.metric("vllm:generation_tokens_total")
        assert generated < count * tokens + 0.75 * before, "no line began anew"
        assert [row["custom_id"] for row in rows] == [f"line-{n}" for n in range(count)]
        for number, row in enumerate(rows):
            prompt = tokenize(f"Line {number}")
            answer = row["response"]["body"]
            assert answer["choices"][0]["text"] == "".join(words(generate(MODEL, prompt, tokens, 1e9, True)))
            assert answer["usage"]["prompt_tokens"] == len(prompt)
            assert answer["usage"]["completion_tokens"] == tokens


OWN_ENGINES = """
[gateway]
port = 0
[[model]]
name = "llama-2-7b"
""" + "".join(
    f"""
[[engine]]
id = "e{number}"
models = ["llama-2-7b"]
command = [{json.dumps(sys.executable)}, "-m", "live.cli", "fake-engine", "{{name}}", "--port", "{{port}}",
    "--speed", "4", "--max-num-seqs", "8"]
gpu = "A100-80"
max_num_seqs = 8
backoff_s = 0.1
"""
    for number in range(2)
)


def engines_of(gateway: GatewayProcess) -> list[int]:
    """Processes of the gateway's own engines."""
    pid = gateway.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(each) for each in children if "fake-engine" in Path(f"/proc/{each}/cmdline").read_text()]


def test_nothing_is_lost_when_an_engine_is_killed_and_then_all(tmp_path: Path) -> None:
    with running_gateway(tmp_path, OWN_ENGINES) as gateway:
        eventually(lambda: all(gateway.metric("qlm_instance_up", instance=f"e{n}") == 1 for n in (0, 1)), 120)
        batch_id = start_batch(gateway, batch_file(200))
        eventually(lambda: answered_lines(gateway, batch_id) >= 10)
        talking = {**SHORT, "max_tokens": 400, "ignore_eos": True, "temperature": 0}
        expected = json.loads(gateway.post("/v1/completions", talking).read())["choices"][0]["text"]
        with ThreadPoolExecutor() as pool:
            answers = [pool.submit(gateway.post, "/v1/completions", talking) for _ in range(4)]
            eventually(lambda: gateway.metric("qlm_tenant_queued", tenant="default") >= 4)
            os.kill(engines_of(gateway)[0], signal.SIGKILL)
            texts = [json.loads(each.result().read())["choices"][0]["text"] for each in answers]
        assert texts == [expected] * 4, "the other engine went on where the killed one was"
        before = answered_lines(gateway, batch_id)
        engines_left = engines_of(gateway)
        gateway.kill()
        for pid in engines_left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    with running_gateway(tmp_path, OWN_ENGINES) as gateway:
        assert answered_lines(gateway, batch_id) >= before
        rows = answers_of(gateway, batch_id)
    assert [row["custom_id"] for row in rows] == [f"line-{n}" for n in range(200)], "each once, none lost"


def test_sigterm_lets_running_work_end_and_keeps_what_waits(tmp_path: Path) -> None:
    config = engines(slots=4, speed=4.0)
    with running_gateway(tmp_path, config) as gateway:
        batch_id = start_batch(gateway, batch_file(100))
        eventually(lambda: answered_lines(gateway, batch_id) >= 1)
        with ThreadPoolExecutor() as pool:
            urgent = {**SHORT, "max_tokens": 300, "ignore_eos": True}
            answer = pool.submit(gateway.post, "/v1/completions", urgent, {"x-slo-ttft-ms": "100"})
            eventually(
                lambda: gateway.metric("vllm:time_to_first_token_seconds_count", model_name=MODEL) == 1
            )
            gateway.process.send_signal(signal.SIGTERM)
            eventually(lambda: "draining" in gateway.log.read_text())
            assert gateway.post("/v1/completions", SHORT).status == 503
            usage = json.loads(answer.result().read())["usage"]
        assert usage["completion_tokens"] == 300
        assert gateway.process.wait(20) == 0
        assert "Traceback" not in gateway.log.read_text()
    with running_gateway(tmp_path, config) as gateway:
        assert 1 <= answered_lines(gateway, batch_id) < 100
        assert len(answers_of(gateway, batch_id)) == 100


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("redis-server is not on PATH")
    path = tmp_path / "redis.sock"
    process = subprocess.Popen(
        [server, "--port", "0", "--unixsocket", str(path), "--dir", str(tmp_path)], stdout=subprocess.DEVNULL
    )
    try:
        eventually(path.exists)
        yield f"unix://{path}"
    finally:
        process.terminate()
        process.wait()


def test_another_gateway_of_the_same_redis_takes_over(tmp_path: Path, redis_url: str) -> None:
    config = engines(slots=8, speed=4.0) + f'[store]\nurl = "{redis_url}"\nlease_s = 1.0\n'
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    with running_gateway(folders[0], config) as leader, running_gateway(folders[1], config) as follower:
        assert leader.get("/health")["leader"]
        assert not follower.get("/health")["leader"]
        passed_on = json.loads(follower.post("/v1/completions", SHORT).read())
        assert passed_on["usage"]["completion_tokens"] == 2
        batch_id = start_batch(follower, batch_file(200))
        eventually(lambda: answered_lines(follower, batch_id) >= 20)
        leader.kill()
        eventually(lambda: follower.get("/health")["leader"])
        rows = answers_of(follower, batch_id)
    assert [row["custom_id"] for row in rows] == [f"line-{n}" for n in range(200)], "each once, none lost"


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


def test_what_all_tenants_share_can_be_locked(tmp_path: Path) -> None:
    config = engines().replace("port = 0", 'port = 0\nadmin_key = "admin"')
    with running_gateway(tmp_path, config) as gateway:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            gateway.get("/metrics")
        assert "qlm_leader 1.0" in gateway.get("/metrics", {"authorization": "Bearer admin"})
        assert "<title>QLM live</title>" in gateway.get("/dashboard?key=admin")


def test_the_dashboard_is_sent_the_state(tmp_path: Path) -> None:
    with (
        running_gateway(tmp_path, engines(slots=2, speed=0.5)) as gateway,
        in_background(gateway, [LONG] * 5),
    ):
        eventually(lambda: len(queued(gateway)) == 3)
        with urllib.request.urlopen(f"{gateway.url}/dashboard/events", timeout=20) as events:
            states = (json.loads(line.removeprefix(b"data: ")) for line in events if line.strip())
            # Until both of those that run have their first token.
            state = next(each for each in states if each["totals"]["waiting"] == 3)
    assert state["totals"]["running"] == 2
    (instance,) = state["instances"]
    assert instance["running"] == {"interactive": 2}
    assert sum(group["requests"] for group in instance["queue"]) == 3
    assert [each["name"] for each in state["classes"]] == ["interactive", "batch-1", "batch-2"]
    assert len(state["waits"]) == 2


@pytest.mark.anyio
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_page_shows_it_in_a_browser(tmp_path: Path) -> None:
    with (
        running_gateway(tmp_path, engines(slots=2, speed=0.5)) as gateway,
        in_background(gateway, [LONG] * 5),
    ):
        eventually(lambda: len(queued(gateway)) == 3)
        async with open_page(f"{gateway.url}/dashboard", tmp_path / "profile") as page, asyncio.timeout(20):
            while "3 queued in" not in (shown := await page.text()):
                await asyncio.sleep(0.2)
    for told in ("2 running", "policy qlm", "interactive", MODEL):
        assert told in shown
