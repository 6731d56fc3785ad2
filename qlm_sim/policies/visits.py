"""Visits: how long an instance stays with the loaded model before it goes on to the next one.

A deadline may force it to leave. Otherwise work decides: a visit is left when the next one gets more done per
second, its swap included; or, for a model that no other instance serves, when it has been long enough that
swaps cost little.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp

from qlm_sim.core.deadlines import Alarms
from qlm_sim.core.groups import RequestGroup
from qlm_sim.core.instances import InstanceLedger, by_model
from qlm_sim.core.plan import GroupService
from qlm_sim.core.types import Request
from qlm_sim.estimator.arrivals import slo_band
from qlm_sim.policies.snapshot import SnapshotTaker

_NEVER = float("inf")
FAIRNESS_SHARE = 0.05
"""Share of an instance's time that swaps may take so that a model is served which no other instance has."""
GAP_WEIGHT = 0.1
"""What the last time between two arrivals counts for among those before."""
MARGIN_S, MARGIN_SHARE = 1.0, 0.2
"""Time kept in hand before a deadline: seconds, and a share of the work that comes before it."""
SHORT_QUEUE = 8
"""Up to so many groups, a queue is looked through whenever it matters ..."""
OUTLOOK_S = 0.25
"""... and a longer one so seldom, unless its groups change."""


def margin_s(ahead_s: float) -> float:
    """Seconds kept in hand before a deadline that lies ``ahead_s`` of work away."""
    return MARGIN_S + MARGIN_SHARE * ahead_s


class Visits:
    """Says of an instance whether it is time to leave."""

    def __init__(self, snapshot: SnapshotTaker, ledgers: Mapping[str, InstanceLedger]) -> None:
        self._snapshot = snapshot
        self._capable = by_model(ledgers)
        self._demand: dict[str, dict[float, _Arrivals]] = {}
        """By model and band of SLOs: how its requests come."""
        self.leave_at = Alarms()
        """By instance: when a deadline will force it to another model, if nothing changes."""
        self._outlooks: dict[str, _Outlook] = {}
        self.miss_share = 0.0
        """Share of the requests that can still be met which the plan in force expects to miss."""

    def arrived(self, request: Request, now: float) -> None:
        """A request has come, for the first time."""
        known = self._demand.setdefault(request.model, {})
        band = slo_band(request.slo_s)
        arrivals = known.get(band)
        if arrivals is None:
            arrivals = known[band] = _Arrivals(request.slo_s, now)
        arrivals.came(now, request.prompt_tokens)

    def should_end(
        self, ledger: InstanceLedger, queue: list[RequestGroup], resident: RequestGroup | None, now: float
    ) -> bool:
        """Whether to leave the loaded model for that of the first group of the queue.

        ``resident``: the first one of the loaded model, further back.
        """
        outlook = self._outlook(ledger, queue, now)
        model, service = outlook.model, outlook.service
        overhead_s = self._snapshot.leave_s(ledger, now) + ledger.swap_s(model)
        price_s, longest_s = self._away(ledger, overhead_s, now)
        again_s = 0.0 if self._snapshot.keeps(ledger, queue[0]) else service.batch * service.prefill_s
        rate = best_rate(service, outlook.requests, price_s, longest_s, again_s)
        # A model serves for as long as loading it took, so that swaps never take more than half the time.
        settled_at = now
        if ledger.running or outlook.joining:
            settled_at = max(now, ledger.loaded_at + ledger.swap_s(ledger.model or model))
        leave_at = _NEVER
        idle = resident is None and not ledger.running
        use = 0.0 if idle and longest_s >= price_s else self._use(ledger, outlook.joining, now)
        # What was just pulled has its first token first: else it would be taken off again for nothing.
        if not ledger.prefilling_tokens and rate > use:
            leave_at = now
        elif longest_s >= price_s or not self._held_elsewhere(model, ledger):
            # Else swaps would take most of the time, for requests that another instance takes as well.
            # The time that the swap takes could serve others, of whom that share is about to miss.
            lost = self.miss_share * overhead_s / (service.prefill_s + service.decode_s)
            if outlook.undecided > lost:
                leave_at = outlook.latest_at - (1 + MARGIN_SHARE) * overhead_s
            if (resident is not None or idle) and not self._held_elsewhere(model, ledger):
                leave_at = min(leave_at, ledger.loaded_at + overhead_s / FAIRNESS_SHARE)
        leave_at = max(leave_at, settled_at)
        self.leave_at.set(ledger.id, leave_at if leave_at > now else _NEVER)
        return leave_at <= now

    def _away(self, ledger: InstanceLedger, overhead_s: float, now: float) -> tuple[float, float]:
        """What leaving the loaded model costs, in seconds, and how long a visit elsewhere can last.

        Where no other instance has the loaded model, its next requests call this one back: the visit lasts
        until then, and the way back is part of its price.
        """
        left = ledger.model
        price_s = overhead_s + self._snapshot.again_s(ledger, now)
        if left is None or not self._is_last_of(left, ledger):
            return price_s, _NEVER
        back_s = ledger.swap_s(left)
        called_s = min(each.slo_s + each.gap_s(now) for each in self._demand[left].values())
        return price_s + back_s, max(0.0, called_s - overhead_s - margin_s(back_s) - back_s)

    def _use(self, ledger: InstanceLedger, joining: int, now: float) -> float:
        """What staying gets done per second, as a share of a full batch's: by what runs now, or by what keeps
        coming for a model that no other instance has."""
        use = self._snapshot.batch_use(ledger, joining)
        left = ledger.model
        if left is None or not self._is_last_of(left, ledger):
            return use
        coming = 0.0
        for each in self._demand[left].values():
            coming += self._snapshot.request_s(ledger, left, each.prompt_tokens) / max(1e-9, each.gap_s(now))
        return max(use, min(1.0, coming))

    def _is_last_of(self, model: str, ledger: InstanceLedger) -> bool:
        """Whether requests of the model come, and no other instance has it."""
        return model in self._demand and not self._held_elsewhere(model, ledger)

    def _held_elsewhere(self, model: str, ledger: InstanceLedger) -> bool:
        return any(other is not ledger and other.next_model() == model for other in self._capable[model])

    def _outlook(self, ledger: InstanceLedger, queue: list[RequestGroup], now: float) -> "_Outlook":
        """What the queue holds for the model of its first group."""
        known = self._outlooks.get(ledger.id)
        if (
            known is not None
            and len(queue) > SHORT_QUEUE
            and now - known.made_at < OUTLOOK_S
            and known.queue == queue
        ):
            return known
        first = queue[0].model
        requests = undecided = joining = 0
        clock_s = 0.0
        free = 1.0
        model = first
        latest_at = _NEVER
        for group in queue:
            service = self._snapshot.service_on(ledger, group)
            if group.model != model:
                model = group.model
                clock_s += ledger.swap_s(model)
                free = 1.0
            if not group.decided and model != ledger.model:
                start_s = clock_s + service.prefill_s
                if model == first:
                    undecided += len(group)
                if model == first or group.first_deadline > now + start_s:
                    latest_at = min(latest_at, group.first_deadline - start_s - margin_s(start_s))
            if model == first:
                requests += len(group)
            elif model == ledger.model:
                joining += len(group)
            behind = len(group) - free * service.batch
            clock_s += len(group) * service.prefill_s
            if behind > 0:
                clock_s += behind * service.decode_s
                free = 0.0
            else:
                free -= len(group) / service.batch
        service = self._snapshot.service_on(ledger, queue[0])
        outlook = _Outlook(queue[:], now, first, service, requests, undecided, joining, latest_at)
        self._outlooks[ledger.id] = outlook
        return outlook


class _Arrivals:
    """How requests of one model and band of SLOs come: the mean seconds between two, the last ones counting
    most."""

    __slots__ = ("_gap_s", "_last_at", "prompt_tokens", "slo_s")

    def __init__(self, slo_s: float, now: float) -> None:
        self.slo_s = slo_s
        """Of the first."""
        self.prompt_tokens = 0.0
        """Mean."""
        self._gap_s = 0.0
        self._last_at = now

    def came(self, now: float, prompt_tokens: int) -> None:
        self.prompt_tokens += GAP_WEIGHT * (prompt_tokens - self.prompt_tokens)
        self._gap_s += GAP_WEIGHT * (now - self._last_at - self._gap_s)
        self._last_at = now

    def gap_s(self, now: float) -> float:
        """Expected until the next one: after a long silence, another as long."""
        return max(self._gap_s, now - self._last_at)


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What a visit to the model of a queue's first group would be for."""

    queue: list[RequestGroup]
    """The queue as it was."""
    made_at: float
    model: str
    service: GroupService
    """Of the first group."""
    requests: int
    """Of that model ..."""
    undecided: int
    """... and those of them whose SLO can still be met."""
    joining: int
    """Of the loaded model, further back."""
    latest_at: float
    """When the instance should have cleared its batch and loaded the model at the latest: before the first
    deadline that would be missed, with time in hand."""


def best_rate(
    service: GroupService, requests: int, overhead_s: float, longest_s: float = _NEVER, again_s: float = 0.0
) -> float:
    """Work done per second of the visit that gets most done, its swap included, as a share of a full batch's.

    A visit costs ``overhead_s``, then prefills what waits, runs a full batch as long as there is one,
    and after that the batch decays as requests finish, with time constant batch · decode_s. Like a
    forager, an instance should leave its model when its rate falls below what the next one offers on
    the whole (marginal value theorem, Charnov 1976). It lasts ``longest_s`` at most; ``again_s`` of work are
    lost where it is cut short.
    """
    batch = service.batch
    full_s = requests * service.prefill_s + max(0.0, requests - batch) * service.decode_s
    decay_s = batch * service.decode_s
    share = min(1.0, requests / batch)
    best = 0.0
    for decays in (0.0, 0.1, 0.25, 0.5, 1.0, 2.0):
        stay_s = full_s + decays * decay_s
        done_s = full_s + share * decay_s * (1 - exp(-decays))
        if stay_s > longest_s:
            over_s = max(0.0, longest_s - full_s)
            stay_s = longest_s
            done_s = min(full_s, longest_s) + share * decay_s * (1 - exp(-over_s / decay_s)) - again_s
        best = max(best, done_s / (overhead_s + stay_s))
    return best
