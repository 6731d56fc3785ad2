"""The shared store: Redis, for several gateways in front of one cluster.

Lines of a batch are a stream, read by one consumer group whose consumers are the owners: Redis keeps what
each has claimed until it is answered, so a new leader can take it over. An answer, its count and the end of
its line are one script, so they happen together or not at all. The leader's lease is a key that expires.

Redis must write its own log (``appendonly yes``) for answers to outlive Redis itself.
"""

import uuid
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import msgspec
import redis.asyncio as aioredis
from redis.exceptions import RedisError, ResponseError

from live.store import without_password
from live.store.chunks import regular
from live.store.interface import (
    OPEN_STATES,
    BatchRecord,
    Counts,
    FileRecord,
    Line,
    Result,
    StoreError,
)

PREFIX = "qlm:"
GROUP = "engines"
PAGE = 1000
PART_S = 3600
"""After which a file's content goes that nobody writes on, as its writer died."""

P = ParamSpec("P")
T = TypeVar("T")

_encode = msgspec.json.Encoder().encode
_file_record = msgspec.json.Decoder(FileRecord).decode
_batch_record = msgspec.json.Decoder(BatchRecord).decode

ADD_LINES = """
for i = 1, #ARGV, 3 do
    local id = string.format('%d-0', tonumber(ARGV[i]) + 1)
    local added = redis.pcall('XADD', KEYS[1], id, 'c', ARGV[i + 1], 'b', ARGV[i + 2])
    if type(added) == 'string' then redis.call('HINCRBY', KEYS[2], 'total', 1) end
end
"""
"""XADD refuses an id that is not above the last: a line that is there already."""

KEEP = """
for i = 1, #ARGV, 2 do
    local id = string.format('%d-0', tonumber(ARGV[i]) + 1)
    if #redis.call('XRANGE', KEYS[1], id, id) > 0 then
        redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
    end
end
"""

FINISH = """
if redis.call('EXISTS', KEYS[3]) == 0 then return 0 end
local id = string.format('%d-0', tonumber(ARGV[1]) + 1)
if #redis.call('XRANGE', KEYS[1], id, id) == 0 then return 0 end
if redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[3]) == 0 then return 0 end
redis.call('HINCRBY', KEYS[3], ARGV[2], 1)
redis.call('XACK', KEYS[1], ARGV[4], id)
redis.call('XDEL', KEYS[1], id)
redis.call('HDEL', KEYS[4], ARGV[1])
return 1
"""

MOVE = """
if redis.call('HGET', KEYS[1], 'record') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'record', ARGV[2])
if ARGV[3] == '0' then redis.call('ZREM', KEYS[2], ARGV[4]) end
return 1
"""
"""Changes a batch's record that nobody else has changed, and takes it from the open ones unless it stays one.
Watching its key would not do: every answer counts there. ARGV: the record before, the one after, 1 or 0 for
whether it stays open, the batch's id."""

LEAD = """
local holder = redis.call('HGET', KEYS[1], 'owner')
if holder and holder ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'url', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""

RESIGN = """
if redis.call('HGET', KEYS[1], 'owner') == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


def _told(call: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Tells Redis's own errors as StoreError."""

    @wraps(call)
    async def told(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await call(*args, **kwargs)
        except RedisError as error:
            raise StoreError(f"store: {error}") from error

    return told


class RedisStore:
    """See ``live.store.interface.Store``."""

    def __init__(self, client: Any) -> None:
        self._redis = client
        self._add_lines = client.register_script(ADD_LINES)
        self._keep = client.register_script(KEEP)
        self._finish = client.register_script(FINISH)
        self._move = client.register_script(MOVE)
        self._lead = client.register_script(LEAD)
        self._resign = client.register_script(RESIGN)

    @classmethod
    async def open(cls, url: str) -> "RedisStore":
        """The store of that Redis. Raises StoreError where it does not answer."""
        client = aioredis.Redis.from_url(url, socket_connect_timeout=5)
        try:
            await client.ping()
        except RedisError as error:
            await client.aclose()
            raise StoreError(f"store {without_password(url)}: {error}") from None
        return cls(client)

    async def close(self) -> None:
        await self._redis.aclose()

    # Files

    @_told
    async def add_file(self, file: FileRecord, content: Iterable[bytes] | AsyncIterator[bytes]) -> FileRecord:
        """Each writer has a part of its own: a leader that was only slow may write beside its successor."""
        part, data = f"{PREFIX}part:{file.id}:{uuid.uuid4().hex}", _data(file.id)
        size = 0
        async for chunk in regular(content):
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.rpush(part, chunk)
                pipe.expire(part, PART_S)
                await pipe.execute()
            size += len(chunk)
        record = msgspec.structs.replace(file, bytes=size)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(data)
            if size:
                pipe.rename(part, data)
                pipe.persist(data)
            pipe.set(f"{PREFIX}file:{file.id}", _encode(record))
            pipe.zadd(f"{PREFIX}files:{file.tenant}", {file.id: file.created_at})
            await pipe.execute()
        return record

    @_told
    async def file(self, file_id: str) -> FileRecord | None:
        found = await self._redis.get(f"{PREFIX}file:{file_id}")
        return _file_record(found) if found else None

    @_told
    async def files(self, tenant: str) -> list[FileRecord]:
        ids = await self._redis.zrevrange(f"{PREFIX}files:{tenant}", 0, -1)
        if not ids:
            return []
        found = await self._redis.mget([f"{PREFIX}file:{each.decode()}" for each in ids])
        return [_file_record(each) for each in found if each]

    async def read_file(self, file_id: str) -> AsyncIterator[bytes]:
        number = 0
        while (chunk := await self._chunk(file_id, number)) is not None:
            yield chunk
            number += 1

    @_told
    async def _chunk(self, file_id: str, number: int) -> bytes | None:
        chunk: bytes | None = await self._redis.lindex(_data(file_id), number)
        return chunk

    @_told
    async def delete_file(self, file_id: str) -> bool:
        file = await self.file(file_id)
        if file is None:
            return False
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(f"{PREFIX}file:{file_id}", _data(file_id))
            pipe.zrem(f"{PREFIX}files:{file.tenant}", file_id)
            deleted, _ = await pipe.execute()
        return bool(deleted)

    # Batches

    @_told
    async def add_batch(self, batch: BatchRecord) -> None:
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(_batch(batch.id), mapping={"record": _encode(batch), "total": 0})
            pipe.zadd(f"{PREFIX}batches:{batch.tenant}", {batch.id: batch.created_at})
            pipe.zadd(f"{PREFIX}open", {batch.id: batch.expires_at})
            await pipe.execute()

    @_told
    async def batch(self, batch_id: str) -> tuple[BatchRecord, Counts] | None:
        found = await self._batches([batch_id])
        return found[0] if found else None

    @_told
    async def batches(self, tenant: str) -> list[tuple[BatchRecord, Counts]]:
        ids = await self._redis.zrevrange(f"{PREFIX}batches:{tenant}", 0, -1)
        return await self._batches([each.decode() for each in ids])

    @_told
    async def open_batches(self) -> list[tuple[BatchRecord, Counts]]:
        ids = await self._redis.zrange(f"{PREFIX}open", 0, -1)
        found = await self._batches([each.decode() for each in ids])
        return [each for each in found if each[0].status in OPEN_STATES]

    async def _batches(self, ids: Sequence[str]) -> list[tuple[BatchRecord, Counts]]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for batch_id in ids:
                pipe.hmget(_batch(batch_id), "record", "total", "completed", "failed")
            rows = await pipe.execute() if ids else []
        return [
            (_batch_record(record), Counts(*(int(each or 0) for each in counts)))
            for record, *counts in rows
            if record is not None
        ]

    @_told
    async def move_batch(
        self, batch_id: str, from_states: Collection[str], **changes: Any
    ) -> BatchRecord | None:
        key = _batch(batch_id)
        while True:
            found = await self._redis.hget(key, "record")
            batch = _batch_record(found) if found else None
            if batch is None or batch.status not in from_states:
                return None
            batch = msgspec.structs.replace(batch, **changes)
            stays_open = int(batch.status in OPEN_STATES)
            if await self._move(
                keys=[key, f"{PREFIX}open"], args=[found, _encode(batch), stays_open, batch_id]
            ):
                return batch

    # Lines

    @_told
    async def add_lines(self, batch_id: str, lines: Sequence[Line]) -> None:
        values = [value for line in lines for value in (line.number, line.custom_id, line.body)]
        step = 3 * PAGE
        for start in range(0, len(values), step):
            await self._add_lines(
                keys=[_lines(batch_id), _batch(batch_id)], args=values[start : start + step]
            )

    @_told
    async def claim(self, batch_id: str, owner: str, count: int) -> list[Line]:
        key = _lines(batch_id)
        try:
            found = await self._redis.xreadgroup(GROUP, owner, {key: ">"}, count=count)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            await self._make_group(key)
            found = await self._redis.xreadgroup(GROUP, owner, {key: ">"}, count=count)
        return _as_lines(_entries(found))

    @_told
    async def recover(self, batch_id: str, owner: str) -> list[Line]:
        key = _lines(batch_id)
        await self._make_group(key)
        pending, start = [], "-"
        while page := await self._redis.xpending_range(key, GROUP, start, "+", PAGE):
            pending += [each["message_id"] for each in page]
            start = f"({page[-1]['message_id'].decode()}"
        if not pending:
            return []
        lines = _as_lines(await self._redis.xclaim(key, GROUP, owner, 0, pending))
        if not lines:
            return []
        kept = await self._redis.hmget(_kept(batch_id), [line.number for line in lines])
        return [
            line if data is None else msgspec.structs.replace(line, kept=data)
            for line, data in zip(lines, kept, strict=True)
        ]

    async def _make_group(self, key: str) -> None:
        try:
            await self._redis.xgroup_create(key, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    @_told
    async def keep(self, batch_id: str, kept: Mapping[int, bytes]) -> None:
        values = [value for pair in kept.items() for value in pair]
        await self._keep(keys=[_lines(batch_id), _kept(batch_id)], args=values)

    @_told
    async def finish(self, batch_id: str, result: Result) -> bool:
        first = await self._finish(
            keys=[_lines(batch_id), _results(batch_id), _batch(batch_id), _kept(batch_id)],
            args=[
                result.number,
                "completed" if result.ok else "failed",
                (b"1" if result.ok else b"0") + result.text,
                GROUP,
            ],
        )
        return bool(first)

    async def results(self, batch_id: str) -> AsyncIterator[Result]:
        found = await self.batch(batch_id)
        total = found[1].total if found is not None else 0
        for start in range(0, total, PAGE):
            numbers = range(start, min(start + PAGE, total))
            for number, text in zip(numbers, await self._texts(batch_id, numbers), strict=True):
                if text is not None:
                    yield Result(number, text[:1] == b"1", text[1:])

    @_told
    async def _texts(self, batch_id: str, numbers: range) -> list[bytes | None]:
        texts: list[bytes | None] = await self._redis.hmget(_results(batch_id), list(numbers))
        return texts

    @_told
    async def drop_lines(self, batch_id: str) -> None:
        await self._redis.delete(_lines(batch_id), _kept(batch_id), _results(batch_id))

    # Leader

    @_told
    async def lead(self, owner: str, url: str, ttl_s: float) -> bool:
        return bool(await self._lead(keys=[f"{PREFIX}leader"], args=[owner, url, round(ttl_s * 1000)]))

    @_told
    async def leader(self) -> str | None:
        url = await self._redis.hget(f"{PREFIX}leader", "url")
        return url.decode() if url else None

    @_told
    async def resign(self, owner: str) -> None:
        await self._resign(keys=[f"{PREFIX}leader"], args=[owner])


def _batch(batch_id: str) -> str:
    return f"{PREFIX}batch:{batch_id}"


def _lines(batch_id: str) -> str:
    return f"{PREFIX}lines:{batch_id}"


def _kept(batch_id: str) -> str:
    return f"{PREFIX}kept:{batch_id}"


def _results(batch_id: str) -> str:
    return f"{PREFIX}results:{batch_id}"


def _data(file_id: str) -> str:
    return f"{PREFIX}data:{file_id}"


def _entries(found: Any) -> list[Any]:
    """The entries of the one stream that was read, in either protocol's shape."""
    if not found:
        return []
    if isinstance(found, dict):
        (pages,) = found.values()
        return [entry for page in pages for entry in page] if pages and isinstance(pages[0], list) else pages
    return list(found[0][1])


def _as_lines(entries: Sequence[Any]) -> list[Line]:
    return [
        Line(int(entry_id.split(b"-")[0]) - 1, fields[b"c"].decode(), fields[b"b"])
        for entry_id, fields in entries
    ]
