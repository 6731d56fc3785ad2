"""Which tokens each iteration computes: vLLM V1's scheduler.

Each iteration serves the running requests first, in order: one token for each that decodes, and the
next chunk for a prompt that is not yet done. Waiting requests follow while the token budget, the
sequence limit and the KV blocks allow. When blocks run out for running ones, the last (or the one of
lowest priority) is preempted: it loses its KV cache, waits at the head and is computed anew; nobody is
admitted in that iteration. With prefix caching a waiting request starts behind the blocks that are found.

Knows no time and no cost: ``schedule`` tells what to compute, ``complete`` that it is done.
"""

from collections.abc import Sequence

from qlm_sim.cluster.decodes import Decodes
from qlm_sim.cluster.prefix_cache import Block, PrefixCache, order_of_admission
from qlm_sim.cluster.requests import SimRequest
from qlm_sim.cluster.waiting import priority, waiting_queue
from qlm_sim.core.types import ModelOnInstance
from qlm_sim.models.engine_config import EngineConfig, check_limits

_NOTHING: list[Block] = []


class Scheduler:
    """The requests of one engine and one model: those that wait and those that run."""

    def __init__(self, profile: ModelOnInstance, config: EngineConfig) -> None:
        check_limits(profile, config)
        self.max_num_seqs = profile.max_num_seqs
        self.max_num_batched_tokens = profile.max_num_batched_tokens
        self.block_size = config.block_size
        self.blocks = profile.kv_capacity_tokens // config.block_size
        """KV blocks in all."""
        self._capacity = self.blocks
        """KV blocks that requests can hold, where a block that n of them share counts n times."""
        # vLLM counts the one block that it keeps for itself.
        self._watermark = int(config.watermark * (self.blocks + 1))
        self.cache = PrefixCache(config.block_size) if config.enable_prefix_caching else None
        self.longest_context = min(profile.max_model_len, self.blocks * config.block_size)
        """Most tokens, prompt and output, of one request."""
        self._by_priority = config.scheduling_policy == "priority"
        self._whole_prompt = bool(config.scheduler_reserve_full_isl)
        self.waiting = waiting_queue(config.scheduling_policy)
        self.running: dict[str, SimRequest] = {}
        """Admitted requests by id, in order of admission."""
        self.decodes = Decodes(config.block_size)
        """Those of the running whose prefill is done."""
        self._partial: SimRequest | None = None
        """The one running request, always the last, whose prefill is under way."""
        self.preemptions = 0
        self.preempting = False
        """Whether the iterations scheduled last go on behind one that preempted."""

        # The iteration that was scheduled last.
        self.tokens = 0
        """Tokens to compute."""
        self.seqs = 0
        """Sequences that have a part in it."""
        self.kv_tokens = 0
        """KV tokens that its decoding sequences read, their own new ones included."""
        self.pairs = 0
        """Query-key pairs of its prefill chunks."""
        self.restored_tokens = 0
        """KV tokens that come back from host memory before it."""
        self._chunks: list[tuple[SimRequest, int]] = []
        """Prefill chunks: the request, and its computed tokens at the end."""
        self._resumed: list[SimRequest] = []
        """Requests that came back with all their KV cache and decode on at once."""
        self._skipped: list[SimRequest] = []
        """Decoding requests that have no part in it."""
        self._short: SimRequest | None = None
        """Without prefix caching, the head that lacks blocks: of those running, none has left since that was
        seen, so that it lacks them still."""
        self._blocked: list[Block] | None = None
        """With prefix caching, what was found for the head that too few free blocks keep waiting."""

    def add(self, seq: SimRequest) -> bool:
        """Let ``seq`` wait. Whether a leap under way must be cut, because it may be admitted now."""
        prompt = seq.request.prompt_tokens
        seq.context = prompt + seq.generated
        seq.computed = 0
        last = prompt + seq.output_tokens
        seq.last_token = (last if last < self.longest_context else self.longest_context) - 1
        if self.cache is not None:
            self.cache.expect(seq)
        self.waiting.append(seq)
        # Behind a head that is blocked this one is blocked too.
        return self.waiting[0] is seq and len(self.running) < self.max_num_seqs

    def withdraw(self, seq: SimRequest) -> bool:
        """Take a waiting request out. Whether a leap under way must be cut: another one is head now."""
        was_head = self.waiting[0] is seq
        self.waiting.remove(seq)
        return was_head

    def stop(self, seq: SimRequest) -> None:
        """Take a running request out, between two iterations. ``seq.computed`` tells its KV tokens."""
        del self.running[seq.request.id]
        self._short = None
        if seq is self._partial:
            self._partial = None
        else:
            self.decodes.leave(seq)
        if self.cache is not None:
            self._capacity -= self.cache.release(seq)

    def schedule(self, longest: int) -> int:
        """Compose the next iteration. Some request must run or wait.

        Returns for how many iterations, at most ``longest``, the composition holds, if no request comes
        or goes: more than one only where all running requests decode, all waiting ones are blocked, and
        no KV block is missing. ``kv_tokens`` then grows by ``seqs`` from each to the next.
        """
        self.preempting = False
        waiting = self.waiting
        if (waiting and waiting[0] is not self._short) or self._partial is not None:
            if self._mix():
                if self._chunks or longest == 1 or not self._goes_on():
                    return 1
                self.preempting = True
            elif self.cache is not None and self._blocked is not None:
                longest = self.cache.iterations_unchanged(
                    waiting[0], self._blocked, self.decodes, self._free(), longest
                )
        decodes = self.decodes
        count = self.tokens = self.seqs = decodes.count
        self.kv_tokens = decodes.kv_tokens + count
        self.pairs = self.restored_tokens = 0
        iterations = decodes.finishes[0][0] - decodes.steps
        if iterations > longest:
            iterations = longest
        # A sequence takes a block every block_size iterations: a bound that spares the exact number.
        free = self._capacity - decodes.blocks
        if (iterations // self.block_size + 1) * count > free and decodes.blocks_for(iterations) > free:
            iterations = decodes.iterations_in(free)
            if not iterations:
                return 1 if self._mix() else self.schedule(longest)
        return iterations

    def complete(self, iterations: int) -> tuple[Sequence[SimRequest], Sequence[SimRequest]]:
        """The iterations scheduled last, or the first so many of them, are done.

        Returns the requests that decode from now on, and those that finished.
        """
        decodes = self.decodes
        decodes.advance(iterations)
        begun: list[SimRequest] | tuple[()] = ()
        finished: list[SimRequest] | tuple[()] = ()
        cache, chunks, resumed = self.cache, self._chunks, self._resumed
        if chunks or resumed:
            begun = []
            if resumed:
                begun += resumed
                resumed.clear()
            self._partial = None
            for seq, computed in chunks:
                seq.computed = computed
                if computed < seq.context:
                    self._partial = seq
                else:
                    decodes.join(seq)
                    if cache is not None:
                        cache.join(seq)
                    begun.append(seq)
            chunks.clear()
        if self._skipped:
            for seq in self._skipped:
                decodes.skip(seq)
            self._skipped.clear()
        if cache is not None:
            cache.write_until(decodes.steps)
            cache.fit(self._free())
        if (finishes := decodes.finishes) and finishes[0][0] <= decodes.steps:
            finished = decodes.finished()
            self._short = None
            if cache is not None:
                finished.sort(key=order_of_admission)
                for seq in finished:
                    self._capacity -= cache.release(seq)
            for seq in finished:
                del self.running[seq.request.id]
        return begun, finished

    @property
    def prefilling(self) -> SimRequest | None:
        """The running request whose prompt is not done yet, if there is one."""
        return self._partial

    def scheduled(self) -> dict[str, int]:
        """Tokens of each request that has a part in the iteration that was scheduled last."""
        tokens = dict.fromkeys(self.running, 1)
        for seq in self._skipped:
            del tokens[seq.request.id]
        if self._partial is not None:
            del tokens[self._partial.request.id]
        for seq, computed in self._chunks:
            tokens[seq.request.id] = computed - seq.computed
        return tokens

    def cached_tokens(self, iterations: int) -> int:
        """Tokens whose KV cache is on the GPU, when so many of the scheduled iterations are done."""
        decodes = self.decodes
        tokens = decodes.kv_tokens + iterations * decodes.count
        if self._chunks:
            tokens += sum([seq.computed for seq, _ in self._chunks])
        elif self._partial is not None:
            tokens += self._partial.computed
        return tokens - (self._capacity - self.blocks) * self.block_size

    def used_blocks(self, iterations: int, *, under_way: bool) -> int:
        """KV blocks in use by then; ``under_way``: another of the scheduled iterations has begun."""
        size = self.block_size
        blocks = self.decodes.blocks + self.decodes.blocks_for(iterations + under_way)
        if self._chunks:
            computed = [after if under_way else seq.computed for seq, after in self._chunks]
            blocks += sum([-(-tokens // size) for tokens in computed])
        elif self._partial is not None:
            blocks += -(-self._partial.computed // size)
        if self._skipped and under_way:
            blocks -= sum([(self.decodes.steps - seq.offset) % size == 0 for seq in self._skipped])
        return blocks - (self._capacity - self.blocks)

    def _free(self) -> int:
        """Free KV blocks between two iterations."""
        partial = self._partial
        held = 0 if partial is None else -(-partial.computed // self.block_size)
        return self._capacity - self.decodes.blocks - held

    def _mix(self) -> bool:
        """Compose an iteration of decodes and prefill chunks. False if only decodes are possible."""
        decodes, size, cache = self.decodes, self.block_size, self.cache
        budget = self.max_num_batched_tokens - decodes.count
        # Blocks that are free once the running have what they need for this iteration.
        free = self._capacity - decodes.blocks - decodes.residues[decodes.steps % size]
        partial, chunk, blocks = self._partial, 0, 0
        if partial is not None:
            chunk = min(partial.context - partial.computed, budget)
            blocks = -(-(partial.computed + chunk) // size)
            free -= blocks
        preempted = free < 0
        if preempted:
            in_turn = self._by_priority or cache is not None
            chunk = self._preempt_in_turn() if in_turn else self._preempt_last(free, blocks)
            partial = self._partial
        elif cache is not None:
            cache.write_until(decodes.steps + 1)
            cache.fit(free)
        self._blocked = self._short = None

        chunks = self._chunks
        self.restored_tokens = 0
        if chunk and partial is not None:
            after = partial.computed + chunk
            chunks.append((partial, after))
            budget -= chunk
            if cache is not None:
                cache.write(partial, after)

        if not preempted:
            waiting, running, watermark = self.waiting, self.running, self._watermark
            room = self.max_num_seqs - len(running)
            found, shared, cached = _NOTHING, 0, 0
            while waiting and room and budget:
                seq = waiting[0]
                context, computed = seq.context, seq.host_tokens
                if cache is not None:
                    found = cache.find(seq)
                    shared = sum([block.users > 0 for block in found])
                    cached = len(found) * size
                    if cached > computed:
                        computed = cached
                chunk = context - computed
                if chunk > budget:
                    chunk = budget
                after = computed + chunk
                blocks = -(-after // size)
                needed = (-(-context // size) if self._whole_prompt else blocks) - shared
                if needed + watermark > free and (running or needed > free):
                    if cache is None:
                        self._short = seq
                    else:
                        self._blocked = found
                    break
                waiting.popleft()
                running[seq.request.id] = seq
                free -= blocks - shared
                room -= 1
                budget -= chunk
                seq.computed = computed
                if seq.host is not None:
                    seq.host.release(seq)
                    self.restored_tokens += computed - cached
                if cache is not None:
                    self._capacity += shared
                    cache.admit(seq, found)
                    cache.fit(free)
                if seq.generated and computed + 1 == context:
                    decodes.join(seq)
                    self._resumed.append(seq)
                    if cache is not None:
                        cache.join(seq)
                else:
                    chunks.append((seq, after))
                if cache is not None:
                    cache.write(seq, after)
        if not (chunks or preempted or self._resumed):
            return False

        count = decodes.count
        kv_tokens = decodes.kv_tokens + count
        if self._skipped:
            for seq in self._skipped:
                count -= 1
                kv_tokens -= decodes.steps - seq.offset + 1
        if not (count or chunks):
            # All that could run were preempted or skipped: an empty step, which takes no time.
            self._skipped.clear()
            return self._mix()
        tokens, pairs = count, 0
        for seq, after in chunks:
            # A chunk's i-th token attends to all before it and itself.
            before = seq.computed
            chunk = after - before
            tokens += chunk
            pairs += chunk * (before + after + 1) // 2
        self.tokens = tokens
        self.pairs = pairs
        self.seqs = count + len(chunks)
        self.kv_tokens = kv_tokens
        return True

    def _goes_on(self) -> bool:
        """Whether the iteration composed last, which preempted, decodes alone, and the next one does too."""
        if self._chunks or self._resumed or self._skipped or self.cache is not None:
            return False
        decodes, seq = self.decodes, self.waiting[0]
        tokens = seq.context
        if not self._whole_prompt:
            tokens = min(tokens, seq.host_tokens + self.max_num_batched_tokens - decodes.count)
        free = self._capacity - decodes.blocks - decodes.blocks_for(2)
        return -(-tokens // self.block_size) + self._watermark > free

    def _preempt_last(self, free: int, partial_blocks: int) -> int:
        """Preempt the latest admitted until the others have the blocks that they need.

        ``free`` is negative: the blocks missing. Returns the chunk that is left of the partial prefill:
        none, as it was the latest.
        """
        decodes = self.decodes
        while free < 0:
            seq = self.running.popitem()[1]
            if seq is self._partial:
                self._partial = None
                free += partial_blocks
            else:
                decodes.leave(seq)
                free += seq.computed // self.block_size + 1
            self._requeue(seq)
        return 0

    def _preempt_in_turn(self) -> int:
        """Go through the running in order and preempt the lowest-ranked when one lacks blocks.

        One that finds itself the lowest ends the round: those behind it are skipped in this iteration.
        Returns the chunk that the partial prefill gets.
        """
        decodes, size, cache = self.decodes, self.block_size, self.cache
        order = list(self.running.values())
        computed = {
            seq: seq.computed if seq is self._partial else decodes.steps - seq.offset for seq in order
        }
        held = {seq: -(-tokens // size) for seq, tokens in computed.items()}
        given: dict[SimRequest, int] = {}
        """Tokens in this iteration of those that are through."""
        free = self._capacity - sum(held.values())
        budget = self.max_num_batched_tokens
        turn = 0
        while turn < len(order):
            seq = order[turn]
            tokens = min(seq.context - seq.computed, budget) if seq is self._partial else 1
            needed = -(-(computed[seq] + tokens) // size) - held[seq]
            victim = None
            while needed > free and victim is not seq:
                victim = max(order, key=priority) if self._by_priority else order[-1]
                turn -= victim in given
                order.remove(victim)
                del held[victim]
                budget += given.pop(victim, 0)
                self.stop(victim)
                free = self._capacity - sum(held.values())
                self._requeue(victim)
            if victim is seq:
                break
            held[seq] += needed
            free -= needed
            given[seq] = tokens
            budget -= tokens
            turn += 1
            if cache is not None:
                cache.fit(free)
                if seq is not self._partial:
                    cache.write(seq, computed[seq] + 1)
        self._skipped = [seq for seq in order[turn:] if seq is not self._partial]
        return given.get(self._partial, 0) if self._partial is not None else 0

    def _requeue(self, seq: SimRequest) -> None:
        seq.computed = 0
        seq.context = seq.request.prompt_tokens + seq.generated
        self.waiting.appendleft(seq)
        self.preemptions += 1
