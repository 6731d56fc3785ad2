"""Global earliest deadline first: whichever instance has room takes the most urgent request.

One queue for the whole cluster, in deadline order. If the most urgent request that an instance may
serve is for another model than the loaded one, the instance runs empty and swaps, unless another
instance has that model loaded or on its way: then it is left to that one, and helped only by an
instance that has nothing else to do.
"""

from collections.abc import Iterable, Sequence

from qlm_sim.core.actions import Replan
from qlm_sim.core.groups import GroupKey, GroupTable, RequestGroup
from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lifecycle import Tracked
from qlm_sim.core.plan import Plan

_UNLIMITED = 2**62


class EdfPolicy:
    """EDF over all waiting requests."""

    name = "edf"
    holds_back = True
    evicts_to_swap = False
    wake_at = float("inf")

    def start(self, ledgers: dict[str, InstanceLedger]) -> None:
        self._table = GroupTable()
        self._capable: dict[str, list[InstanceLedger]] = {}
        for ledger in ledgers.values():
            for model in ledger.spec.models:
                self._capable.setdefault(model, []).append(ledger)

    def add(self, item: Tracked, now: float) -> Iterable[str]:
        request = item.request
        self._table.join(
            item, GroupKey(request.model, request.slo_class, band=0, served=item.served), _UNLIMITED
        )
        capable = self._capable[request.model]
        # Instances that have the model loaded are asked first.
        return [i.id for i in sorted(capable, key=lambda ledger: ledger.model != request.model)]

    def discard(self, item: Tracked) -> None:
        self._table.leave(item)

    def next_for(self, ledger: InstanceLedger, now: float) -> Tracked | None:
        ours: RequestGroup | None = None
        others: RequestGroup | None = None
        for group in self._table.groups.values():
            model = group.key.model
            if model not in ledger.spec.models:
                continue
            if model == ledger.model or not self._served_elsewhere(model, ledger):
                if ours is None or _urgency(group) < _urgency(ours):
                    ours = group
            elif others is None or _urgency(group) < _urgency(others):
                others = group
        if ours is None and not ledger.running:
            ours = others
        return ours.head if ours is not None else None

    def _served_elsewhere(self, model: str, ledger: InstanceLedger) -> bool:
        return any(
            other is not ledger and model in (other.model, other.next_model)
            for other in self._capable[model]
        )

    def victims(self, ledger: InstanceLedger, item: Tracked, now: float) -> Sequence[Tracked]:
        return ()

    def replan(self, now: float) -> Replan | None:
        return None

    def adopt(self, plan: Plan, now: float) -> Iterable[str]:
        return ()


def _urgency(group: RequestGroup) -> tuple[float, int]:
    return group.first_deadline, group.id
