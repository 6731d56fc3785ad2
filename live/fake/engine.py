"""The fake's engine: vLLM's scheduler and the profile's step times, played in real or scaled time.

All requests of an iteration run together, as in the simulated cluster, whose scheduler this is.
"""

import asyncio
from collections.abc import Sequence
from itertools import count

from live.fake.language import END, generate, words
from qlm_sim.cluster.requests import SimRequest
from qlm_sim.cluster.scheduler import Scheduler
from qlm_sim.core.types import ModelOnInstance, Request
from qlm_sim.models.engine_config import EngineConfig

MOST_BEHIND_S = 0.05
"""An engine that is later than this, because the machine was busy, does not try to make up for it."""


class Generation:
    """One request in the engine: its text is known from the start, and comes out token by token."""

    __slots__ = (
        "_waiter", "emitted", "finish_reason", "out", "seq", "texts", "tokens",
    )  # fmt: skip

    def __init__(self, seq: SimRequest, tokens: list[int], texts: list[str], finish_reason: str) -> None:
        self.seq = seq
        self.tokens = tokens
        self.texts = texts
        """What each token adds to the text."""
        self.finish_reason = finish_reason
        self.emitted = 0
        """Tokens whose iteration is done."""
        self.out = 0
        """Of those, the ones that were taken."""
        self._waiter: asyncio.Future[None] | None = None

    def emit(self) -> None:
        self.emitted += 1
        self.wake()

    def abort(self) -> None:
        self.finish_reason = "abort"
        del self.tokens[self.emitted :]
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def done(self) -> bool:
        return self.emitted >= len(self.tokens)

    async def more(self) -> range:
        """The positions of tokens that are new since the last call; waits for one unless all are out."""
        if self.out == self.emitted and not self.done:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        new = range(self.out, self.emitted)
        self.out = self.emitted
        return new


class FakeEngine:
    """One engine with one model. Start ``run`` as a task."""

    def __init__(
        self,
        model: str,
        profile: ModelOnInstance,
        config: EngineConfig | None = None,
        *,
        time_scale: float = 1.0,
        mean_output_tokens: float = 128.0,
    ) -> None:
        """``time_scale``: real seconds per second of the profile."""
        self.model = model
        self.profile = profile
        self.scheduler = Scheduler(profile, config or EngineConfig())
        self.time_scale = time_scale
        self.mean_output_tokens = mean_output_tokens
        self.sleep_level: int | None = None
        """vLLM's sleep level while it sleeps."""
        self.weights = True
        """Whether it has its weights: at level 2 they must be loaded anew."""
        self.paused = False
        self.frozen = False
        """It hangs: no iteration is done any more, though the server answers (for tests)."""
        self.generated_tokens = 0
        self.finished = 0
        self.aborted = 0
        self._numbers = count()
        self._requests: dict[str, Generation] = {}
        self._aborts: list[Generation] = []
        self._under_way = False
        self._work = asyncio.Event()

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        ignore_end: bool = False,
        stop: Sequence[str] = (),
        priority: float = 0.0,
    ) -> Generation:
        """Take a request in. Raises ValueError where it can never fit."""
        longest = self.scheduler.longest_context
        if len(prompt) >= longest:
            raise ValueError(
                f"This model's maximum context length is {longest} tokens. However, your prompt has "
                f"{len(prompt)} tokens."
            )
        most = min(max_tokens, longest - len(prompt))
        tokens = generate(self.model, prompt, most, self.mean_output_tokens, ignore_end)
        texts = words(tokens)
        reason = "stop" if tokens[-1] == END else "length"
        for stop_string in stop:
            at = "".join(texts).find(stop_string)
            if at >= 0:
                tokens, texts = _cut(tokens, texts, at, at + len(stop_string))
                reason = "stop"
        number = next(self._numbers)
        name = f"{request_id}#{number}"
        request = Request(
            name, self.model, "", priority - number * 1e-9, number * 1e-9, len(prompt), max_tokens
        )
        generation = Generation(SimRequest(request, len(tokens)), tokens, texts, reason)
        self._requests[name] = generation
        self.scheduler.add(generation.seq)
        self._work.set()
        return generation

    def abort(self, generation: Generation) -> None:
        """Drop it: now if it only waits, else when the iteration under way is done."""
        name = generation.seq.request.id
        if name not in self._requests:
            return
        if name in self.scheduler.running and self._under_way:
            self._aborts.append(generation)
        else:
            self._drop(generation)

    def abort_all(self) -> None:
        for generation in list(self._requests.values()):
            self.abort(generation)

    def _drop(self, generation: Generation) -> None:
        name = generation.seq.request.id
        if self._requests.pop(name, None) is None:
            return
        if name in self.scheduler.running:
            self.scheduler.stop(generation.seq)
        else:
            self.scheduler.withdraw(generation.seq)
        self.aborted += 1
        generation.abort()

    @property
    def running(self) -> int:
        return len(self.scheduler.running)

    @property
    def waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def kv_utilization(self) -> float:
        return self.scheduler.used_blocks(0, under_way=False) / self.scheduler.blocks

    async def sleep(self, level: int) -> None:
        """Drop what runs and give the memory free; takes as long as moving the weights out."""
        self.abort_all()
        self.sleep_level = level
        self.weights = level < 2
        await asyncio.sleep(0.1 * self.profile.swap_in_s * self.time_scale)

    async def wake_up(self) -> None:
        seconds = self.profile.swap_in_s if self.sleep_level == 1 else 0.0
        await asyncio.sleep(seconds * self.time_scale)
        self.sleep_level = None
        self.go_on()

    async def reload_weights(self) -> None:
        await asyncio.sleep(self.profile.load_s * self.time_scale)
        self.weights = True

    def go_on(self) -> None:
        """Look again whether there is something to do."""
        self._work.set()

    async def run(self) -> None:
        """Iterate for ever."""
        loop = asyncio.get_running_loop()
        scheduler, profile = self.scheduler, self.profile
        step = profile.step
        due = loop.time()
        while True:
            idle = not (scheduler.running or scheduler.waiting)
            if idle or self.paused or self.frozen or self.sleep_level is not None:
                self._work.clear()
                await self._work.wait()
                due = loop.time()
                continue
            scheduler.schedule(1)
            seconds = (
                step.base_s(scheduler.tokens)
                + step.seq_s * scheduler.seqs
                + step.kv_token_s * scheduler.kv_tokens
                + step.prefill_pair_s * scheduler.pairs
            )
            due = max(due, loop.time() - MOST_BEHIND_S) + seconds * self.time_scale
            self._under_way = True
            # Timers are good to a millisecond: a step that is due sooner is played at once.
            await asyncio.sleep(max(0.0, due - loop.time()))
            while self.frozen:
                self._work.clear()
                await self._work.wait()
            self._under_way = False
            self._complete()

    def _complete(self) -> None:
        scheduler = self.scheduler
        part = scheduler.scheduled()
        scheduler.complete(1)
        partial = scheduler.prefilling
        if partial is not None:
            part.pop(partial.request.id, None)
        requests = self._requests
        for name in part:
            generation = requests[name]
            generation.emit()
            if generation.done:
                del requests[name]
                self.finished += 1
        self.generated_tokens += len(part)
        for generation in self._aborts:
            self._drop(generation)
        self._aborts.clear()


def _cut(tokens: list[int], texts: list[str], at: int, end: int) -> tuple[list[int], list[str]]:
    """Up to the token with which the stop string, at ``at`` to ``end`` of the text, is complete."""
    length, kept = 0, 0
    while length < end:
        length += len(texts[kept])
        kept += 1
    texts = texts[:kept]
    cut = "".join(texts)[:at]
    shown: list[str] = []
    for text in texts:
        shown.append(cut[: len(text)])
        cut = cut[len(text) :]
    return tokens[:kept], shown
