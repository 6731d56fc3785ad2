"""How long a waiting request will wait: the time to its first token, as a distribution.

Takes the paper's equations as the base (Patke et al., SoCC '24, section 5): the wait is the output
tokens ahead over the engine's token throughput, and about normal by the central limit theorem. Goes on
where they are weak: what runs now is counted by its own residual lengths, what finds room starts at
once, the wait for k departures is a gamma in k (one departure is not normal), and what is not yet known
of lengths and speeds widens it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import erf, sqrt
from statistics import NormalDist

import numpy as np

from qlm_sim.core.groups import RequestGroup
from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lifecycle import State, Tracked
from qlm_sim.core.types import ModelOnInstance
from qlm_sim.estimator.engine import Batch, Engine, Line
from qlm_sim.estimator.intake import Intake, intake
from qlm_sim.estimator.lengths import LengthKind, kind_of
from qlm_sim.estimator.service import ServiceEstimator
from qlm_sim.estimator.steps import prefill_s, restores

SPEED_SPREAD = 0.01
"""Relative uncertainty of an engine's speed that no observation removes."""
SINGLE_ENTRIES = 1024
"""So many requests at the head of a queue are seen one by one, those behind them by group."""
STALE_SHARE = 0.02
"""A forecast is made anew once this share of the asked wait has passed since."""

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Wait:
    """Seconds until the first token, from when it was asked.

    Gamma in the room that has to come free, by departures, which ``_visit`` turns into time.
    """

    _visit: "_Visit"
    _needed: float
    """Room that must come free ..."""
    _start: float
    """... and has from the start: the difference is a gamma, 0 where nothing needs to depart."""
    _spread: float
    """Its standard deviation over its mean."""
    _own_s: float
    """What does not depend on departures."""
    _own_sd_s: float

    @property
    def mean_s(self) -> float:
        return max(0.0, self._visit.seconds_at(self._needed) + self._own_s)

    def quantile(self, p: float) -> float:
        """The wait that is not exceeded with probability ``p``, 0 < p < 1."""
        z = _NORMAL.inv_cdf(p)
        # Wilson and Hilferty: the cube root of a gamma is about normal.
        ninth = self._spread**2 / 9
        factor = max(0.0, 1 - ninth + z * sqrt(ninth)) ** 3
        freed = self._start + (self._needed - self._start) * factor
        return max(0.0, self._visit.seconds_at(freed) + self._own_s + z * self._own_sd_s)

    def within(self, seconds: float) -> float:
        """P(wait <= ``seconds``)."""
        low, high = -8.0, 8.0
        for _ in range(40):
            z = (low + high) / 2
            if self.quantile(min(max(_NORMAL.cdf(z), 1e-15), 1 - 1e-15)) <= seconds:
                low = z
            else:
                high = z
        return 0.5 + 0.5 * erf(low / sqrt(2))


class _Visit:
    """One model's stretch of a queue on an instance."""

    def __init__(
        self,
        first: int,
        start_s: float,
        start_sd_s: float,
        result: Intake,
        unknown: float,
        engine: Engine,
    ) -> None:
        self.first = first
        """Requests ahead of it on the queue."""
        self.start_s = start_s
        self.start_sd_s = start_sd_s
        self.intake = result
        self.unknown = unknown
        """Relative uncertainty of what is expected."""
        self.engine = engine

    def seconds_at(self, freed: float) -> float:
        """By when so much room has come free for those that do not start at once."""
        return self.start_s + float(np.interp(freed, self.intake.freed, self.intake.seconds))

    def wait(self, ahead: int, prefill_tokens: float, elapsed_s: float) -> Wait:
        result, engine = self.intake, self.engine
        place = ahead - self.first + 1 - len(result.at_once_s)
        start = float(result.freed[0])
        if place <= 0:
            at_s = float(result.at_once_s[place - 1])
            sd_s = sqrt(self.start_sd_s**2 + (self.unknown * at_s) ** 2 + (0.3 * result.step_s) ** 2)
            return Wait(self, start, start, 0.0, at_s - float(result.seconds[0]) - elapsed_s, sd_s)
        needed = max(start, float(np.interp(place, result.place, result.needed)))
        dispersion = float(np.interp(needed, result.freed, result.dispersion))
        spread = sqrt(dispersion / max(needed - start, 1e-6) + self.unknown**2)
        prompt_s = engine.slowness * prefill_s(engine.profile, prefill_tokens, result.sequences)
        own_s = result.step_s + prompt_s - result.prompt_s
        return Wait(self, needed, start, spread, own_s - elapsed_s, self.start_sd_s)

    def admitted(self, seconds: float) -> float:
        """How many of the queue should have been taken in after so many seconds."""
        result = self.intake
        seconds -= self.start_s
        at_once = int(np.searchsorted(result.at_once_s, seconds, side="right"))
        freed = np.interp(seconds, result.seconds, result.freed)
        return self.first + at_once + float(np.interp(freed, result.needed, result.place))


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is expected of one instance's queue."""

    made_at: float
    span_s: float
    """Until the last in the queue has its first token."""
    _visits: tuple[_Visit, ...]

    def admitted(self, seconds: float) -> float:
        """How many of the queue are expected to be on the engine after so many seconds."""
        return self._visits[0].admitted(seconds)

    def wait(self, ahead: int, prefill_tokens: float, now: float) -> Wait:
        """The wait, from ``now``, of a request with so many ahead of it now.

        Those on the engine that have no first token yet are ahead of it too.
        """
        elapsed_s = now - self.made_at
        if elapsed_s > 0:
            ahead += round(self.admitted(elapsed_s))
        visit = next(visit for visit in reversed(self._visits) if visit.first <= ahead)
        return visit.wait(ahead, prefill_tokens, elapsed_s)


class WaitEstimator:
    """Forecasts waits from the ledgers, the queues and what ``ServiceEstimator`` has learnt."""

    def __init__(self, service: ServiceEstimator) -> None:
        self._service = service
        self._forecasts: dict[str, Forecast] = {}

    def wait_of(
        self, item: Tracked, ledger: InstanceLedger, groups: Sequence[RequestGroup], now: float
    ) -> Wait:
        """The wait, from ``now``, for the first token of ``item``.

        It stands in one of ``groups``, the instance's queue in serving order, or is on the engine without
        a first token. A forecast is kept for a small share of the wait that is asked for.
        """
        ahead = _ahead(item, ledger, groups)
        tokens = float(item.context_tokens)
        forecast = self._forecasts.get(ledger.id)
        if forecast is not None:
            wait = forecast.wait(ahead, tokens, now)
            if now - forecast.made_at <= STALE_SHARE * min(wait.mean_s, forecast.span_s):
                return wait
        forecast = self._forecasts[ledger.id] = self.forecast(ledger, groups, now)
        return forecast.wait(ahead, tokens, now)

    def forecast(self, ledger: InstanceLedger, groups: Sequence[RequestGroup], now: float) -> Forecast:
        """What is expected of the instance, if it serves ``groups`` in that order. Something waits."""
        visits: list[_Visit] = []
        first = 0
        start_s = start_sd_s = 0.0
        if ledger.swapping_to is not None:
            start_s = max(0.0, ledger.ready_at - now)
        elif ledger.leaving_for is not None:
            start_s = ledger.swap_s(ledger.leaving_for)
        sent = _sent(ledger) if ledger.next_model == ledger.model else []
        for number, (model, stretch) in enumerate(_stretches(ledger.next_model, groups)):
            if number:
                if visits:
                    last = visits[-1].wait(first - 1, 1.0, 0.0)
                    start_s, start_sd_s = last.mean_s, last.quantile(0.84) - last.quantile(0.5)
                start_s += ledger.swap_s(model)
                sent = []
            if sent or stretch:
                running = list(ledger.running.values()) if not number and model == ledger.model else []
                result, unknown, engine = self._intake(ledger, model, running, sent, stretch)
                visits.append(_Visit(first, start_s, start_sd_s, result, unknown, engine))
                first += len(sent) + sum(len(group) for group in stretch)
        return Forecast(now, visits[-1].wait(first - 1, 1.0, 0.0).mean_s, tuple(visits))

    def _intake(
        self,
        ledger: InstanceLedger,
        model: str,
        running: Sequence[Tracked],
        sent: Sequence[Tracked],
        groups: Sequence[RequestGroup],
    ) -> tuple[Intake, float, Engine]:
        service = self._service
        profile = ledger.spec.models[model]
        clock = service.clock(ledger)
        kinds: dict[LengthKind, int] = {}
        generated: list[float] = []
        context: list[int] = []
        began: list[int] = []
        batch_kind: list[int] = []
        for item in running:
            entry = clock.decoding.get(item.request.id)
            if entry is not None and item.state is State.RUNNING:
                generated.append(entry.tokens)
                context.append(entry.brought)
                began.append(entry.began)
                batch_kind.append(kinds.setdefault(entry.kind, len(kinds)))
        line = _line(sent, groups, profile, kinds)
        engine = Engine(
            profile,
            service.slowness(ledger, model),
            service.room_rule(model, profile.kv_capacity_tokens),
            [service.lengths.of_kind(kind) for kind in kinds],
        )
        batch = Batch(
            np.array(generated),
            np.zeros(len(generated)),
            np.array(context, dtype=float),
            np.array(began, dtype=float),
            np.array(batch_kind, dtype=np.int64),
        )
        statistics = service.lengths.of_model(model)
        unknown = sqrt(statistics.variance / statistics.mean**2 / statistics.count + SPEED_SPREAD**2)
        return intake(engine, batch, line), unknown, engine


def _line(
    sent: Sequence[Tracked],
    groups: Sequence[RequestGroup],
    profile: ModelOnInstance,
    kinds: dict[LengthKind, int],
) -> Line:
    """The queue as columns. ``kinds`` is added to."""
    context: list[float] = []
    prefill: list[float] = []
    kind: list[int] = []
    count: list[int] = []

    def add(item: Tracked, tokens: float, requests: int) -> None:
        context.append(tokens)
        prefill.append(1.0 if restores(profile, item) else tokens)
        kind.append(kinds.setdefault(kind_of(item.request), len(kinds)))
        count.append(requests)

    for item in sent:
        add(item, item.pulled_context, 1)
    for group in groups:
        if len(context) < SINGLE_ENTRIES:
            for item in group.items:
                add(item, item.context_tokens, 1)
        else:
            add(group.head, group.context_tokens / len(group), len(group))
    return Line(
        np.array(context, dtype=float),
        np.array(prefill, dtype=float),
        np.array(kind, dtype=np.int64),
        np.array(count, dtype=float),
        len(sent),
    )


def _sent(ledger: InstanceLedger) -> list[Tracked]:
    """What the engine has without having given a first token, in order."""
    return [
        item
        for item in ledger.running.values()
        if item.first_token_at is None and item.state is State.RUNNING
    ]


def _ahead(item: Tracked, ledger: InstanceLedger, groups: Sequence[RequestGroup]) -> int:
    """How many requests without a first token are served before ``item``."""
    sent = _sent(ledger) if ledger.prefilling_tokens else []
    if item.group is None:
        return sent.index(item)
    ahead = len(sent)
    for group in groups:
        if group is item.group:
            return ahead + (len(group) - 1 if group.items[-1] is item else group.items.index(item))
        ahead += len(group)
    raise AssertionError(f"{item!r} stands in none of the groups")


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
