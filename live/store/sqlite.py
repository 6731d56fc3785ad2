"""The embedded store: one SQLite file in WAL mode, written by one thread that commits in groups.

The leader's lease is a lock on a file beside the database: the operating system frees it when the process
dies, however it dies.
"""

import fcntl
import os
import sqlite3
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from live.store.chunks import regular
from live.store.group_commit import GroupCommit
from live.store.interface import (
    OPEN_STATES,
    BatchRecord,
    Counts,
    FileRecord,
    Line,
    Result,
    StoreError,
)

PAGE = 1000
"""Rows read at once."""
PART = ".part"
"""Behind the id of a file that is not written to its end."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (id TEXT PRIMARY KEY, tenant TEXT NOT NULL, created_at INTEGER NOT NULL,
    record BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS chunks (file_id TEXT NOT NULL, number INTEGER NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (file_id, number));
CREATE TABLE IF NOT EXISTS batches (id TEXT PRIMARY KEY, tenant TEXT NOT NULL, status TEXT NOT NULL,
    created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, record BLOB NOT NULL,
    total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS batches_open ON batches (status, expires_at);
CREATE TABLE IF NOT EXISTS lines (batch_id TEXT NOT NULL, number INTEGER NOT NULL, custom_id TEXT NOT NULL,
    body BLOB NOT NULL, owner TEXT, PRIMARY KEY (batch_id, number)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS lines_free ON lines (batch_id, number) WHERE owner IS NULL;
CREATE INDEX IF NOT EXISTS lines_claimed ON lines (batch_id, owner) WHERE owner IS NOT NULL;
CREATE TABLE IF NOT EXISTS kept (batch_id TEXT NOT NULL, number INTEGER NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (batch_id, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS results (batch_id TEXT NOT NULL, number INTEGER NOT NULL, ok INTEGER NOT NULL,
    text BLOB NOT NULL, PRIMARY KEY (batch_id, number)) WITHOUT ROWID;
"""

_encode = msgspec.json.Encoder().encode
_file_record = msgspec.json.Decoder(FileRecord).decode
_batch_record = msgspec.json.Decoder(BatchRecord).decode


class SqliteStore:
    """See ``live.store.interface.Store``."""

    def __init__(self, path: str, connection: sqlite3.Connection) -> None:
        self._path = path
        self._commits = GroupCommit(connection)
        self._do = self._commits.do
        self._lock_file: int | None = None

    @classmethod
    async def open(cls, path: str) -> "SqliteStore":
        """The store in that file, made if it is not there."""
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"store sqlite:///{path}: {error}") from None
        return cls(path, connection)

    async def close(self) -> None:
        await self._commits.close()
        self._unlock()

    async def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        return await self._do(lambda db: db.execute(statement, values).fetchall())

    # Files

    async def add_file(self, file: FileRecord, content: Iterable[bytes] | AsyncIterator[bytes]) -> FileRecord:
        """The chunks go in one by one; the record, with the last, makes them a file."""
        part = f"{file.id}{PART}"
        await self._rows("DELETE FROM chunks WHERE file_id = ?", (part,))
        size = number = 0
        try:
            async for chunk in regular(content):
                await self._rows("INSERT INTO chunks VALUES (?, ?, ?)", (part, number, chunk))
                size += len(chunk)
                number += 1
            record = msgspec.structs.replace(file, bytes=size)
            await self._do(lambda db: _publish(db, record, part, number))
        except BaseException:
            with suppress(StoreError):
                await self._rows("DELETE FROM chunks WHERE file_id = ?", (part,))
            raise
        return record

    async def file(self, file_id: str) -> FileRecord | None:
        rows = await self._rows("SELECT record FROM files WHERE id = ?", (file_id,))
        return _file_record(rows[0][0]) if rows else None

    async def files(self, tenant: str) -> list[FileRecord]:
        rows = await self._rows(
            "SELECT record FROM files WHERE tenant = ? ORDER BY created_at DESC, rowid DESC", (tenant,)
        )
        return [_file_record(row[0]) for row in rows]

    async def read_file(self, file_id: str) -> AsyncIterator[bytes]:
        number = 0
        chunk = "SELECT data FROM chunks WHERE file_id = ? AND number = ?"
        while rows := await self._rows(chunk, (file_id, number)):
            yield rows[0][0]
            number += 1

    async def delete_file(self, file_id: str) -> bool:
        def delete(db: sqlite3.Connection) -> bool:
            db.execute("DELETE FROM chunks WHERE file_id = ?", (file_id,))
            return db.execute("DELETE FROM files WHERE id = ?", (file_id,)).rowcount > 0

        return await self._do(delete)

    # Batches

    async def add_batch(self, batch: BatchRecord) -> None:
        await self._rows(
            "INSERT INTO batches (id, tenant, status, created_at, expires_at, record)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (batch.id, batch.tenant, batch.status, batch.created_at, batch.expires_at, _encode(batch)),
        )

    async def batch(self, batch_id: str) -> tuple[BatchRecord, Counts] | None:
        found = await self._batches("WHERE id = ?", (batch_id,))
        return found[0] if found else None

    async def batches(self, tenant: str) -> list[tuple[BatchRecord, Counts]]:
        return await self._batches("WHERE tenant = ? ORDER BY created_at DESC, rowid DESC", (tenant,))

    async def open_batches(self) -> list[tuple[BatchRecord, Counts]]:
        marks = ", ".join("?" * len(OPEN_STATES))
        return await self._batches(
            f"WHERE status IN ({marks}) ORDER BY expires_at, created_at, rowid", OPEN_STATES
        )

    async def _batches(self, where: str, values: Sequence[Any]) -> list[tuple[BatchRecord, Counts]]:
        rows = await self._rows(f"SELECT record, total, completed, failed FROM batches {where}", values)
        return [(_batch_record(row[0]), Counts(*row[1:])) for row in rows]

    async def move_batch(
        self, batch_id: str, from_states: Collection[str], **changes: Any
    ) -> BatchRecord | None:
        def move(db: sqlite3.Connection) -> BatchRecord | None:
            row = db.execute("SELECT record FROM batches WHERE id = ?", (batch_id,)).fetchone()
            batch = _batch_record(row[0]) if row else None
            if batch is None or batch.status not in from_states:
                return None
            batch = msgspec.structs.replace(batch, **changes)
            db.execute(
                "UPDATE batches SET status = ?, record = ? WHERE id = ?",
                (batch.status, _encode(batch), batch_id),
            )
            return batch

        return await self._do(move)

    # Lines

    async def add_lines(self, batch_id: str, lines: Sequence[Line]) -> None:
        def add(db: sqlite3.Connection) -> None:
            before = db.total_changes
            db.executemany(
                "INSERT OR IGNORE INTO lines VALUES (?, ?, ?, ?, NULL)",
                [(batch_id, line.number, line.custom_id, line.body) for line in lines],
            )
            added = db.total_changes - before
            db.execute("UPDATE batches SET total = total + ? WHERE id = ?", (added, batch_id))

        await self._do(add)

    async def claim(self, batch_id: str, owner: str, count: int) -> list[Line]:
        def take(db: sqlite3.Connection) -> list[Any]:
            rows = db.execute(
                "SELECT number, custom_id, body FROM lines WHERE batch_id = ? AND owner IS NULL"
                " ORDER BY number LIMIT ?",
                (batch_id, count),
            ).fetchall()
            db.executemany(
                "UPDATE lines SET owner = ? WHERE batch_id = ? AND number = ?",
                [(owner, batch_id, row[0]) for row in rows],
            )
            return rows

        return [Line(*row) for row in await self._do(take)]

    async def recover(self, batch_id: str, owner: str) -> list[Line]:
        def take(db: sqlite3.Connection) -> list[Any]:
            rows = db.execute(
                "SELECT number, custom_id, body, coalesce(data, x'') FROM lines LEFT JOIN kept"
                " USING (batch_id, number) WHERE batch_id = ? AND owner IS NOT NULL ORDER BY number",
                (batch_id,),
            ).fetchall()
            db.execute(
                "UPDATE lines SET owner = ? WHERE batch_id = ? AND owner IS NOT NULL", (owner, batch_id)
            )
            return rows

        return [Line(*row) for row in await self._do(take)]

    async def keep(self, batch_id: str, kept: Mapping[int, bytes]) -> None:
        rows = [(data, batch_id, number) for number, data in kept.items()]
        await self._do(
            lambda db: db.executemany(
                "INSERT OR REPLACE INTO kept SELECT batch_id, number, ? FROM lines"
                " WHERE batch_id = ? AND number = ?",
                rows,
            )
        )

    async def finish(self, batch_id: str, result: Result) -> bool:
        column = "completed" if result.ok else "failed"

        def keep(db: sqlite3.Connection) -> bool:
            there = db.execute(
                "DELETE FROM lines WHERE batch_id = ? AND number = ?", (batch_id, result.number)
            )
            if there.rowcount == 0:
                return False
            db.execute("DELETE FROM kept WHERE batch_id = ? AND number = ?", (batch_id, result.number))
            db.execute(
                "INSERT INTO results VALUES (?, ?, ?, ?)", (batch_id, result.number, result.ok, result.text)
            )
            db.execute(f"UPDATE batches SET {column} = {column} + 1 WHERE id = ?", (batch_id,))
            return True

        return await self._do(keep)

    async def results(self, batch_id: str) -> AsyncIterator[Result]:
        last = -1
        page = (
            "SELECT number, ok, text FROM results WHERE batch_id = ? AND number > ? ORDER BY number LIMIT ?"
        )
        while rows := await self._rows(page, (batch_id, last, PAGE)):
            for number, ok, text in rows:
                yield Result(number, bool(ok), text)
            last = rows[-1][0]

    async def drop_lines(self, batch_id: str) -> None:
        def drop(db: sqlite3.Connection) -> None:
            for table in ("lines", "kept", "results"):
                db.execute(f"DELETE FROM {table} WHERE batch_id = ?", (batch_id,))

        await self._do(drop)

    # Leader

    async def lead(self, owner: str, url: str, ttl_s: float) -> bool:
        if self._lock_file is not None:
            return True
        lock = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.pwrite(lock, url.encode(), 0)
        except BlockingIOError:
            os.close(lock)
            return False
        except OSError as error:
            os.close(lock)  # else nobody could ever lead: the lock would be nobody's
            raise StoreError(f"store sqlite:///{self._path}: {error}") from None
        self._lock_file = lock
        with suppress(StoreError):  # of writers that were killed; one that still writes fails
            await self._rows(f"DELETE FROM chunks WHERE file_id GLOB '*{PART}'")
        return True

    async def leader(self) -> str | None:
        try:
            with open(f"{self._path}.lock", "rb") as lock:
                url = lock.read().decode()
                if self._lock_file is None:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    except BlockingIOError:
                        return url or None
                    return None
                return url or None
        except FileNotFoundError:
            return None

    async def resign(self, owner: str) -> None:
        self._unlock()

    def _unlock(self) -> None:
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None


def _publish(db: sqlite3.Connection, file: FileRecord, part: str, chunks: int) -> None:
    """Make so many chunks a file. Raises StoreError where some are gone."""
    db.execute("DELETE FROM chunks WHERE file_id = ?", (file.id,))
    if db.execute("UPDATE chunks SET file_id = ? WHERE file_id = ?", (file.id, part)).rowcount != chunks:
        raise StoreError("a new leader has cleared away what was written of the file")
    db.execute(
        "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)",
        (file.id, file.tenant, file.created_at, _encode(file)),
    )
