"""What starts at once, iteration by iteration: one prefill behind the other, as long as there is room."""

import numpy as np

from qlm_sim.estimator.engine import Batch, Engine, Line
from qlm_sim.estimator.lengths import Floats


class Burst:
    """The head of a line on its way into an engine. ``run`` once, then read."""

    def __init__(self, engine: Engine, batch: Batch, line: Line) -> None:
        self._engine = engine
        self._batch = batch
        self._line = line
        self.sequences = float(len(batch))
        """That decode; and so on, all in expectation."""
        self._brought = self._held = float(batch.brought.sum())
        self._generated = float((batch.generated - batch.began).sum()) + self.sequences
        means = np.array([each.statistics.mean for each in engine.lengths])
        self._stay = 1.0 - 1.0 / max(1.5, float(means[np.concatenate((batch.kind, line.kind))].mean()))
        """Share of the batch that goes on after an iteration."""
        step_s = engine.step_s(self.sequences, self.kv_tokens) if len(batch) else 0.0
        self.seconds = self._begins_s(step_s)
        self._given = float(sum(sent_s >= max(engine.iterated_s, -step_s) for sent_s in line.sent_s))
        """Requests that the engine was given since its last iteration began: they hold up the next one."""
        self.first_token_s: list[float] = []
        self._started: list[int] = []
        """In which iteration each of them had its first token."""
        self._iterations = 0
        self.taken = 0
        """How many of the line are in."""

    def _begins_s(self, step_s: float) -> float:
        """When the prompts on the engine began to be computed, or those of the line will begin.

        In the iteration after they were sent. Of those that decode alone ends are not seen, unless a request
        leaves: the one under way is half over, on average.
        """
        if not self._line.sent:
            return 0.5 * step_s
        sent_s = self._line.sent_s[0]
        if self._engine.began_s >= sent_s:
            return self._engine.began_s
        if sent_s <= self._engine.iterated_s <= sent_s + step_s:
            return self._engine.iterated_s
        return sent_s + 0.5 * step_s

    @property
    def kv_tokens(self) -> float:
        return self._brought + self._generated

    def run(self) -> None:
        line = self._line
        under_way: list[tuple[int, float]] = []
        """Those in prefill, with the tokens left to compute."""
        while True:
            budget = self._engine.profile.max_num_batched_tokens - self.sequences
            tokens = pairs = 0.0
            done: list[int] = []
            left: list[tuple[int, float]] = []
            position = 0
            while tokens < budget:
                if position == len(under_way):
                    if not self._next_fits():
                        break
                    self._held += float(line.context[self.taken])
                    under_way.append((self.taken, float(line.prefill[self.taken])))
                    self._given += self.taken >= line.sent
                    self.taken += 1
                entry, needed = under_way[position]
                position += 1
                chunk = min(needed, budget - tokens)
                tokens += chunk
                pairs += chunk * (line.prefill[entry] - needed + chunk / 2)
                if chunk < needed:
                    left.append((entry, needed - chunk))
                else:
                    done.append(entry)
            if done or left:
                self._iterate(tokens, pairs, position, done)
            elif self.seconds < 0:
                self.seconds = 0.0
            else:
                self.seconds += self._intake_s()
                return
            under_way = left + under_way[position:]

    def _next_fits(self) -> bool:
        """Whether the next of the line may start beside those that decode and those in prefill."""
        line, engine = self._line, self._engine
        entry = self.taken
        if entry == len(line) or line.count[entry] > 1:
            return False
        if self.seconds < 0 and (entry >= line.sent or line.sent_s[entry] > self.seconds):
            # The iteration had begun when it came.
            return False
        # Without what departs meanwhile: who needs that starts with the next departure, not at once.
        running = len(self._batch) + self.taken
        if running > engine.profile.max_num_seqs - 1:
            return False
        if running == 0:
            return True
        held = self._held + line.context[entry]
        # What was sent has passed the rule; the engine itself asks only for room.
        growth = self._generated if entry < line.sent else engine.rule.growth_tokens(running, self._generated)
        return bool(held + growth <= engine.profile.kv_capacity_tokens)

    def _iterate(self, tokens: float, pairs: float, prefills: int, done: list[int]) -> None:
        engine, line = self._engine, self._line
        step = engine.profile.step
        self.seconds += engine.slowness * (
            step.base_s(round(self.sequences + tokens))
            + step.seq_s * (self.sequences + prefills)
            + step.kv_token_s * self.kv_tokens
            + step.prefill_pair_s * pairs
        )
        self.seconds += self._intake_s()
        if done and self.seconds < 0:
            # It should be over, but has not been seen to be.
            self.seconds = 0.0
        self._iterations += 1
        self.sequences *= self._stay
        self._brought *= self._stay
        self._generated = self._generated * self._stay + self.sequences
        for entry in done:
            self.first_token_s.append(self.seconds)
            self._started.append(self._iterations)
            self.sequences += 1
            self._brought += float(line.context[entry])
            self._generated += 1

    def _intake_s(self) -> float:
        """For so long the engine is held up before its next iteration."""
        given, self._given = self._given, 0.0
        return given * self._engine.slowness * self._engine.profile.intake_s

    def batch(self) -> Batch:
        """What decodes after the burst."""
        before, line, taken = self._batch, self._line, len(self._started)
        ones: Floats = np.ones(taken)
        since = self._iterations - np.array(self._started, dtype=float)
        return Batch(
            generated=np.concatenate((before.generated, ones)),
            since=np.concatenate((before.since + self._iterations, since)),
            brought=np.concatenate((before.brought, line.context[:taken])),
            began=np.concatenate((before.began, ones)),
            kind=np.concatenate((before.kind, line.kind[:taken])),
        )
