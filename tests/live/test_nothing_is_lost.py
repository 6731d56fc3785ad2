"""Whatever is killed, gateway or engine: accepted work is answered once, and goes on where it was."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from live_gateway import (
    MODEL,
    SHORT,
    GatewayProcess,
    answered_lines,
    answers_of,
    batch_file,
    engines,
    eventually,
    queued,
    running_engine,
    running_gateway,
    start_batch,
)

from live.build import make_service
from live.config import load_config
from live.fake.language import generate, tokenize, words
from live.gateway import batch_runner
from live.gateway.app import Gateway, House
from live.gateway.ending import end_tasks
from live.gateway.keeping import resume_of
from live.store import open_store
from live.store.interface import (
    COMPLETED,
    EXPIRED,
    FAILED,
    OPEN_STATES,
    BatchRecord,
    Counts,
    FileRecord,
    Store,
    StoreError,
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def leading(folder: Path, toml: str) -> AsyncIterator[tuple[Gateway, House, Store]]:
    """A gateway in this process that schedules, closed at the end if it is not yet."""
    (folder / "live.toml").write_text(toml)
    config = load_config(folder / "live.toml")
    store = await open_store(config.store.url)
    gateway = Gateway(config, store, lambda: make_service(config))
    await gateway.start()
    assert gateway.house is not None
    try:
        yield gateway, gateway.house, store
    finally:
        if not gateway.draining:
            await gateway.close()


async def add_batch(store: Store, content: bytes, window_s: int = 86400) -> None:
    """The batch "batch_1" of that input file."""
    now = int(time.time())
    file = FileRecord(
        id="file-1", tenant="default", filename="in.jsonl", purpose="batch", bytes=0, created_at=now
    )
    await store.add_file(file, [content])
    await store.add_batch(
        BatchRecord(
            id="batch_1",
            tenant="default",
            endpoint="/v1/completions",
            input_file_id="file-1",
            completion_window="24h",
            created_at=now,
            expires_at=now + window_s,
        )
    )


async def batch_of(store: Store) -> tuple[BatchRecord, Counts]:
    found = await store.batch("batch_1")
    assert found is not None
    return found


async def until(check: Callable[[], Any]) -> None:
    """Until ``check`` gives, or awaits, something true."""
    async with asyncio.timeout(30):
        while True:
            found = check()
            if await found if asyncio.iscoroutine(found) else found:
                return
            await asyncio.sleep(0.02)


async def ended(store: Store) -> bool:
    return (await batch_of(store))[0].status not in OPEN_STATES


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


def check_refused(answer: Any) -> None:
    """503 in OpenAI's shape, with the time after which its clients try again."""
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    error = json.loads(answer.read())["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("service_unavailable_error", "shutting_down")


def test_sigterm_lets_running_work_end_and_keeps_what_waits(tmp_path: Path) -> None:
    with running_gateway(tmp_path, engines(slots=1, speed=4.0)) as gateway:
        batch_id = start_batch(gateway, batch_file(100))
        eventually(lambda: answered_lines(gateway, batch_id) >= 1)
        streamed = {**SHORT, "stream": True}
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
        with ThreadPoolExecutor() as pool:
            urgent = {**SHORT, "max_tokens": 300, "ignore_eos": True}
            answer = pool.submit(gateway.post, "/v1/completions", urgent, {"x-slo-ttft-ms": "100"})
            eventually(
                lambda: gateway.metric("vllm:time_to_first_token_seconds_count", model_name=MODEL) == 1
            )
            waiting = pool.submit(gateway.post, "/v1/completions", SHORT, {"x-slo-ttft-ms": "3600000"})
            eventually(lambda: queued(gateway))
            gateway.process.send_signal(signal.SIGTERM)
            eventually(lambda: "draining" in gateway.log.read_text())
            for path, asked in (
                ("completions", SHORT),
                ("chat/completions", chat),
                ("completions", streamed),
            ):
                check_refused(gateway.post(f"/v1/{path}", asked))
            check_refused(waiting.result())
            usage = json.loads(answer.result().read())["usage"]
        assert usage["completion_tokens"] == 300
        assert gateway.process.wait(20) == 0
        assert "Traceback" not in gateway.log.read_text()
    with running_gateway(tmp_path, engines()) as gateway:
        assert 1 <= answered_lines(gateway, batch_id) < 100
        assert len(answers_of(gateway, batch_id)) == 100


@pytest.mark.anyio
@pytest.mark.parametrize("trouble", ["the gateway drains", "the scheduler breaks"])
async def test_lines_are_not_answered_with_the_end_of_the_service(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the drain lasts, and though the service is asked again and again."""
    monkeypatch.setattr(batch_runner, "RETRY_S", 0.01)
    async with leading(tmp_path, engines(slots=1)) as (gateway, house, store):
        await add_batch(store, batch_file(4, 2000))
        await until(lambda: any(entry.pulled for entry in house.intake.entries.values()))
        if trouble == "the scheduler breaks":
            house.service._crashed(RuntimeError("broken"))
            await until(lambda: not house.intake.entries)
            house.runner.wake()
            await asyncio.sleep(0.3)
            assert house.runner.lines["running"] == 0, "nothing more is claimed"
        await gateway.close()
    async with leading(tmp_path, engines()) as (_, _, store):
        await until(lambda: ended(store))
        assert (await batch_of(store))[1] == Counts(total=4, completed=4)


@pytest.mark.anyio
async def test_a_drain_keeps_every_token_of_the_lines_under_way(tmp_path: Path) -> None:
    """Of these, too few to be kept before."""
    async with leading(tmp_path, engines(slots=2, speed=1.0)) as (gateway, house, store):
        await add_batch(store, batch_file(2, 2000))
        (instance,) = house.service.engines.instances.values()

        def heard() -> list[int]:
            return [attempt.output_tokens for attempt in instance.running.values()]

        await until(lambda: len(heard()) == 2 and min(heard()) >= 5)
        least = min(heard())
        await gateway.close()
    store = await open_store(load_config(tmp_path / "live.toml").store.url)
    kept = [resume_of(line.kept) for line in await store.recover("batch_1", "another")]
    await store.close()
    assert len(kept) == 2
    assert all(resume is not None and len(resume.token_ids) >= least - 1 for resume in kept)


@pytest.mark.anyio
async def test_a_task_ends_though_a_cancellation_was_swallowed() -> None:
    async def work() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await end_tasks([task])
    assert task.cancelled()


def failing(store: Store, call: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many of these calls fail, as on a full disk."""
    works = getattr(store, call)
    left = [times]

    async def fail(*given: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise StoreError("store: database or disk is full")
        return await works(*given)

    monkeypatch.setattr(store, call, fail)


@pytest.mark.anyio
async def test_an_answer_outlives_trouble_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "RETRY_S", 0.01)
    async with leading(tmp_path, engines()) as (_, _, store):
        failing(store, "finish", 9, monkeypatch)
        await add_batch(store, batch_file(6))
        await until(lambda: ended(store))
        assert (await batch_of(store))[1] == Counts(total=6, completed=6)


@pytest.mark.anyio
async def test_every_line_of_an_expired_batch_is_told_in_spite_of_trouble_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "RETRY_S", 0.01)
    async with leading(tmp_path, engines(slots=2, speed=1.0)) as (_, house, store):
        failing(store, "finish", 3, monkeypatch)
        await add_batch(store, batch_file(6, 2000), window_s=3)
        house.runner.wake()
        await until(lambda: ended(store))
        batch, counts = await batch_of(store)
        assert (batch.status, counts) == (EXPIRED, Counts(total=6, failed=6))
        assert batch.error_file_id is not None
        told = b"".join([piece async for piece in store.read_file(batch.error_file_id)])
        assert told.count(b"batch_expired") == 6


@pytest.mark.anyio
@pytest.mark.parametrize("window_s", [86400, 3])
async def test_lines_are_not_forgotten_when_the_answer_to_their_claim_is_lost(
    window_s: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has given them to this gateway, which does not hear of it."""
    monkeypatch.setattr(batch_runner, "RETRY_S", 0.01)
    in_time = window_s > 3
    async with leading(tmp_path, engines(slots=2, speed=20.0 if in_time else 1.0)) as (_, house, store):
        works, lost = store.claim, []

        async def lose(batch_id: str, owner: str, count: int) -> Any:
            claimed = await works(batch_id, owner, min(2, count))
            if claimed and len(lost) < 2:
                lost.extend(claimed)
                raise StoreError("store: Connection closed by server.")
            return claimed

        monkeypatch.setattr(store, "claim", lose)
        await add_batch(store, batch_file(6, 40 if in_time else 2000), window_s)
        house.runner.wake()
        await until(lambda: ended(store))
        assert lost
        batch, counts = await batch_of(store)
        assert (batch.status, counts) == (
            (COMPLETED, Counts(total=6, completed=6)) if in_time else (EXPIRED, Counts(total=6, failed=6))
        )


@pytest.mark.anyio
async def test_a_batch_that_cannot_be_checked_fails_with_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(body: dict[str, Any], endpoint: str) -> None:
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr(batch_runner, "check", check)
    async with leading(tmp_path, engines()) as (_, _, store):
        await add_batch(store, batch_file(3))
        await until(lambda: ended(store))
        batch, _ = await batch_of(store)
        assert batch.status == FAILED
        assert batch.errors == [
            {
                "code": "internal_error",
                "message": "The server failed at checking the input file.",
                "param": None,
                "line": None,
            }
        ]


@pytest.mark.anyio
@pytest.mark.parametrize("times", [3, 10**9])
async def test_a_batch_whose_lines_cannot_be_kept_is_tried_again_until_it_expires(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "RETRY_S", 0.01)
    async with leading(tmp_path, engines()) as (_, house, store):
        failing(store, "add_lines", times, monkeypatch)
        await add_batch(store, batch_file(6), window_s=5)
        house.runner.wake()
        await until(lambda: ended(store))
        batch, counts = await batch_of(store)
        assert (batch.status, counts) == (
            (COMPLETED, Counts(total=6, completed=6)) if times == 3 else (EXPIRED, Counts())
        )


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


@pytest.mark.anyio
async def test_a_leader_keeps_its_lease_until_it_has_drained(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another one would schedule on the same engines meanwhile."""
    lease_s = 0.3
    config = engines() + f'[store]\nurl = "{redis_url}"\nlease_s = {lease_s}\n'
    other = await open_store(redis_url)
    led_meanwhile = []
    async with leading(tmp_path, config) as (gateway, house, _):
        drain = house.service.drain

        async def drain_long(timeout_s: float) -> None:
            for _ in range(4):
                await asyncio.sleep(lease_s)
                led_meanwhile.append(await other.lead("other", "http://other", lease_s))
            await drain(timeout_s)

        monkeypatch.setattr(house.service, "drain", drain_long)
        await gateway.close()
    assert led_meanwhile == [False] * 4
    assert await other.lead("other", "http://other", lease_s), (
        "it is given back at the end, not left to run out"
    )
    await other.close()


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
