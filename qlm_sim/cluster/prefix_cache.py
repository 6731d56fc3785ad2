"""Prefix caching: full KV blocks that outlive their request, as vLLM V1 keeps and finds them.

A full block is known by its key, which stands for every token up to its end, so a hit is always a run of
blocks from the start. A block gets its key in the iteration that fills it, be it with prompt or with output.
Equal blocks are not merged: each request fills its own, and the first that is there is the one found. A
block that nobody holds any more stays, and gives way when KV blocks are needed, the longest unused first;
of one request its last block first.

Free blocks without a key are all taken before any with one, so a count of free blocks (which the scheduler
keeps) is enough to know how many of those with a key must have gone. Knows no time, and no tokens: what is
equal is told by each request's ``content``.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from heapq import heappop, heappush, heapreplace

from qlm_sim.cluster.decodes import Decodes
from qlm_sim.cluster.requests import SimRequest
from qlm_sim.workload.content import Content

Key = tuple[Hashable, int]


class Block:
    """A full KV block."""

    __slots__ = ("key", "users")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.users = 1
        """Requests that hold it."""


def keys(content: Content, size: int, first: int, last: int) -> Iterator[Key]:
    """Keys of the blocks of ``size`` tokens from number ``first`` to before ``last``.

    The run that a block's last token lies in stands for all runs before it, so that and the place are enough.
    """
    if len(content) == 1:
        chain = content[0][1]
        for number in range(first, last):
            yield chain, number
        return
    run = bisect_left(content, ((first + 1) * size,)) - 1
    for number in range(first, last):
        end = (number + 1) * size
        while run + 1 < len(content) and content[run + 1][0] < end:
            run += 1
        yield content[run][1], number


def order_of_admission(seq: SimRequest) -> int:
    return seq.rank


class PrefixCache:
    """The blocks with a key of one engine and one model."""

    def __init__(self, block_size: int) -> None:
        self.queried_tokens = 0
        """Context tokens of the requests admitted, but those that come back from a preemption."""
        self.hit_tokens = 0
        """Those of them that were found."""
        self._size = block_size
        self._first: dict[Key, Block] = {}
        """The block that a key finds."""
        self._others: dict[Key, list[Block]] = {}
        """Equal ones, in the order in which they were filled."""
        self._free: OrderedDict[Block, None] = OrderedDict()
        """Blocks that nobody holds, the first to go first."""
        self._fills: list[tuple[int, int, SimRequest, list[Block]]] = []
        """Heap of (decode step, rank, request, its blocks): a decoding request fills its next block then, or
        later. An entry whose blocks are not the request's any more is stale."""
        self._admitted = 0

    def expect(self, seq: SimRequest) -> None:
        """An attempt begins: the request waits."""
        seq.rank = 0
        seq.blocks = []

    def find(self, seq: SimRequest) -> list[Block]:
        """The blocks that hold the start of the request's context. Never all of it: the last token must be
        computed to go on from it."""
        found = []
        known = self._first
        for key in keys(seq.content, self._size, 0, (seq.context - 1) // self._size):
            block = known.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def admit(self, seq: SimRequest, found: list[Block]) -> None:
        """The request runs, and holds the blocks found for it."""
        if not seq.rank:
            self.queried_tokens += seq.context
            self.hit_tokens += len(found) * self._size
        self._admitted += 1
        seq.rank = self._admitted
        for block in found:
            if not block.users:
                del self._free[block]
            block.users += 1
        seq.blocks = found

    def join(self, seq: SimRequest) -> None:
        """The request decodes: from now on ``write_until`` sees to its blocks."""
        blocks = seq.blocks
        heappush(self._fills, (seq.offset + (len(blocks) + 1) * self._size, seq.rank, seq, blocks))

    def write(self, seq: SimRequest, tokens: int) -> None:
        """The blocks that the request's first ``tokens`` tokens fill get their keys."""
        held = seq.blocks
        for key in keys(seq.content, self._size, len(held), tokens // self._size):
            block = Block(key)
            held.append(block)
            if self._first.setdefault(key, block) is not block:
                self._others.setdefault(key, []).append(block)

    def write_until(self, step: int) -> None:
        """The same for every decoding request, when that many decode steps are done."""
        fills, size = self._fills, self._size
        while fills and fills[0][0] <= step:
            _, rank, seq, blocks = fills[0]
            if seq.blocks is not blocks:
                heappop(fills)
                continue
            filled_at = seq.offset + (len(blocks) + 1) * size
            if filled_at <= step:
                self.write(seq, (len(blocks) + 1) * size)
                filled_at += size
            heapreplace(fills, (filled_at, rank, seq, blocks))

    def fit(self, free_blocks: int) -> None:
        """Only so many KV blocks are free now: evict what no longer fits."""
        free = self._free
        while len(free) > free_blocks:
            self._forget(free.popitem(last=False)[0])

    def release(self, seq: SimRequest) -> int:
        """The request holds its blocks no longer. Returns how many of them others still hold."""
        shared = 0
        for block in reversed(seq.blocks):
            block.users -= 1
            if block.users:
                shared += 1
            else:
                self._free[block] = None
        seq.blocks = []
        return shared

    def clear(self) -> None:
        """All KV cache is lost. Nobody may hold any."""
        self._first.clear()
        self._others.clear()
        self._free.clear()
        self._fills.clear()

    def iterations_unchanged(
        self, head: SimRequest, found: list[Block], decodes: Decodes, free_blocks: int, longest: int
    ) -> int:
        """For how many decode iterations, at most ``longest``, a blocked head finds what it finds now.

        It would find more when a running request fills the block that comes next, and less when one of those
        found is evicted. ``free_blocks``: those free before the first of these iterations, whose blocks are
        written and fitted already.
        """
        size, number = self._size, len(found)
        for missing in keys(head.content, size, number, min(number + 1, (head.context - 1) // size)):
            for _, _, seq, blocks in self._fills:
                if seq.blocks is not blocks or len(blocks) > number:
                    continue
                if next(keys(seq.content, size, number, number + 1)) == missing:
                    longest = min(longest, (number + 1) * size - (decodes.steps - seq.offset) - 1)
        idle = {block for block in found if not block.users}
        if idle:
            lasting = next(place for place, block in enumerate(self._free) if block in idle)
            longest = min(longest, decodes.iterations_in(free_blocks - len(self._free) + lasting))
        return longest

    def _forget(self, block: Block) -> None:
        key = block.key
        others = self._others.get(key)
        if others is None:
            del self._first[key]
            return
        if self._first[key] is block:
            self._first[key] = others.pop(0)
        else:
            others.remove(block)
        if not others:
            del self._others[key]
