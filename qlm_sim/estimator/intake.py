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
from enum import IntEnum
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
SPEED_SPREAD = 0.005
"""Relative uncertainty of an engine's speed that no observation removes."""
FULLNESS_SPREAD = (0.02, 0.05, 0.02)
"""By ``Bound``: relative error of the model's word on what a full engine decodes."""
FOLLOWED_SHARE = 1.25
"""So many times as many as wait are followed."""
_MOST_INTERVALS = HORIZON_LENGTHS * INTERVALS_PER_LENGTH
_PROMPT_STRATA = 16
_TAIL_POINTS = 64
PRIOR_RESIDUALS = 4.0
"""What the model says of a steady engine counts as if it had been seen for so many mean residual lengths."""


class Bound(IntEnum):
    """What limits the intake of an engine that is kept full."""

    SLOTS = 0
    MEMORY = 1
    COMPUTE = 2


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
    unknown: float
    """Relative uncertainty of what is expected: of lengths, of how full the engine is, of its speed."""
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
    request_s: float
    """Seconds of a steady engine that one of the others takes, on average; 0 where there are none."""


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
        unknown=SPEED_SPREAD,
        place=np.zeros(1),
        needed=np.zeros(1),
        step_s=engine.step_s(burst.sequences, burst.kv_tokens),
        sequences=burst.sequences,
        prompt_s=0.0,
        request_s=0.0,
    )


class _Fluid:
    """Interval by interval, what departures let in."""

    def __init__(self, engine: Engine, burst: Burst, line: Line) -> None:
        self._engine = engine
        self._burst = burst
        self._line = line
        self._batch = burst.batch()
        self._wanted = FOLLOWED_SHARE * line.requests + 4 * sqrt(line.requests) + 1
        """Places to be followed: more than there are, for those who come next and their quantiles."""
        kinds = len(engine.lengths)
        self._share = np.bincount(line.kind, line.count, kinds) / line.requests
        mean, second, third, fourth = self._share @ np.array([each.moments for each in engine.lengths])
        self._moments = (float(mean), float(second), float(third), float(fourth))
        self._residual = float(second / (2 * mean))
        self._prompts = _strata(line.prefill, line.count)
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
        bound = {Bound.SLOTS: 0, Bound.MEMORY: 0, Bound.COMPUTE: 0}
        """How often each was what limited the intake."""
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
            least, limit = min((by_slots, Bound.SLOTS), (room, Bound.MEMORY), (computed, Bound.COMPUTE))
            bound[limit] += 1
            before, place = place, max(place, least)
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
            given = max(0.0, place - max(before, line.sent))
            step_s += engine.slowness * profile.intake_s * given / interval
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
        most = max(bound, key=lambda each: bound[each])
        return self._intake(places, steps, reached, seconds, overdrawn, n, held, most)

    def _intake(
        self,
        places: Places,
        steps: Floats,
        reached: list[float],
        seconds: list[float],
        overdrawn: list[float],
        n: float,
        kv_tokens: float,
        bound: Bound,
    ) -> Intake:
        """What the fluid came to, carried on to all that wait."""
        line, engine = self._line, self._engine
        count = len(reached)
        soon, late = self._dispersions(bound)
        ends = np.concatenate(([0.0], np.cumsum(line.count), [self._wanted]))
        modelled_s, expected_s, decoding, trust = self._steady_s(n, kv_tokens, bound)
        # Prefills take what they take: only the share of decoding is uncertain.
        soon, late = decoding**2 * soon, decoding**2 * late
        dispersion = late + (soon - late) * np.exp(-steps[:count] / self._residual)
        fullness = FULLNESS_SPREAD[bound] * decoding * sqrt(1 - trust)
        unknown = sqrt(late / engine.observations + fullness**2 + SPEED_SPREAD**2)
        # What an engine gets done is seen when it is steady; it is believed to be as much off before.
        times = float(line.count @ expected_s) / float(line.count @ modelled_s)
        seconds = [seconds[0] + times * (each - seconds[0]) for each in seconds]
        if reached[-1] < self._wanted:
            total = np.concatenate(([0.0], np.cumsum(line.count * expected_s)))
            total = np.append(total, total[-1] * self._wanted / line.requests)
            far = np.linspace(reached[-1], self._wanted, _TAIL_POINTS + 1)[1:]
            at_end = np.interp(reached[-1], ends, total)
            seconds = seconds + (seconds[-1] + np.interp(far, ends, total) - at_end).tolist()
            reached = reached + far.tolist()
            overdrawn = overdrawn + [overdrawn[-1]] * len(far)
            dispersion = np.append(dispersion, np.full(len(far), late))
        freed, needed = np.array(reached), ends
        if bound is Bound.MEMORY:
            freed = places.contexts(freed) / self._size - np.array(overdrawn)
            needed = places.contexts(ends) / self._size
        prompts = self._prompts.tolist()
        return Intake(
            at_once_s=np.array(self._burst.first_token_s),
            freed=np.maximum.accumulate(freed),
            seconds=np.array(seconds),
            dispersion=dispersion,
            unknown=unknown,
            place=ends,
            needed=needed,
            step_s=engine.step_s(n, kv_tokens),
            sequences=n,
            prompt_s=engine.slowness * sum(prefill_s(engine.profile, p, n) for p in prompts) / len(prompts),
            request_s=line.mean(expected_s),
        )

    def _overdrawn(self, sequences: float, kv_tokens: float, brought: float) -> float:
        """Requests of mean size that would have to leave before there is room in memory; at least 0."""
        profile, rule = self._engine.profile, self._engine.rule
        held = brought + rule.growth_tokens(sequences, kv_tokens - brought)
        return max(0.0, float(held - profile.kv_capacity_tokens) / self._size)

    def _steady_s(self, n: float, kv_tokens: float, bound: Bound) -> tuple[Floats, Floats, float, float]:
        """Seconds of a steady engine per request of each entry, by the model and as expected; the share of
        decoding in them; and the weight of what was observed.

        Each takes its share of slots or memory for its length, and its prefill. How fast a full engine
        goes through the former is expected to be as it was observed, the more so the more was observed.
        """
        line, engine = self._line, self._engine
        profile, rule = engine.profile, engine.rule
        moments = np.array([each.moments for each in engine.lengths])
        mean, second = moments[line.kind, 0], moments[line.kind, 1]
        step_s = engine.step_s(n, kv_tokens)
        prefills_s = engine.slowness * self._prefills_s(n)
        waste = rule.waste_tokens
        if bound is Bound.MEMORY:
            # The first token comes of the prefill.
            taken = (line.context + waste) * (mean - 1) + (second - mean) / 2
            # While the first in line does not fit, about half of what it needs lies idle.
            idle = line.mean(line.context**2) / (2 * self._size)
            level = profile.kv_capacity_tokens - rule.most_tokens + self._excess - idle
            per_taken_s = step_s / max(self._size, level)
        elif bound is Bound.SLOTS:
            taken = mean - 1
            per_taken_s = step_s / profile.max_num_seqs
        else:
            taken = line.prefill
            per_taken_s = step_s / max(1.0, profile.max_num_batched_tokens - n)
        modelled_s = taken * per_taken_s + prefills_s
        decoding = 1 - float(line.count @ prefills_s) / float(line.count @ modelled_s)
        pace = engine.pace
        if pace is None or pace.steps <= 0:
            return modelled_s, modelled_s, decoding, 0.0
        shared = pace.prefill_s / pace.alone_s if pace.alone_s else 1.0
        if bound is Bound.MEMORY:
            observed_s = taken * pace.decode_s / (pace.kv_steps + waste * pace.sequence_steps)
        elif bound is Bound.SLOTS:
            observed_s = taken * pace.decode_s / pace.sequence_steps
        else:
            observed_s = prefills_s * pace.decode_s / max(pace.alone_s, 1e-9) / engine.slowness
        observed_s = engine.slowness * observed_s + shared * prefills_s
        trust = pace.steps / (pace.steps + PRIOR_RESIDUALS * self._residual)
        return modelled_s, modelled_s + trust * (observed_s - modelled_s), decoding, trust

    def _prefills_s(self, beside: float) -> Floats:
        """Seconds that each entry adds to iterations which decode ``beside`` sequences: its prompt and, if it
        is still to be sent, its coming."""
        profile, tokens = self._engine.profile, self._line.prefill
        pair_s = profile.step.prefill_pair_s / 2
        # But for its pairs about straight between these; the longest prompts are far above the last mean.
        spread = np.geomspace(tokens.min(), tokens.max(), _PROMPT_STRATA)
        at = np.unique(np.concatenate((self._prompts, spread)))
        straight_s = [prefill_s(profile, each, beside) - pair_s * each * each for each in at.tolist()]
        seconds: Floats = np.interp(tokens, at, straight_s) + pair_s * tokens**2
        seconds[self._line.sent :] += profile.intake_s
        return seconds

    def _dispersions(self, bound: Bound) -> tuple[float, float]:
        """Variance over mean of the number taken in: soon, and in the long run.

        What departs soon departs like a Poisson process: one place each in slots; in KV memory it frees
        p + O, and requests of p get what is left after the growth of the others, which makes waves
        (``room_rule``). In the long run the count is that of a renewal process, whose dispersion is the
        squared coefficient of variation of what one request takes: its length O in slots, p·O + O²/2
        token steps of KV memory, of which p is known.
        """
        mean, second, third, fourth = self._moments
        if bound is not Bound.MEMORY:
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
            together = prompts * float(self._prompts.mean())
            return prompts * float(np.mean([prefill_s(profile, p, beside, together) for p in self._prompts]))
        together_s = self._together_s.get(int(beside) // 8)
        if together_s is None:
            # Prompts of one iteration share its base time, but each is attended to alone.
            sums = np.zeros(len(self._prompts))
            pairs_s = profile.step.prefill_pair_s * self._prompts**2 / 2
            together_s = []
            for together in range(1, MOST_TOGETHER + 1):
                sums = sums + np.roll(self._prompts, 5 * (together - 1) ** 2)
                sum_s = [
                    prefill_s(profile, tokens, beside) - profile.step.prefill_pair_s * tokens * tokens / 2
                    for tokens in sums.tolist()
                ]
                together_s.append(float(np.mean(sum_s)) + together * float(pairs_s.mean()))
            self._together_s[int(beside) // 8] = together_s
        chance = exp(-prompts)
        seconds = 0.0
        for together, each in enumerate(together_s, 1):
            chance *= prompts / together
            seconds += chance * each
        return seconds


def _strata(tokens: Floats, count: Floats) -> Floats:
    """Means of equally many prompts each, by length, in an order in which neighbours are unlike.

    ``count``: prompts of each length.
    """
    order = np.argsort(tokens, kind="stable")
    prompts = np.concatenate(([0.0], np.cumsum(count[order])))
    total = np.concatenate(([0.0], np.cumsum((count * tokens)[order])))
    edges = np.linspace(0.0, prompts[-1], min(_PROMPT_STRATA, len(tokens)) + 1)
    means = np.diff(np.interp(edges, prompts, total)) / np.diff(edges)
    return means[np.argsort(np.arange(len(means)) * 7 % len(means), kind="stable")]
