"""How long a waiting request will wait: the time to its first token, as a distribution.

Takes the paper's equations as the base (Patke et al., SoCC '24, section 5): the wait is the output
tokens ahead over the engine's token throughput, and about normal by the central limit theorem. Goes on
where they are weak: what runs now is counted by its own residual lengths, what finds room starts at
once, the wait for k departures is a gamma in k (one departure is not normal), those who are still to come
and go first are added (``overtaking``), and what is not yet known of lengths and speeds widens it.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from math import sqrt

import numpy as np

from qlm_sim.core.forecast import Forecast, Wait
from qlm_sim.core.groups import GroupKey, RequestGroup
from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lifecycle import RUNNING, WAITING, Tracked
from qlm_sim.core.policy import Order, Overtaking, Standing
from qlm_sim.core.types import ModelOnInstance
from qlm_sim.estimator.engine import Batch, Engine, Line
from qlm_sim.estimator.intake import Intake, intake
from qlm_sim.estimator.lengths import LengthKind, kind_of
from qlm_sim.estimator.line import LineForecast, Never, Visit
from qlm_sim.estimator.overtaking import Overtaken, Passing, passes_for_s
from qlm_sim.estimator.service import ServiceEstimator
from qlm_sim.estimator.steps import restores

SINGLE_ENTRIES = 512
"""So many requests at the head of a line are seen one by one, those behind them by samples of each group."""
SAMPLES = 768
"""So many of those behind stand for all of them, at least one of each group."""
STALE_SHARE = 0.02
"""A forecast is made anew once this share of the asked wait has passed since."""
MOST_VISITS = 32
"""Visits of models that are followed one by one."""
MOST_ENGINES = 8
"""Of the instances that serve one line, so many are forecast; they stand for all."""
MOST_REACH = 2**62
LONGEST_S = 1e7
"""Longest wait in a shared line."""


class WaitEstimator:
    """Forecasts waits from the ledgers, the lines and what ``ServiceEstimator`` has learnt.

    Implements core's Forecaster. A forecast of a line is kept for a small share of the waits asked for.
    """

    def __init__(
        self,
        service: ServiceEstimator,
        overtaking: Overtaking = Overtaking.NONE,
        *,
        engines_by_deadline: bool = False,
    ) -> None:
        """``overtaking``: the policy's rule. ``engines_by_deadline``: what waits on an engine is served by
        deadline, not in order."""
        self._service = service
        self._overtaking = overtaking
        self._by_deadline = engines_by_deadline
        self.fresh_s = 0.0
        self._lines: dict[str, LineForecast] = {}

    def forecast(
        self,
        item: Tracked,
        standing: Standing | None,
        ledgers: Mapping[str, InstanceLedger],
        order: Order,
        now: float,
    ) -> Forecast:
        """The wait, from ``now``, for the first token of ``item``."""
        model, tokens = item.request.model, float(item.context_tokens)
        if standing is None:
            ledger = ledgers[item.instance]
            ahead = self._sent(ledger).index(item)
            line = self._line(ledger, item, ahead, order, now)
            wait: Wait = line.wait(model, ahead, tokens, now)
            if self._by_deadline:
                wait = self._overtaken(wait, line, ledger, item, ahead, ledgers, now)
            return self._told(item, ahead, wait, now)
        serving = [ledgers[name] for name in standing.instances]
        if not serving:
            return Forecast(now, standing.ahead, Never(), item.deadline)
        before = [self._sent_before(ledger, item) for ledger in serving]
        position = standing.ahead + sum(before)
        if len(serving) == 1:
            ledger = serving[0]
            line = self._line(ledger, item, position, order, now)
            wait = line.wait(model, position, tokens, now)
            wait = self._overtaken(wait, line, ledger, item, position, ledgers, now)
        else:
            wait = self._shared(serving, before, standing.ahead, item, ledgers, order, now)
        return self._told(item, position, wait, now)

    def _overtaken(
        self,
        wait: Wait,
        line: LineForecast,
        ledger: InstanceLedger,
        item: Tracked,
        ahead: float,
        ledgers: Mapping[str, InstanceLedger],
        now: float,
    ) -> Wait:
        """``wait`` with those who are still to come and pass ``item``, of whom ``ledger`` takes its share."""
        service, arrivals = self._service, self._service.arrivals
        pace = 0.0
        if arrivals is not None and self._overtaking is not Overtaking.NONE:
            pace = line.pace(item.request.model, ahead, now)
        if not pace:
            return wait
        assert arrivals is not None
        passing = []
        for coming in arrivals.coming(now):
            for_s = min(coming.for_s, passes_for_s(self._overtaking, item, coming.slo_s, now))
            model = coming.model
            if not (for_s and line.serves(model)):
                continue
            others = sum(other.next_model() == model for other in ledgers.values() if other is not ledger)
            each = service.request(ledger, model, coming.prompt_tokens)
            each_s = pace * (each.prefill_s + each.decode_s)
            lengths = service.lengths.of_model(model)
            each_var = lengths.variance * (pace * each.decode_s / lengths.mean) ** 2
            per_s = coming.per_s / (1 + others)
            load = per_s * each_s
            passing.append(Passing(load, per_s * (each_s**2 + each_var), load / sqrt(coming.seen), for_s))
        passing.sort(key=lambda each: each.for_s)
        return Overtaken(wait, passing) if passing else wait

    def _told(self, item: Tracked, position: int, wait: Wait, now: float) -> Forecast:
        """The forecast as the record of earlier ones corrects it."""
        keep = item.state is not WAITING or item.group is not None
        wait = self._service.record.corrected(item, position, wait, now, keep=keep)
        return Forecast(now, position, wait, item.deadline)

    def _shared(
        self,
        serving: Sequence[InstanceLedger],
        before: Sequence[int],
        ahead: int,
        item: Tracked,
        ledgers: Mapping[str, InstanceLedger],
        order: Order,
        now: float,
    ) -> Wait:
        """The wait in a line whose next request goes to whichever instance has room first."""
        # Of many instances some stand for all: those with most room, then others, so that each has its part.
        ranked = sorted(range(len(serving)), key=lambda i: (before[i], len(serving[i].running), i))
        chosen = ranked[:: max(1, len(ranked) // MOST_ENGINES)][:MOST_ENGINES]
        weight = len(serving) / len(chosen)
        lines = [
            self._line(serving[i], item, before[i] + int(ahead / len(serving)), order, now) for i in chosen
        ]
        elapsed = [now - line.made_at for line in lines]
        done = [line.admitted(past) for line, past in zip(lines, elapsed, strict=True)]

        def taken(seconds: float) -> list[float]:
            """Of the line, what each has taken after so many seconds: all that it has less its own."""
            return [
                max(0.0, line.admitted(past + seconds) - gone - before[i])
                for line, past, gone, i in zip(lines, elapsed, done, chosen, strict=True)
            ]

        low, high = 0.0, 1.0
        while weight * sum(taken(high)) < ahead and high < LONGEST_S:
            low, high = high, 2 * high
        for _ in range(30):
            middle = (low + high) / 2
            if weight * sum(taken(middle)) < ahead:
                low = middle
            else:
                high = middle
        parts = [share + before[i] for share, i in zip(taken(high), chosen, strict=True)]
        waits = [
            line.wait(item.request.model, part, float(item.context_tokens), now, max(1.0, ahead / (part + 1)))
            for line, part in zip(lines, parts, strict=True)
        ]
        first = min(range(len(waits)), key=lambda at: waits[at].mean_s)
        ledger = serving[chosen[first]]
        return self._overtaken(waits[first], lines[first], ledger, item, parts[first], ledgers, now)

    def _line(
        self, ledger: InstanceLedger, item: Tracked, ahead: int, order: Order, now: float
    ) -> LineForecast:
        """The forecast of the line of ``ledger``, with ``item`` in it, so many requests being before."""
        model = item.request.model
        line = self._lines.get(ledger.id)
        if line is not None and line.tells_of(model, ahead):
            mean_s = line.wait(model, ahead, float(item.context_tokens), now).mean_s
            if now - line.made_at <= max(self.fresh_s, STALE_SHARE * min(mean_s, line.span_s)):
                return line
        groups = order(ledger, now)
        if groups or self._sent(ledger):
            line = self._lines[ledger.id] = self.line(ledger, groups, now)
            if line.tells_of(model, ahead):
                return line
        # It is not of the line, nor is any of its model: a visit of its own.
        own = RequestGroup(-1, GroupKey(model, item.request.slo_class, band=0), 1)
        own.items.append(item)
        own.context_tokens = item.context_tokens
        position, counted = 0, self._sent_before(ledger, item)
        while position < len(groups) and counted < ahead:
            counted += len(groups[position])
            position += 1
        return self.line(ledger, [*groups[:position], own, *groups[position:]], now)

    def _sent(self, ledger: InstanceLedger) -> list[Tracked]:
        """What the engine has without having given a first token, in the order in which it will."""
        if not ledger.prefilling_tokens or ledger.next_model() != ledger.model:
            return []
        sent = [
            item for item in ledger.running.values() if item.first_token_at is None and item.state is RUNNING
        ]
        if self._by_deadline:
            sent.sort(key=lambda item: item.deadline)
        return sent

    def _sent_before(self, ledger: InstanceLedger, item: Tracked) -> int:
        """Of those, how many will be served before ``item``, which is not among them."""
        sent = self._sent(ledger)
        if self._by_deadline:
            return sum(other.deadline <= item.deadline for other in sent)
        return len(sent)

    def line(self, ledger: InstanceLedger, groups: Sequence[RequestGroup], now: float) -> LineForecast:
        """What is expected of the instance, if it serves ``groups`` in that order. Something waits."""
        visits: list[Visit] = []
        first = 0
        start_s = start_sd_s = 0.0
        if ledger.swapping_to is not None:
            start_s = max(0.0, ledger.ready_at - now)
        elif ledger.leaving_for is not None:
            start_s = ledger.swap_s(ledger.leaving_for)
        sent = self._sent(ledger)
        requests = len(sent) + sum(map(len, groups))
        for number, (model, stretch) in enumerate(_stretches(ledger.next_model(), groups)):
            if visits:
                last = visits[-1].wait(first - 1, 1.0, 0.0)
                start_s, start_sd_s = last.mean_s, last.quantile(0.84) - last.quantile(0.5)
                if len(visits) == MOST_VISITS:
                    break
            if number or model != ledger.next_model():
                start_s += ledger.swap_s(model)
                sent = []
            if sent or stretch:
                running = list(ledger.running.values()) if not number and model == ledger.model else []
                result, engine, context_tokens = self._intake(ledger, model, running, sent, stretch, now)
                each = self._service.request(ledger, model, context_tokens)
                request_s = each.prefill_s + each.decode_s
                visits.append(Visit(model, first, start_s, start_sd_s, result, engine, request_s))
                first += len(sent) + sum(map(len, stretch))
        last = visits[-1].wait(first - 1, 1.0, 0.0)
        beyond = first < requests
        return LineForecast(
            made_at=now,
            reach=MOST_REACH if beyond else visits[-1].reach,
            span_s=last.mean_s * requests / first,
            beyond=first if beyond else MOST_REACH,
            _visits=tuple(visits),
        )

    def _intake(
        self,
        ledger: InstanceLedger,
        model: str,
        running: Sequence[Tracked],
        sent: Sequence[Tracked],
        groups: Sequence[RequestGroup],
        now: float,
    ) -> tuple[Intake, Engine, float]:
        """What is expected of a visit, the engine, and the mean tokens that those in line bring along."""
        service = self._service
        profile = ledger.spec.models[model]
        clock = service.clock(ledger)
        kinds: dict[LengthKind, int] = {}
        generated: list[float] = []
        context: list[int] = []
        began: list[float] = []
        batch_kind: list[int] = []
        for item in running:
            entry = clock.decoding.get(item.request.id)
            if entry is not None and item.state is RUNNING:
                generated.append(entry.tokens())
                context.append(entry.brought)
                began.append(entry.began)
                batch_kind.append(kinds.setdefault(entry.kind, len(kinds)))
        line = _line(sent, groups, profile, kinds, now)
        engine = Engine(
            profile,
            service.slowness(ledger, model),
            service.room_rule(model, profile.kv_capacity_tokens),
            [service.lengths.of_kind(kind) for kind in kinds],
            service.lengths.of_model(model).count,
            service.pace(ledger, model),
            clock.iterated_at - now,
            clock.began_at - now,
        )
        batch = Batch(
            np.array(generated),
            np.zeros(len(generated)),
            np.array(context, dtype=float),
            np.array(began),
            np.array(batch_kind, dtype=np.int64),
        )
        return intake(engine, batch, line), engine, line.mean(line.context)


def _line(
    sent: Sequence[Tracked],
    groups: Sequence[RequestGroup],
    profile: ModelOnInstance,
    kinds: dict[LengthKind, int],
    now: float,
) -> Line:
    """The queue as columns. ``kinds`` is added to."""
    context: list[float] = []
    prefill: list[float] = []
    kind: list[int] = []
    count: list[float] = []

    def add(item: Tracked, tokens: float, requests: float) -> None:
        context.append(tokens)
        prefill.append(1.0 if restores(profile, item) else tokens)
        kind.append(kinds.setdefault(kind_of(item.request), len(kinds)))
        count.append(requests)

    for item in sent:
        add(item, item.pulled_context, 1)
    behind = max(1, sum(map(len, groups)) - SINGLE_ENTRIES)
    for group in groups:
        singly = min(len(group), max(0, SINGLE_ENTRIES - len(context)))
        rest, rest_tokens = len(group) - singly, group.context_tokens
        for item in islice(group.items, singly):
            add(item, item.context_tokens, 1)
            rest_tokens -= item.context_tokens
        if rest:
            samples = min(rest, max(1, rest * SAMPLES // behind))
            chosen = [group.items[singly + (2 * i + 1) * rest // (2 * samples)] for i in range(samples)]
            # They stand for all of the rest, and bring as much together.
            times = rest_tokens / rest * samples / sum(item.context_tokens for item in chosen)
            for item in chosen:
                add(item, times * item.context_tokens, rest / samples)
    return Line(
        np.array(context, dtype=float),
        np.array(prefill, dtype=float),
        np.array(kind, dtype=np.int64),
        np.array(count, dtype=float),
        [item.pulled_at - now for item in sent],
    )


def _stretches(model: str | None, groups: Sequence[RequestGroup]) -> Iterator[tuple[str, list[RequestGroup]]]:
    """The groups by visit: (model, groups). The first visit is ``model``'s, perhaps of no groups."""
    stretch: list[RequestGroup] = []
    for group in groups:
        if group.key.model != model:
            if model is not None:
                yield model, stretch
            model, stretch = group.key.model, []
        stretch.append(group)
    if model is not None:
        yield model, stretch
