"""Policies with one queue for the whole cluster: each instance takes the request that ranks first.

A rank is a pure function of a group's head, the instance and the time; the lowest goes first. If the
first request is for another model than the loaded one, the instance runs empty and swaps, unless
another instance has that model loaded or on its way: then it is left to that one, and helped only by
an instance that has nothing else to do.
"""

from collections.abc import Callable, Iterable, Sequence

from qlm_sim.core.actions import Replan
from qlm_sim.core.groups import GroupKey, GroupTable, RequestGroup
from qlm_sim.core.instances import InstanceLedger, by_model
from qlm_sim.core.lifecycle import Tracked
from qlm_sim.core.plan import Plan
from qlm_sim.core.policy import Overtaking, Standing
from qlm_sim.core.types import Request
from qlm_sim.policies.lines import count_before, in_order

Rank = tuple[float, ...]
RankFunction = Callable[[Tracked, InstanceLedger, float], Rank | None]
"""(request, instance, now) to its rank there; None: not to be served there. Ascends inside a group."""
HoldFunction = Callable[[InstanceLedger], bool]
"""Whether the instance is to take nothing now."""

STARVATION_S = 60.0
"""Seconds that a model may stay loaded while a request for another one waits as long (``collate``)."""
SATURATED_KV = 0.8
"""Share of KV blocks in use at which ``flow_control`` holds requests back: llm-d's default."""

_UNLIMITED = 2**62


def edf(head: Tracked, ledger: InstanceLedger, now: float) -> Rank:
    """Earliest deadline first, whatever model it takes."""
    return (head.deadline,)


def edf_batched(head: Tracked, ledger: InstanceLedger, now: float) -> Rank:
    """Earliest deadline first within the loaded model; another only when none of it waits."""
    return head.request.model != ledger.model, head.deadline


def collate(head: Tracked, ledger: InstanceLedger, now: float) -> Rank:
    """All of the loaded model before the next one, oldest first, within a bound on starvation."""
    arrived_at = head.request.arrived_at
    if head.request.model == ledger.model:
        return 1.0, arrived_at
    starved = now - max(arrived_at, ledger.loaded_at) > STARVATION_S
    return (0.0 if starved else 2.0), arrived_at


def flow_control(head: Tracked, ledger: InstanceLedger, now: float) -> Rank | None:
    """Strict bands by SLO, tightest first, oldest first inside.

    A band's requests share their SLO, so that first come, first served is deadline order there.
    """
    return head.request.slo_s, head.request.arrived_at


def saturated(ledger: InstanceLedger) -> bool:
    """Whether ``flow_control`` holds requests back."""
    report = ledger.reported
    return report is not None and bool(ledger.running) and report.kv_utilization >= SATURATED_KV


def never(ledger: InstanceLedger) -> bool:
    return False


def static(head: Tracked, ledger: InstanceLedger, now: float) -> Rank | None:
    """Oldest first, of the loaded model alone: no swaps, so other models need an instance of theirs."""
    return (head.request.arrived_at,) if head.request.model == ledger.model else None


class CentralPolicy:
    """One queue for all instances, ordered by a rank."""

    holds_back = True
    evicts_to_swap = False

    def __init__(
        self,
        name: str,
        rank: RankFunction,
        hold: HoldFunction = never,
        overtaking: Overtaking = Overtaking.NONE,
    ) -> None:
        self.name = name
        self.overtaking = overtaking
        self.wake_at = float("inf")
        self._rank = rank
        self._hold = hold

    def start(self, ledgers: dict[str, InstanceLedger]) -> None:
        self._table = GroupTable()
        self._capable = by_model(ledgers)

    def add(self, item: Tracked, now: float) -> Iterable[str]:
        request = item.request
        key = GroupKey(request.model, request.slo_class, band=0, served=item.served)
        self._table.join(item, key, _UNLIMITED)
        model, capable = request.model, self._capable[request.model]
        # Instances that have the model loaded are asked first.
        return [i.id for i in capable if i.model == model] + [i.id for i in capable if i.model != model]

    @property
    def at_rest(self) -> bool:
        return not self._table.groups

    def discard(self, item: Tracked) -> None:
        self._table.leave(item)

    def changed(self, ledger: InstanceLedger) -> None:
        pass

    def next_for(self, ledger: InstanceLedger, now: float) -> Tracked | None:
        if self._hold(ledger):
            return None
        ours: tuple[Rank, int, RequestGroup] | None = None
        others: tuple[Rank, int, RequestGroup] | None = None
        for group in self._table.groups.values():
            model = group.key.model
            if model not in ledger.spec.models:
                continue
            rank = self._rank(group.head, ledger, now)
            if rank is None:
                continue
            if model == ledger.model or not self._served_elsewhere(model, ledger):
                if ours is None or (rank, group.id) < ours[:2]:
                    ours = (rank, group.id, group)
            elif others is None or (rank, group.id) < others[:2]:
                others = (rank, group.id, group)
        if ours is None and not ledger.running:
            ours = others
        return ours[2].head if ours is not None else None

    def _served_elsewhere(self, model: str, ledger: InstanceLedger) -> bool:
        return any(
            other is not ledger and model in (other.model, other.next_model())
            for other in self._capable[model]
        )

    def woken(self, now: float) -> Iterable[str]:
        return ()

    def victims(self, ledger: InstanceLedger, item: Tracked, now: float) -> Sequence[Tracked]:
        return ()

    def order(self, ledger: InstanceLedger, now: float) -> Sequence[RequestGroup]:
        """Takes time linear in what waits."""
        return in_order(self._line(ledger, now), lambda item: self._rank(item, ledger, now))

    def standing(self, item: Tracked, now: float) -> Standing:
        capable = self._capable[item.request.model]
        serving = [i for i in capable if i.next_model() == item.request.model] or capable
        serving = [i for i in serving if self._rank(item, i, now) is not None]
        if not serving:
            return Standing((), 0)
        ledger = serving[0]
        line = self._line(ledger, now)
        ahead = count_before(line, item, lambda other: self._rank(other, ledger, now))
        return Standing(tuple(i.id for i in serving), ahead)

    def standing_of_new(self, request: Request, now: float) -> Standing:
        return self.standing(Tracked(request), now)

    def _line(self, ledger: InstanceLedger, now: float) -> list[RequestGroup]:
        """What the instance serves, if it has nothing else to do."""
        return [
            group
            for group in self._table.groups.values()
            if group.key.model in ledger.spec.models
            and (group.key.model == ledger.model or not self._served_elsewhere(group.key.model, ledger))
            and self._rank(group.head, ledger, now) is not None
        ]

    def replan(self, now: float) -> Replan | None:
        return None

    def adopt(self, plan: Plan, now: float) -> Iterable[str]:
        return ()
