"""One thread that does all work on a SQLite connection, and commits it in groups.

Whatever has queued up while the last commit was written goes into the next, so durable answers cost one
``fsync`` a group, not one each.
"""

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from live.store.interface import StoreError

T = TypeVar("T")

GROUP = 512
"""Most calls in one commit."""


class GroupCommit:
    """The connection's only user from now on."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """``connection``: one that opens no transaction by itself, and may be used in another thread."""
        self._connection = connection
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._write_groups, name="store", daemon=True)
        self._thread.start()

    async def do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What ``work`` returns, once it is committed. Raises StoreError, and nothing of it is kept."""
        if self._closed:
            raise StoreError("store: it is closed")
        call = _Call(work, asyncio.get_running_loop())
        self._calls.put(call)
        answer: T = await call.future
        return answer

    async def close(self) -> None:
        """Finish what is queued, and close the connection."""
        self._closed = True
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join)
        self._connection.close()

    def _write_groups(self) -> None:
        while True:
            group = [self._calls.get()]
            while len(group) < GROUP and not self._calls.empty():
                group.append(self._calls.get())
            calls = [call for call in group if call is not None]
            if calls:
                try:
                    self._write(calls)
                except Exception as error:
                    for call in calls:
                        call.error = error
                for call in calls:
                    call.answer()
            if len(calls) < len(group):
                return

    def _write(self, calls: "Sequence[_Call]") -> None:
        """Commit them together. What is raised has undone them all."""
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            for call in calls:
                call.run(connection)
            connection.execute("COMMIT")
        except Exception:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


class _Call:
    """Work for the writing thread, and the future that waits for it in the event loop."""

    def __init__(self, work: Callable[[sqlite3.Connection], Any], loop: asyncio.AbstractEventLoop) -> None:
        self._work = work
        self._loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()
        self._result: Any = None
        self.error: Exception | None = None

    def run(self, connection: sqlite3.Connection) -> None:
        """Do it inside the group's transaction; what fails is undone alone, where SQLite did not undo all."""
        connection.execute("SAVEPOINT call")
        try:
            self._result = self._work(connection)
        except Exception as error:
            if not connection.in_transaction:
                raise
            connection.execute("ROLLBACK TO call")
            self.error = error
        connection.execute("RELEASE call")

    def answer(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._settle)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    def _settle(self) -> None:
        if self.future.cancelled():
            return
        if self.error is not None:
            error = StoreError(f"store: {self.error}")
            error.__cause__ = self.error
            self.future.set_exception(error)
        else:
            self.future.set_result(self._result)
