"""The sequences that decode on one engine. They all gain one token per iteration, so one counter
stands for all of them and an iteration costs the same however many there are.

Knows nothing of time.
"""

from heapq import heappop, heappush

from qlm_sim.cluster.requests import SimRequest


class Decodes:
    """A set of decoding sequences, their KV cache, and which of them finishes when.

    A sequence that joined keeps ``offset`` = ``steps`` - computed tokens, so its computed tokens are
    ``steps - offset`` at any time, and it takes a new KV block in the iteration that begins when they
    are a multiple of the block size: when steps ≡ offset (mod block size). Counting the offsets by that
    residue gives the blocks that any number of iterations takes without looking at sequences one by one.
    """

    __slots__ = ("_joined", "block_size", "blocks", "count", "finishes", "kv_tokens", "residues", "steps")

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.steps = 0
        """Iterations done since the engine's start."""
        self.count = 0
        self.kv_tokens = 0
        """Computed tokens of all sequences."""
        self.blocks = 0
        """KV blocks that hold them."""
        self.residues = [0] * block_size
        """Sequences by residue of their offset."""
        self.finishes: list[tuple[int, int, SimRequest]] = []
        """Heap of (step, order of joining, sequence). Some that left have entries still, never the first."""
        self._joined = 0

    def join(self, seq: SimRequest) -> None:
        """``seq.computed`` tokens of it are computed, and it decodes from the next iteration on."""
        computed, size, residues = seq.computed, self.block_size, self.residues
        offset = seq.offset = self.steps - computed
        self.count += 1
        self.kv_tokens += computed
        self.blocks -= -computed // size
        residues[offset % size] += 1
        number = self._joined = self._joined + 1
        entry = seq.finish_entry = (offset + seq.last_token, number, seq)
        heappush(self.finishes, entry)

    def leave(self, seq: SimRequest) -> None:
        """Writes ``computed`` and ``generated`` back to the sequence."""
        offset, size, residues = seq.offset, self.block_size, self.residues
        computed = seq.computed = self.steps - offset
        seq.generated = computed + 1 - seq.request.prompt_tokens
        seq.finish_entry = None
        self.count -= 1
        self.kv_tokens -= computed
        self.blocks += -computed // size
        residues[offset % size] -= 1
        finishes = self.finishes
        while finishes and finishes[0][2].finish_entry is not finishes[0]:
            heappop(finishes)

    def advance(self, iterations: int) -> None:
        """So many iterations are done."""
        if iterations == 1:
            self.blocks += self.residues[self.steps % self.block_size]
            self.steps += 1
            self.kv_tokens += self.count
        else:
            self.blocks += self.blocks_for(iterations)
            self.steps += iterations
            self.kv_tokens += iterations * self.count

    def skip(self, seq: SimRequest) -> None:
        """Take back the last iteration's progress of a sequence that had no part in it."""
        self.leave(seq)
        seq.computed -= 1
        self.join(seq)

    def finished(self) -> list[SimRequest]:
        """Take out the sequences that finish at this step."""
        finishes, steps = self.finishes, self.steps
        done = []
        while finishes and finishes[0][0] <= steps:
            seq = heappop(finishes)[2]
            self.leave(seq)
            done.append(seq)
        return done

    def blocks_for(self, iterations: int) -> int:
        """KV blocks that the next so many iterations take, if no sequence joins or leaves."""
        size, residues = self.block_size, self.residues
        start = self.steps % size
        end = start + iterations % size
        blocks = iterations // size * self.count + sum(residues[start:end])
        return blocks if end <= size else blocks + sum(residues[: end - size])

    def iterations_in(self, blocks: int) -> int:
        """Iterations that can be done with that many free blocks."""
        size = self.block_size
        residues = self.residues
        cycles, blocks = divmod(blocks, self.count)
        step = self.steps % size
        rest = 0
        while (needed := residues[(step + rest) % size]) <= blocks:
            blocks -= needed
            rest += 1
        return cycles * size + rest
