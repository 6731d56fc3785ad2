"""The sequences that decode on one engine. They all gain one token per iteration, so one counter
stands for all of them and an iteration costs the same however many there are.

Knows nothing of time.
"""

from heapq import heappop, heappush

from qlm_sim.cluster.requests import SimRequest


class Decodes:
    """A set of decoding sequences, their KV cache, and which of them finishes when.

    A sequence that joined keeps ``offset`` = ``steps`` - computed tokens, so its computed tokens are
    ``steps - offset`` at any time, and it needs a new KV block when that is a multiple of the block
    size: when steps ≡ offset (mod block size). Counting the offsets by that residue gives the blocks
    of all sequences at any later step without looking at them one by one.
    """

    __slots__ = ("_finishes", "_joined", "_residues", "block_size", "count", "kv_tokens", "steps")

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.steps = 0
        """Iterations done since the engine's start."""
        self.count = 0
        self.kv_tokens = 0
        """Computed tokens of all sequences."""
        self._residues = [0] * block_size
        self._finishes: list[tuple[int, int, SimRequest]] = []
        """Heap of (step, order of joining, sequence); entries of those that left are stale."""
        self._joined = 0

    def join(self, seq: SimRequest) -> None:
        """``seq.computed`` tokens of it are computed, and it decodes from the next iteration on."""
        offset = seq.offset = self.steps - seq.computed
        self.count += 1
        self.kv_tokens += seq.computed
        self._residues[offset % self.block_size] += 1
        self._joined += 1
        entry = seq.finish_entry = (offset + seq.last_token, self._joined, seq)
        heappush(self._finishes, entry)

    def leave(self, seq: SimRequest) -> None:
        """Writes ``computed`` and ``generated`` back to the sequence."""
        offset = seq.offset
        computed = seq.computed = self.steps - offset
        seq.generated = computed + 1 - seq.request.prompt_tokens
        seq.finish_entry = None
        self.count -= 1
        self.kv_tokens -= computed
        self._residues[offset % self.block_size] -= 1

    def advance(self, iterations: int) -> None:
        self.steps += iterations
        self.kv_tokens += iterations * self.count

    def skip(self, seq: SimRequest) -> None:
        """Take back the last iteration's progress of a sequence that had no part in it."""
        self.leave(seq)
        seq.computed -= 1
        self.join(seq)

    def until_finish(self) -> int:
        """Iterations until the next sequence finishes. There must be one."""
        finishes = self._finishes
        while finishes[0][2].finish_entry is not finishes[0]:
            heappop(finishes)
        return finishes[0][0] - self.steps

    def finished(self) -> list[SimRequest]:
        """Take out the sequences that finish at this step."""
        finishes = self._finishes
        done = []
        while finishes and finishes[0][0] <= self.steps:
            entry = heappop(finishes)
            if entry[2].finish_entry is entry:
                self.leave(entry[2])
                done.append(entry[2])
        return done

    def blocks(self, iterations: int = 0) -> int:
        """KV blocks that the sequences hold after so many more iterations, if none leaves before."""
        steps = self.steps + iterations
        size = self.block_size
        unused = sum(
            count * ((residue - steps) % size) for residue, count in enumerate(self._residues) if count
        )
        return (self.kv_tokens + iterations * self.count + unused) // size

    def until_full(self, blocks: int) -> int:
        """Iterations that can be done before the sequences need more than ``blocks`` blocks in all."""
        free = blocks - self.blocks()
        if free < 0:
            return 0
        cycles, free = divmod(free, self.count)
        iterations = cycles * self.block_size
        residues, size = self._residues, self.block_size
        while (need := residues[(self.steps + iterations) % size]) <= free:
            free -= need
            iterations += 1
        return iterations
