"""When an engine takes in the requests that wait for it: a fluid model of its batch, in expectation.

What finds room starts at once (``burst``). Then each waits until enough of the batch has ended: those
running now survive by their length distributions, given what they have generated so far, and those that
take their places by the same from their start. Sequence slots, KV tokens and the token budget of prefills
each limit the intake. A request enters bit by bit as room for it comes free, and is in when all of it is;
until then its part stands for the room that lies idle. Behind the horizon, a few mean lengths away, each
request takes its share of the engine: the paper's W = Σ O_i / Θ.

Draws nothing at random and knows no true length.
"""

from dataclasses import dataclass
from math import exp, sqrt

import numpy as np

from qlm_sim.estimator.burst import Burst
from qlm_sim.estimator.engine import Batch, Engine, Line, Places
from qlm_sim.estimator.lengths import Floats
from qlm_sim.estimator.steps import prefill_s

INTERVALS_PER_LENGTH = 16
"""Resolution: intervals per mean residual length."""
HORIZON_LENGTHS = 5
"""The fluid runs for so many mean residual lengths."""
MOST_TOGETHER = 10
"""Prompts in one iteration, beyond which they are priced by their sum."""
_MOST_INTERVALS = HORIZON_LENGTHS * INTERVALS_PER_LENGTH
_PROMPT_STRATA = 16
_TAIL_POINTS = 64
_SETTLED = 0.25
"""Share of the fluid's intake after which it is taken to be steady."""


@dataclass(frozen=True, slots=True)
class Intake:
    """When places in the line are reached, in expectation."""

    at_once_s: Floats
    """Seconds to the first token of each that starts without waiting for a departure."""
    freed: Floats
    """Room that has come free for the others, in requests of mean size; negative while it is overdrawn."""
    seconds: Floats
    """By when it has; ascending both."""
    dispersion: Floats
    """Variance of ``freed`` over its mean, at the same points."""
    place: Floats
    """So many of the others are in ..."""
    needed: Floats
    """... once this much room has come free; ascending both."""
    step_s: float
    """Seconds of an iteration that decodes."""
    sequences: float
    """That decode in it."""
    prompt_s: float
    """Seconds that a prompt adds, on average; ``seconds`` includes it for all that are in."""


def intake(engine: Engine, batch: Batch, line: Line) -> Intake:
    """Follow the engine until all of the line are in."""
    burst = Burst(engine, batch, line)
    burst.run()
    rest = line.behind(burst.taken)
    if len(rest) and burst.sequences:
        return _Fluid(engine, burst, rest).run()
    return Intake(
        at_once_s=np.array(burst.first_token_s),
        freed=np.zeros(1),
        seconds=np.array([burst.seconds]),
        dispersion=np.ones(1),
        place=np.zeros(1),
        needed=np.zeros(1),
        step_s=engine.step_s(burst.sequences, burst.kv_tokens),
        sequences=burst.sequences,
        prompt_s=0.0,
    )


class _Fluid:
    """Interval by interval, what departures let in."""

    def __init__(self, engine: Engine, burst: Burst, line: Line) -> None:
        self._engine = engine
        self._burst = burst
        self._line = line
        self._batch = burst.batch()
        self._wanted = line.requests + 3 * sqrt(line.requests) + 1
        """Places to be followed: more than there are, for the quantiles of the last."""
        kinds = len(engine.lengths)
        self._share = np.bincount(line.kind, line.count, kinds) / line.requests
        mean, second, third, fourth = self._share @ np.array([each.moments for each in engine.lengths])
        self._moments = (float(mean), float(second), float(third), float(fourth))
        self._residual = float(second / (2 * mean))
        self._prompts = _strata(line.prefill)
        self._together_s: dict[int, list[float]] = {}
        size, squared = line.mean(line.context), line.mean(line.context**2)
        self._size = size
        exceeds = (squared + 2 * size * float(mean) + float(second)) / (2 * size)
        # Less than of a walk with independent steps: departures are as regular as lengths are.
        regular = min(1.0, float(second / mean**2) / 2)
        self._excess = regular * exceeds * (1 - exp(-engine.rule.most_tokens / exceeds))
        """KV tokens by which the batch exceeds on average what it is filled up to (``room_rule``) ..."""
        self._settling = float(mean) * 2 * exceeds / (size * len(self._batch))
        """... after so many steps."""

    def run(self) -> Intake:
        engine, burst, line = self._engine, self._burst, self._line
        profile, rule = engine.profile, engine.rule
        mean = self._moments[0]
        # A departure at the end of the iteration under way has a whole step behind it.
        start_s = burst.seconds - engine.step_s(burst.sequences, burst.kv_tokens)
        interval = min(
            self._residual / INTERVALS_PER_LENGTH, max(0.5, self._wanted * mean / len(self._batch) / 6)
        )
        steps = interval * np.arange(_MOST_INTERVALS + 1, dtype=float)
        sequences, kv_tokens, brought = self._batch.survivors(steps, engine.lengths)
        # Those taken in during an interval were so in its middle.
        lag = steps[:-1] + interval / 2
        alive = np.exp(np.stack([each.log_survival(lag) for each in engine.lengths]))
        first_alive = float(self._share @ alive[:, 0])
        places = Places(line, len(engine.lengths))

        peak, waste = rule.peak_tokens, rule.waste_tokens
        place = 0.0
        opened_at = 0.0
        """Steps after which the first request found room."""
        reached, seconds = [0.0], [start_s]
        overdrawn = [self._overdrawn(sequences[0], kv_tokens[0], brought[0])]
        """Mean requests that memory lacks room for, or what it holds in excess."""
        by_memory = 0
        for b in range(1, _MOST_INTERVALS + 1):
            n, held = float(sequences[b]), float(kv_tokens[b])
            excess = self._excess * (1 - exp((opened_at - steps[b]) / self._settling))
            free = profile.kv_capacity_tokens + excess - n * waste - rule.reserve_tokens(n)
            by_slots = place + (profile.max_num_seqs - n) / first_alive
            room = min(
                places.with_context(place, free - held, waste),
                places.with_context(place, free - float(brought[b]) - n * peak, waste + peak),
            )
            computed = places.with_prefill(place, interval * max(1.0, profile.max_num_batched_tokens - n))
            by_memory += room < by_slots
            before, place = place, max(place, min(by_slots, room, computed))
            if place > before:
                entered, bring = places.between(before, place)
                rest = _MOST_INTERVALS + 1 - b
                living, kept = entered @ alive[:, :rest], bring @ alive[:, :rest]
                sequences[b:] += living
                brought[b:] += kept
                kv_tokens[b:] += kept + living * lag[:rest]
            n = float(sequences[b - 1] + sequences[b]) / 2
            step_s = engine.step_s(n, float(kv_tokens[b - 1] + kv_tokens[b]) / 2)
            step_s += engine.slowness * self._prefill_step_s(n, (place - before) / interval)
            seconds.append(seconds[-1] + step_s * interval)
            reached.append(place)
            if place > 0:
                # The excess lets more in on average, but nobody sooner on average.
                overdrawn.append(excess / self._size)
            else:
                opened_at = float(steps[b])
                overdrawn.append(self._overdrawn(n, held, float(brought[b])))
            if place >= self._wanted:
                break
        return self._intake(places, steps, reached, seconds, overdrawn, n, held, 2 * by_memory > len(reached))

    def _intake(
        self,
        places: Places,
        steps: Floats,
        reached: list[float],
        seconds: list[float],
        overdrawn: list[float],
        n: float,
        kv_tokens: float,
        memory_bound: bool,
    ) -> Intake:
        """What the fluid came to, carried on to all that wait."""
        line, engine = self._line, self._engine
        count = len(reached)
        soon, late = self._dispersions(memory_bound)
        dispersion = late + (soon - late) * np.exp(-steps[:count] / self._residual)
        if reached[-1] < self._wanted:
            step_s = (seconds[-1] - seconds[0]) / float(steps[count - 1])
            far, far_s = self._behind_horizon(reached, seconds, step_s, n, memory_bound)
            reached, seconds = reached + far, seconds + far_s
            overdrawn = overdrawn + [overdrawn[-1]] * len(far)
            dispersion = np.append(dispersion, np.full(len(far), late))
        ends = np.concatenate(([0.0], np.cumsum(line.count), [self._wanted]))
        freed, needed = np.array(reached), ends
        if memory_bound:
            freed = places.contexts(freed) / self._size - np.array(overdrawn)
            needed = places.contexts(ends) / self._size
        prompts = self._prompts.tolist()
        return Intake(
            at_once_s=np.array(self._burst.first_token_s),
            freed=np.maximum.accumulate(freed),
            seconds=np.array(seconds),
            dispersion=dispersion,
            place=ends,
            needed=needed,
            step_s=engine.step_s(n, kv_tokens),
            sequences=n,
            prompt_s=engine.slowness * sum(prefill_s(engine.profile, p, n) for p in prompts) / len(prompts),
        )

    def _overdrawn(self, sequences: float, kv_tokens: float, brought: float) -> float:
        """Requests of mean size that would have to leave before there is room in memory; at least 0."""
        profile, rule = self._engine.profile, self._engine.rule
        held = brought + rule.growth_tokens(sequences, kv_tokens - brought)
        return max(0.0, float(held - profile.kv_capacity_tokens) / self._size)

    def _behind_horizon(
        self,
        reached: list[float],
        seconds: list[float],
        step_s: float,
        n: float,
        memory_bound: bool,
    ) -> tuple[list[float], list[float]]:
        """Places and seconds from the end of the fluid on.

        Each request takes its share of slots or memory for its mean length. The fluid's own intake, once
        settled, says how many seconds such a share takes.
        """
        line, profile = self._line, self._engine.profile
        moments = np.array([each.moments for each in self._engine.lengths])
        mean, second = moments[line.kind, 0], moments[line.kind, 1]
        if memory_bound:
            capacity = profile.kv_capacity_tokens - self._engine.rule.most_tokens + self._excess
            waste = self._engine.rule.waste_tokens
            share = ((line.context + waste) * mean + second / 2) / capacity
        else:
            share = mean / profile.max_num_seqs
        one_s = np.array([prefill_s(profile, tokens, n) for tokens in np.sort(self._prompts).tolist()])
        work_s = share * step_s + np.interp(line.prefill, np.sort(self._prompts), one_s)
        ends = np.concatenate(([0.0], np.cumsum(line.count), [1e9]))
        total = np.concatenate(([0.0], np.cumsum(line.count * work_s)))
        total = np.append(total, total[-1] + (1e9 - ends[-2]) * total[-1] / ends[-2])
        settled = _SETTLED * reached[-1]
        from_s = float(np.interp(settled, reached, seconds))
        at_settled, at_end = np.interp((settled, reached[-1]), ends, total)
        pace = (seconds[-1] - from_s) / float(at_end - at_settled) if at_end > at_settled else 1.0
        far = np.linspace(reached[-1], self._wanted, _TAIL_POINTS + 1)[1:]
        return far.tolist(), (seconds[-1] + pace * (np.interp(far, ends, total) - at_end)).tolist()

    def _dispersions(self, memory_bound: bool) -> tuple[float, float]:
        """Variance over mean of the number taken in: soon, and in the long run.

        What departs soon departs like a Poisson process: one place each in slots; in KV memory it frees
        p + O, and requests of p get what is left after the growth of the others, which makes waves
        (``room_rule``). In the long run the count is that of a renewal process, whose dispersion is the
        squared coefficient of variation of what one request takes: its length O in slots, p·O + O²/2
        token steps of KV memory, of which p is known.
        """
        mean, second, third, fourth = self._moments
        if not memory_bound:
            return 1.0, second / mean**2 - 1
        p, p_squared = self._line.mean(self._line.context), self._line.mean(self._line.context**2)
        taken = p * mean + second / 2
        variance = p_squared * (second - mean**2) + p * (third - mean * second) + (fourth - second**2) / 4
        return (p_squared + 2 * p * mean + second) / p**2, variance / taken**2

    def _prefill_step_s(self, beside: float, prompts: float) -> float:
        """Seconds that ``prompts`` prompts per step, a Poisson number in each, add to a step."""
        if prompts <= 0:
            return 0.0
        profile = self._engine.profile
        if prompts > MOST_TOGETHER / 2:
            return prefill_s(profile, prompts * float(self._prompts.mean()), beside)
        together_s = self._together_s.get(int(beside) // 8)
        if together_s is None:
            # Prompts of one iteration share its base time: D(x1 + ... + xj) is not the sum of D(xi).
            sums = np.zeros(len(self._prompts))
            together_s = []
            for together in range(MOST_TOGETHER):
                sums = sums + np.roll(self._prompts, 5 * together * together)
                each_s = [prefill_s(profile, tokens, beside) for tokens in sums.tolist()]
                together_s.append(sum(each_s) / len(each_s))
            self._together_s[int(beside) // 8] = together_s
        chance = exp(-prompts)
        seconds = 0.0
        for together, each in enumerate(together_s, 1):
            chance *= prompts / together
            seconds += chance * each
        return seconds


def _strata(tokens: Floats) -> Floats:
    """Means of equally many prompts each, by length, in an order in which neighbours are unlike."""
    parts = np.array_split(np.sort(tokens), min(_PROMPT_STRATA, len(tokens)))
    means = np.array([part.mean() for part in parts])
    return means[np.argsort(np.arange(len(means)) * 7 % len(means), kind="stable")]
