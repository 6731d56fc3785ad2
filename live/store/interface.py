"""The durable store: files, batches, their lines, and the lease of the scheduling leader.

One interface, held by SQLite (embedded) and Redis (several gateways); one contract suite runs on both. What a
call has answered survives ``kill -9``. A line is answered at most once: the first result of a number stays.
Times here are wall time in whole seconds since the epoch, as in OpenAI's API.
"""

from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

VALIDATING, FAILED, IN_PROGRESS, FINALIZING = "validating", "failed", "in_progress", "finalizing"
COMPLETED, EXPIRED, CANCELLING, CANCELLED = "completed", "expired", "cancelling", "cancelled"
OPEN_STATES = (VALIDATING, IN_PROGRESS, FINALIZING, CANCELLING)
"""A batch in one of these still needs work."""


class StoreError(Exception):
    """The store cannot be used. The message is one line."""


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An uploaded or produced file, without its content."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A batch without its lines. Names are those of OpenAI's batch object."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    status: str = VALIDATING
    metadata: dict[str, str] | None = None
    errors: list[dict[str, Any]] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None


class Counts(msgspec.Struct, frozen=True):
    """How many lines a batch has, and how many are answered."""

    total: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def left(self) -> int:
        return self.total - self.completed - self.failed


class Line(msgspec.Struct, frozen=True):
    """One request of a batch. ``body`` is the JSON of the request's own body."""

    number: int
    """From 0, in the order of the input file."""
    custom_id: str
    body: bytes
    kept: bytes = b""
    """What its last owner kept of it (``keep``), where it was taken over."""


class Result(msgspec.Struct, frozen=True):
    """The answer to a line. ``text`` is its line of the output file, or of the error file."""

    number: int
    ok: bool
    text: bytes


class Store(Protocol):
    """Every call is atomic and durable when it returns, and raises StoreError where the store cannot be used.
    ``owner`` names one life of one gateway."""

    async def close(self) -> None: ...

    # Files

    async def add_file(self, file: FileRecord, content: Iterable[bytes] | AsyncIterator[bytes]) -> FileRecord:
        """Keep a file; its size is counted here. A file of the same id is replaced as a whole."""
        ...

    async def file(self, file_id: str) -> FileRecord | None: ...

    async def files(self, tenant: str) -> list[FileRecord]:
        """Newest first."""
        ...

    def read_file(self, file_id: str) -> AsyncIterator[bytes]: ...

    async def delete_file(self, file_id: str) -> bool: ...

    # Batches

    async def add_batch(self, batch: BatchRecord) -> None: ...

    async def batch(self, batch_id: str) -> tuple[BatchRecord, Counts] | None: ...

    async def batches(self, tenant: str) -> list[tuple[BatchRecord, Counts]]:
        """Newest first."""
        ...

    async def open_batches(self) -> list[tuple[BatchRecord, Counts]]:
        """Every batch that still needs work, the earliest to expire first."""
        ...

    async def move_batch(
        self, batch_id: str, from_states: Collection[str], **changes: Any
    ) -> BatchRecord | None:
        """Change a batch if it is in one of these states; None if it is not."""
        ...

    # Lines

    async def add_lines(self, batch_id: str, lines: Sequence[Line]) -> None:
        """Append lines. Numbers that are there already are left as they are."""
        ...

    async def claim(self, batch_id: str, owner: str, count: int) -> list[Line]:
        """Take up to ``count`` lines that nobody has, in their order."""
        ...

    async def recover(self, batch_id: str, owner: str) -> list[Line]:
        """Take over every unanswered line that is claimed, by whomever: by another owner that is gone, or by
        a call of this one whose answer was lost. For the leader, while it has none of them under way."""
        ...

    async def keep(self, batch_id: str, kept: Mapping[int, bytes]) -> None:
        """Keep how far lines have come, by number, in place of what was kept before. Answered ones are left
        as they are."""
        ...

    async def finish(self, batch_id: str, result: Result) -> bool:
        """Keep the answer to a line; False, and nothing changes, if it has one."""
        ...

    def results(self, batch_id: str) -> AsyncIterator[Result]:
        """Every answer, in the order of the lines."""
        ...

    async def drop_lines(self, batch_id: str) -> None:
        """Forget lines and answers, when they are in files. The counts stay."""
        ...

    # Leader

    async def lead(self, owner: str, url: str, ttl_s: float) -> bool:
        """Become or stay the leader; False if another one is. ``url``: where the others reach it."""
        ...

    async def leader(self) -> str | None:
        """The leader's URL."""
        ...

    async def resign(self, owner: str) -> None: ...
