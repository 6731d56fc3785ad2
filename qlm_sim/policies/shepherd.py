"""SHEPHERD: periodic planning of models onto instances, preemptive batches within the plan.

From Zhang et al., NSDI '23: HERD plans, every period, which models each group of GPUs serves, by an
integer program over the arrival rates of the last period; FLEX serves within the plan, always the
feasible batch with the most requests, and preempts a running batch only for one λ times as large.
Batch latency is taken as known and linear in the batch, ℓ(b) = α + β·b, with outputs as long as the
mean: that is where it was made for other networks than language models.

Chosen here, where the paper is silent or batches whole inference calls: a group is one instance; the
engine keeps its continuous batching, bounded by the largest batch whose ℓ(b) meets the tightest SLO
that waits; a request is feasible while α after now is before its deadline; what is infeasible is
served last, not dropped.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from qlm_sim.core.actions import Replan
from qlm_sim.core.groups import GroupKey, GroupTable, RequestGroup
from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lifecycle import Tracked
from qlm_sim.core.plan import Plan
from qlm_sim.core.policy import Overtaking, Standing
from qlm_sim.core.types import Request
from qlm_sim.estimator.service import ServiceEstimator, group_service
from qlm_sim.estimator.steps import decode_step_s, prefill_s
from qlm_sim.policies.lines import count_before, in_order
from qlm_sim.solver.herd import assign_models

LAMBDA = 3.03
"""How many times larger a batch must be to preempt the running one: the paper's value, at which
FLEX is within a factor of 12.62 of the best schedule in hindsight."""
PERIOD_S = 60.0
"""Seconds between two plans."""
_UNLIMITED = 2**62
_PROMPT_TOKENS = 256


class ShepherdPolicy:
    """HERD's plan, FLEX's choice."""

    name = "shepherd"
    holds_back = True
    evicts_to_swap = True
    overtaking = Overtaking.BY_DEADLINE
    at_rest = False

    def __init__(self, estimator: ServiceEstimator) -> None:
        self._estimator = estimator

    def start(self, ledgers: dict[str, InstanceLedger]) -> None:
        self._ledgers = ledgers
        self._table = GroupTable()
        self._arrived: Counter[str] = Counter()
        self._period_started = 0.0
        self._plan: dict[str, tuple[str, ...]] = {
            ledger.id: tuple(ledger.spec.models) for ledger in ledgers.values()
        }
        self._batch: dict[tuple[str, str, str], int] = {}
        self.wake_at = float("inf")

    def add(self, item: Tracked, now: float) -> Iterable[str]:
        model = item.request.model
        if self.wake_at == float("inf"):
            self._period_started = now
            self.wake_at = now + PERIOD_S
        self._arrived[model] += item.attempt == 0
        key = GroupKey(model, item.request.slo_class, band=0, served=item.served)
        self._table.join(item, key, _UNLIMITED)
        serving = [name for name, models in self._plan.items() if model in models]
        if not serving:
            self.wake_at = now
        return serving or list(self._plan)

    def discard(self, item: Tracked) -> None:
        self._table.leave(item)

    def changed(self, ledger: InstanceLedger) -> None:
        pass

    def next_for(self, ledger: InstanceLedger, now: float) -> Tracked | None:
        if now >= self.wake_at:
            self._make_plan(now)
        mine = [g for g in self._table.groups.values() if g.key.model in self._plan[ledger.id]]
        if not mine:
            return None
        sizes: Counter[str] = Counter()
        for group in mine:
            sizes[group.key.model] += len(group)
        offered = {model: min(n, self._batch_limit(ledger, model, mine)) for model, n in sizes.items()}
        chosen = max(offered, key=lambda model: (offered[model], model))
        loaded = ledger.model
        running = len(ledger.running)
        # What runs and what waits to join it make the batch that another one must beat.
        batch = running + offered.get(loaded, 0) if loaded is not None else 0
        if chosen != loaded and batch and offered[chosen] < LAMBDA * batch:
            if loaded not in offered:
                return None
            chosen = loaded
        if chosen == loaded and running >= self._batch_limit(ledger, chosen, mine):
            return None
        group = min((g for g in mine if g.key.model == chosen), key=lambda g: _urgency(g, now))
        return group.head

    def _batch_limit(self, ledger: InstanceLedger, model: str, groups: Sequence[RequestGroup]) -> int:
        """The largest batch whose latency meets the tightest SLO of the model that waits."""
        slo = min((g.head.request.slo_s, g.key.slo_class) for g in groups if g.key.model == model)
        key = (ledger.id, model, slo[1])
        limit = self._batch.get(key)
        if limit is None:
            profile = ledger.spec.models[model]
            mean = self._estimator.lengths.of_model(model).mean
            most = group_service(profile, _PROMPT_TOKENS, self._estimator.lengths.of_model(model)).batch
            one_s = prefill_s(profile, _PROMPT_TOKENS) + mean * decode_step_s(profile, 1, mean)
            most_s = most * prefill_s(profile, _PROMPT_TOKENS, most) + mean * decode_step_s(
                profile, most, most * (_PROMPT_TOKENS + mean / 2)
            )
            beta_s = (most_s - one_s) / max(1.0, most - 1)
            limit = self._batch[key] = max(1, int(min(most, 1 + (slo[0] - one_s) / max(beta_s, 1e-9))))
        return limit

    def woken(self, now: float) -> Iterable[str]:
        return tuple(self._ledgers)

    def victims(self, ledger: InstanceLedger, item: Tracked, now: float) -> Sequence[Tracked]:
        return ()

    def order(self, ledger: InstanceLedger, now: float) -> Sequence[RequestGroup]:
        """The loaded model's requests, then the models of which most wait. Time linear in what waits."""
        line: list[RequestGroup] = []
        for model in self._models_in_turn(ledger):
            line += in_order(self._of_model(model), lambda item: _item_urgency(item, now))
        return line

    def standing(self, item: Tracked, now: float) -> Standing:
        model = item.request.model
        serving = [i for i in self._ledgers.values() if model in self._plan[i.id]]
        if not serving:
            # The next plan gives the model an instance.
            serving = [i for i in self._ledgers.values() if model in i.spec.models]
        serving = [i for i in serving if i.next_model() == model] or serving
        ahead = count_before(self._of_model(model), item, lambda other: _item_urgency(other, now))
        for other in self._models_in_turn(serving[0]):
            if other == model:
                break
            ahead += sum(map(len, self._of_model(other)))
        return Standing(tuple(i.id for i in serving), ahead)

    def standing_of_new(self, request: Request, now: float) -> Standing:
        return self.standing(Tracked(request), now)

    def _of_model(self, model: str) -> list[RequestGroup]:
        return [group for group in self._table.groups.values() if group.key.model == model]

    def _models_in_turn(self, ledger: InstanceLedger) -> list[str]:
        waiting: Counter[str] = Counter()
        for group in self._table.groups.values():
            waiting[group.key.model] += len(group)
        mine = [model for model in waiting if model in self._plan[ledger.id]]
        return sorted(mine, key=lambda model: (model != ledger.next_model(), -waiting[model], model))

    def replan(self, now: float) -> Replan | None:
        return None

    def _make_plan(self, now: float) -> None:
        """HERD, at the end of a period, or at once for a model that no instance serves."""
        elapsed_s = max(1.0, now - self._period_started)
        demand = {model: count / elapsed_s for model, count in self._arrived.items()}
        for group in self._table.groups.values():
            demand.setdefault(group.key.model, len(group) / elapsed_s)
        self._arrived.clear()
        if not demand:
            self.wake_at = float("inf")
            return
        self.wake_at = now + PERIOD_S
        self._period_started = now
        capacity = {
            ledger.id: {model: self._capacity_rps(ledger, model) for model in ledger.spec.models}
            for ledger in self._ledgers.values()
        }
        self._plan = assign_models(demand, capacity)
        self._batch.clear()

    def _capacity_rps(self, ledger: InstanceLedger, model: str) -> float:
        service = group_service(
            ledger.spec.models[model], _PROMPT_TOKENS, self._estimator.lengths.of_model(model)
        )
        return 1 / (service.prefill_s + service.decode_s)

    def adopt(self, plan: Plan, now: float) -> Iterable[str]:
        return ()


def _urgency(group: RequestGroup, now: float) -> tuple[bool, float, int]:
    """Those that can still be met first, by deadline."""
    return group.first_deadline < now, group.first_deadline, group.id


def _item_urgency(item: Tracked, now: float) -> tuple[bool, float]:
    """As ``_urgency`` of its group, if it leads the group in its turn."""
    first = item if item.group is None else item.group.head
    return first.deadline < now, item.deadline
