"""A store that fails in between: every line of a batch is answered or told, once."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from live_batches import add_batch, batch_of, ended, leading, retry_quickly, until
from live_gateway import batch_file, engines

from live.gateway import batch_runner
from live.gateway.keeping import Keeper
from live.jobs import Resume
from live.store.interface import COMPLETED, EXPIRED, FAILED, Counts, Store, StoreError


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
    retry_quickly(monkeypatch)
    async with leading(tmp_path, engines()) as (_, _, store):
        failing(store, "finish", 9, monkeypatch)
        await add_batch(store, batch_file(6))
        await until(lambda: ended(store))
        assert (await batch_of(store))[1] == Counts(total=6, completed=6)


@pytest.mark.anyio
async def test_every_line_of_an_expired_batch_is_told_in_spite_of_trouble_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retry_quickly(monkeypatch)
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
    retry_quickly(monkeypatch)
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
async def test_half_of_a_file_that_is_deleted_meanwhile_is_no_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However its lines lie in the pieces that were read."""
    content = batch_file(2)
    half = content[: content.index(b"\n") + 1]
    async with leading(tmp_path, engines()) as (_, _, store):

        async def deleted(file_id: str) -> AsyncIterator[bytes]:
            yield half
            await store.delete_file(file_id)

        monkeypatch.setattr(store, "read_file", deleted)
        await add_batch(store, content)
        await until(lambda: ended(store))
        batch, counts = await batch_of(store)
        assert (batch.status, counts.completed) == (FAILED, 0)
        assert batch.errors is not None
        assert [each["code"] for each in batch.errors] == ["file_not_found"]


@pytest.mark.anyio
async def test_what_the_store_did_not_keep_of_a_line_is_kept_at_the_next_look() -> None:
    class Service:
        def checkpoint(self, request_id: str, least_tokens: int) -> Resume | None:
            return Resume((1,), tuple(range(70)), "text") if least_tokens <= 70 else None

    class FullOnce:
        kept: ClassVar[list[int]] = []

        async def keep(self, batch_id: str, lines: dict[int, bytes]) -> None:
            self.kept.extend(lines)
            if len(self.kept) == 1:
                raise StoreError("store: database or disk is full")

    store: Any = FullOnce()
    intake: Any = SimpleNamespace(service=Service())
    entry: Any = SimpleNamespace(id="r")
    keeper = Keeper(store, intake)
    keeper.watch("batch_1", 0, entry, None)
    with pytest.raises(StoreError):
        await keeper._keep(64, 0.25)
    for _ in range(2):
        await keeper._keep(64, 0.25)
    assert store.kept == [0, 0]


@pytest.mark.anyio
@pytest.mark.parametrize("times", [3, 10**9])
async def test_a_batch_whose_lines_cannot_be_kept_is_tried_again_until_it_expires(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retry_quickly(monkeypatch)
    async with leading(tmp_path, engines()) as (_, house, store):
        failing(store, "add_lines", times, monkeypatch)
        await add_batch(store, batch_file(6), window_s=5)
        house.runner.wake()
        await until(lambda: ended(store))
        batch, counts = await batch_of(store)
        assert (batch.status, counts) == (
            (COMPLETED, Counts(total=6, completed=6)) if times == 3 else (EXPIRED, Counts())
        )


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("call", "method", "path", "body"),
    [
        ("file", "GET", "/v1/files/file-1", None),
        ("batch", "GET", "/v1/batches/batch_1", None),
        ("open_batches", "GET", "/v1/queue", None),
        (
            "file",
            "POST",
            "/v1/batches",
            {"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"},
        ),
    ],
)
async def test_a_client_is_told_to_come_again_when_the_store_does_not_answer(
    call: str,
    method: str,
    path: str,
    body: dict[str, str] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with leading(tmp_path, engines()) as (gateway, _, store):
        failing(store, call, 100, monkeypatch)
        said: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": json.dumps(body).encode()}

        async def send(message: Any) -> None:
            said.append(message)

        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": []}
        await gateway.app(scope, receive, send)
    assert said[0]["status"] == 503
    assert (b"retry-after", b"5") in said[0]["headers"]
    assert json.loads(said[1]["body"])["error"]["code"] == "store_unavailable"
