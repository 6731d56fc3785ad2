"""A gateway that is asked to end: what runs may end, what waits is given back, and no batch loses a line."""

import asyncio
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from live_batches import add_batch, batch_of, ended, leading, retry_quickly, until
from live_gateway import (
    MODEL,
    SHORT,
    answered_lines,
    answers_of,
    batch_file,
    engines,
    eventually,
    queued,
    running_gateway,
    start_batch,
)

from live.config import load_config
from live.gateway.ending import end_tasks
from live.gateway.keeping import resume_of
from live.store import open_store
from live.store.interface import Counts


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
    retry_quickly(monkeypatch)
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
