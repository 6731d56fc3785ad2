"""The contract of the durable store, the same on SQLite and on a real Redis."""

import asyncio
import errno
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import closing, suppress
from pathlib import Path

import msgspec
import pytest
from redis.exceptions import RedisError

from live.store import open_store
from live.store.interface import (
    CANCELLING,
    COMPLETED,
    IN_PROGRESS,
    VALIDATING,
    BatchRecord,
    Counts,
    FileRecord,
    Line,
    Result,
    Store,
    StoreError,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store.db"
    url: str = request.getfixturevalue("redis_url")
    return url


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    store = await open_store(url)
    yield store
    await store.close()


def a_file(file_id: str = "file-1", tenant: str = "a", created_at: int = 100) -> FileRecord:
    return FileRecord(
        id=file_id, tenant=tenant, filename="in.jsonl", purpose="batch", bytes=0, created_at=created_at
    )


def a_batch(batch_id: str = "batch-1", tenant: str = "a", expires_at: int = 900) -> BatchRecord:
    return BatchRecord(
        id=batch_id,
        tenant=tenant,
        endpoint="/v1/completions",
        input_file_id="file-1",
        completion_window="24h",
        created_at=100,
        expires_at=expires_at,
    )


def some_lines(count: int) -> list[Line]:
    return [Line(number, f"c{number}", b'{"n": %d}' % number) for number in range(count)]


async def content_of(store: Store, file_id: str) -> bytes:
    return b"".join([chunk async for chunk in store.read_file(file_id)])


async def test_a_file_comes_back_as_it_went_in(store: Store) -> None:
    content = os.urandom(2_500_000)
    pieces = [content[start : start + 70_000] for start in range(0, len(content), 70_000)]
    record = await store.add_file(a_file(), pieces)
    assert record.bytes == len(content)
    assert await store.file("file-1") == record
    assert await content_of(store, "file-1") == content
    await store.add_file(a_file(), [b"other"])
    assert await content_of(store, "file-1") == b"other", "a file of the same id is replaced as a whole"


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_a_file_that_is_not_written_to_its_end_takes_no_room(store: Store, tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 2**21
        raise ConnectionError("the client went away")

    with pytest.raises(ConnectionError):
        await store.add_file(a_file(), broken())
    with sqlite3.connect(tmp_path / "store.db") as database:
        assert database.execute("SELECT count(*) FROM chunks").fetchone() == (0,)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_a_new_leader_clears_away_what_is_not_written_to_its_end(url: str, tmp_path: Path) -> None:
    """As a writer that was killed leaves it. One that still writes fails: no file lacks its beginning."""
    going_on = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b"x" * 2**21
        await going_on.wait()
        yield b"y"

    writer, leader = await open_store(url), await open_store(url)
    await writer.add_file(a_file("file-0"), [b"whole"])
    writing = asyncio.create_task(writer.add_file(a_file(), slowly()))
    with closing(sqlite3.connect(tmp_path / "store.db")) as database:
        async with asyncio.timeout(10):
            while database.execute("SELECT count(*) FROM chunks").fetchone() != (3,):
                await asyncio.sleep(0.01)
        assert await leader.lead("g1", "http://one", ttl_s=30)
        assert database.execute("SELECT file_id FROM chunks").fetchall() == [("file-0",)]
    going_on.set()
    with pytest.raises(StoreError, match="cleared away"):
        await writing
    assert await leader.file("file-1") is None
    assert await content_of(leader, "file-0") == b"whole"
    await writer.close()
    await leader.close()


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_a_leader_that_cannot_say_where_it_is_leaves_the_lead_to_others(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    first, second = await open_store(url), await open_store(url)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(StoreError, match="No space left"):
            await first.lead("g1", "http://one", ttl_s=30)
    assert await second.lead("g2", "http://two", ttl_s=30)
    await second.resign("g2")
    assert await first.lead("g1", "http://one", ttl_s=30)
    await first.close()
    await second.close()


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_a_store_that_is_closed_says_so(url: str) -> None:
    store = await open_store(url)
    await store.close()
    async with asyncio.timeout(10):
        with pytest.raises(StoreError, match="closed"):
            await store.file("file-1")


async def test_what_cannot_be_written_fails_alone(store: Store) -> None:
    unwritable = msgspec.structs.replace(a_file("file-2"), filename="\ud800.jsonl")
    async with asyncio.timeout(10.0):
        outcomes = await asyncio.gather(
            store.add_file(a_file("file-1"), [b"x"]),
            store.add_file(unwritable, [b"x"]),
            store.add_file(a_file("file-3"), [b"x"]),
            return_exceptions=True,
        )
        assert [isinstance(outcome, Exception) for outcome in outcomes] == [False, True, False]
        assert {file.id for file in await store.files("a")} == {"file-1", "file-3"}


@pytest.mark.parametrize("url", ["redis"], indirect=True)
async def test_two_gateways_that_write_the_same_file_do_not_mix(store: Store) -> None:
    """A leader that was only slow and its successor, each at the output of the same batch."""

    async def slowly(piece: bytes) -> AsyncIterator[bytes]:
        for _ in range(3):
            yield piece * 2**20
            await asyncio.sleep(0.01)

    await asyncio.gather(*(store.add_file(a_file(), slowly(piece)) for piece in (b"a", b"b")))
    content = await content_of(store, "file-1")
    assert content in (b"a" * 3 * 2**20, b"b" * 3 * 2**20)


async def test_a_tenant_sees_its_own_files_newest_first(store: Store) -> None:
    for number, tenant in enumerate("aba"):
        await store.add_file(a_file(f"file-{number}", tenant, created_at=100 + number), [b"x"])
    assert [file.id for file in await store.files("a")] == ["file-2", "file-0"]
    assert await store.delete_file("file-2")
    assert not await store.delete_file("file-2")
    assert [file.id for file in await store.files("a")] == ["file-0"]
    assert await content_of(store, "file-2") == b""


async def test_a_batch_moves_only_from_the_states_named(store: Store) -> None:
    await store.add_batch(a_batch())
    moved = await store.move_batch("batch-1", {VALIDATING}, status=IN_PROGRESS, in_progress_at=5)
    assert moved is not None
    assert moved.in_progress_at == 5
    assert await store.move_batch("batch-1", {VALIDATING}, status=IN_PROGRESS) is None
    assert await store.move_batch("absent", {VALIDATING}, status=IN_PROGRESS) is None
    found = await store.batch("batch-1")
    assert found == (moved, Counts())


async def test_two_gateways_cannot_both_move_a_batch(store: Store) -> None:
    await store.add_batch(a_batch())
    moves = await asyncio.gather(
        *(store.move_batch("batch-1", {VALIDATING}, status=CANCELLING) for _ in range(8))
    )
    assert sum(move is not None for move in moves) == 1


async def test_a_batch_moves_though_answers_come_all_the_time(store: Store) -> None:
    """A cancellation must not wait until its batch is done."""
    await store.add_batch(a_batch())
    await store.add_lines("batch-1", some_lines(2_000))
    lines = iter(await store.claim("batch-1", "g1", 2_000))

    async def answer() -> None:
        for line in lines:
            await store.finish("batch-1", Result(line.number, True, b"{}"))

    answers = [asyncio.create_task(answer()) for _ in range(8)]
    await asyncio.sleep(0.05)
    assert await store.move_batch("batch-1", {VALIDATING}, status=CANCELLING) is not None
    found = await store.batch("batch-1")
    await asyncio.gather(*answers)
    assert found is not None
    assert found[1].completed < 2_000


async def test_open_batches_come_earliest_expiry_first(store: Store) -> None:
    for batch_id, expires_at in (("late", 900), ("soon", 500), ("done", 400)):
        await store.add_batch(a_batch(batch_id, expires_at=expires_at))
    await store.move_batch("done", {VALIDATING}, status=COMPLETED)
    assert [batch.id for batch, _ in await store.open_batches()] == ["soon", "late"]
    assert {batch.id for batch, _ in await store.batches("a")} == {"late", "soon", "done"}
    assert await store.batches("b") == []


async def test_no_line_is_claimed_twice_and_none_is_left(store: Store) -> None:
    await store.add_batch(a_batch())
    lines = some_lines(2_500)
    await store.add_lines("batch-1", lines[:2_000])
    await store.add_lines("batch-1", lines[1_000:])  # a second try after a crash
    claims = await asyncio.gather(*(store.claim("batch-1", "g1", 300) for _ in range(12)))
    claimed = [line for claim in claims for line in claim]
    assert sorted(line.number for line in claimed) == list(range(2_500))
    assert sorted(claimed, key=lambda line: line.number) == lines
    found = await store.batch("batch-1")
    assert found is not None
    assert found[1] == Counts(total=2_500)


async def test_the_first_answer_of_a_line_stays(store: Store) -> None:
    await store.add_batch(a_batch())
    await store.add_lines("batch-1", some_lines(3))
    await store.claim("batch-1", "g1", 3)
    assert await store.finish("batch-1", Result(1, True, b"first"))
    assert not await store.finish("batch-1", Result(1, False, b"second"))
    assert not await store.finish("batch-1", Result(7, True, b"of no line"))
    assert await store.finish("batch-1", Result(0, False, b"broken"))
    assert [result async for result in store.results("batch-1")] == [
        Result(0, False, b"broken"),
        Result(1, True, b"first"),
    ]
    found = await store.batch("batch-1")
    assert found is not None
    assert found[1] == Counts(total=3, completed=1, failed=1)
    assert found[1].left == 1


async def test_a_new_leader_takes_over_what_the_old_one_had_claimed(store: Store) -> None:
    await store.add_batch(a_batch())
    await store.add_lines("batch-1", some_lines(10))
    taken = await store.claim("batch-1", "g1", 6)
    await store.finish("batch-1", Result(taken[0].number, True, b"done"))
    recovered = await store.recover("batch-1", "g2")
    assert recovered == taken[1:], "claimed and unanswered"
    assert await store.recover("batch-1", "g2") == recovered, "again, as the answer may have been lost"
    rest = await store.claim("batch-1", "g2", 10)
    assert [line.number for line in rest] == [6, 7, 8, 9]
    # The old leader was only slow: its answer is the first, and stays the only one.
    assert await store.finish("batch-1", Result(1, True, b"from g1"))
    assert not await store.finish("batch-1", Result(1, True, b"from g2"))


async def test_what_was_kept_of_a_line_comes_with_it(store: Store) -> None:
    await store.add_batch(a_batch())
    await store.add_lines("batch-1", some_lines(4))
    await store.claim("batch-1", "g1", 3)
    await store.keep("batch-1", {0: b"a little", 1: b"something", 7: b"of no line"})
    await store.keep("batch-1", {0: b"more"})
    assert await store.finish("batch-1", Result(1, True, b"answer"))
    await store.keep("batch-1", {1: b"too late"})
    recovered = await store.recover("batch-1", "g2")
    assert [(line.number, line.kept) for line in recovered] == [(0, b"more"), (2, b"")]
    assert await store.recover("batch-1", "g3") == recovered, "until it is answered"
    assert await store.claim("batch-1", "g3", 9) == some_lines(4)[3:]


async def test_counts_outlive_the_lines(store: Store) -> None:
    await store.add_batch(a_batch())
    await store.add_lines("batch-1", some_lines(2))
    await store.claim("batch-1", "g1", 2)
    await store.finish("batch-1", Result(0, True, b"x"))
    await store.drop_lines("batch-1")
    found = await store.batch("batch-1")
    assert found is not None
    assert found[1] == Counts(total=2, completed=1)
    assert [result async for result in store.results("batch-1")] == []
    assert not await store.finish("batch-1", Result(1, True, b"too late"))


async def test_there_is_one_leader_until_it_resigns(url: str) -> None:
    first, second = await open_store(url), await open_store(url)
    assert await first.lead("g1", "http://one", ttl_s=30)
    assert await first.lead("g1", "http://one", ttl_s=30), "a leader stays one"
    assert not await second.lead("g2", "http://two", ttl_s=30)
    assert await second.leader() == "http://one"
    await first.resign("g1")
    assert await second.lead("g2", "http://two", ttl_s=30)
    assert await first.leader() == "http://two"
    await first.close()
    await second.close()


async def test_what_was_answered_survives_kill_9(url: str) -> None:
    """A process claims, finishes, leads and is killed; another finds all of it, and leads in its place."""
    script = f"""
        import asyncio, sys
        from live.store import open_store
        from live.store.interface import BatchRecord, Line, Result
        async def main():
            store = await open_store({url!r})
            await store.add_batch(BatchRecord(id="b", tenant="a", endpoint="/v1/completions",
                input_file_id="f", completion_window="24h", created_at=1, expires_at=2))
            await store.add_lines("b", [Line(n, f"c{{n}}", b"{{}}") for n in range(1000)])
            await store.lead("g1", "http://one", ttl_s=0.3)
            lines = await store.claim("b", "g1", 500)
            for start in range(0, 500, 50):
                await asyncio.gather(*(store.finish("b", Result(l.number, True, b"ok"))
                                       for l in lines[start:start + 50]))
                print(start + 50, flush=True)
                await asyncio.sleep(0.01)
            await asyncio.sleep(60)
        asyncio.run(main())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = 0
    while said < 200:
        said = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    said = max([said, *map(int, process.stdout.read().split())])

    store = await open_store(url)
    found = await store.batch("b")
    assert found is not None
    assert found[1].completed >= said, "all that was said to be kept is there"
    for _ in range(100):
        if await store.lead("g2", "http://two", ttl_s=30):
            break
        await asyncio.sleep(0.05)
    assert await store.leader() == "http://two"
    numbers = {line.number for line in await store.recover("b", "g2")}
    numbers |= {line.number for line in await store.claim("b", "g2", 1000)}
    answered = {result.number async for result in store.results("b")}
    assert not numbers & answered
    assert numbers | answered == set(range(1000)), "no line is lost"
    await store.close()


@pytest.mark.parametrize("url", ["redis"], indirect=True)
async def test_a_store_that_went_away_says_so(store: Store) -> None:
    await store.add_file(a_file(), [b"x"])
    await store.add_batch(a_batch())
    with suppress(RedisError):
        await store._redis.shutdown(nosave=True)
    for call in (store.batch("batch-1"), store.claim("batch-1", "g1", 5), store.leader()):
        with pytest.raises(StoreError, match="store: "):
            await call
    with pytest.raises(StoreError, match="store: "):
        await content_of(store, "file-1")
    with pytest.raises(StoreError, match="store: "):
        _ = [result async for result in store.results("batch-1")]


async def test_a_store_that_cannot_be_used_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="store sqlite:///"):
        await open_store(f"sqlite:///{tmp_path}/file/store.db")
    with pytest.raises(StoreError, match=r"store redis://127\.0\.0\.1:1/0: "):
        await open_store("redis://127.0.0.1:1/0")
