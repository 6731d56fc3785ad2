"""QLM: request groups on virtual queues, planned globally to miss as few SLOs as possible.

Follows Patke et al. (SoCC '24) in its parts: groups, a virtual queue per instance, a waiting-time
estimate, a global scheduler off the serving path, and the four operations. Where the paper is weak
it goes on: lateness is soft, a request whose deadline has passed steps behind those that can still
be met, and a model is left only when a deadline forces it or when the GPU is better used elsewhere.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from qlm_sim.core.actions import Replan
from qlm_sim.core.groups import RequestGroup
from qlm_sim.core.instances import InstanceLedger, by_model
from qlm_sim.core.lifecycle import RUNNING, Tracked
from qlm_sim.core.plan import Plan, PlanProblem
from qlm_sim.core.policy import Overtaking, Standing
from qlm_sim.core.types import Request
from qlm_sim.estimator.asked import AskedEstimator
from qlm_sim.estimator.service import ServiceEstimator
from qlm_sim.policies.lines import count_ahead
from qlm_sim.policies.snapshot import SnapshotTaker
from qlm_sim.policies.virtual_queues import VirtualQueues
from qlm_sim.policies.visits import Visits, margin_s
from qlm_sim.solver.turns import in_turn

_NEVER = float("inf")
MOST_INTERVALS = 4
"""Where all that waits is of one model and SLO class: while plans leave the queues as they are, the next one
comes after twice as long, up to so many intervals. What comes of another class is not kept waiting for it."""
MAX_EVICTIONS = 3
"""Most times that one request is evicted to make room for a more urgent one of its model."""


class QlmPolicy:
    """Virtual queues of request groups under a global plan."""

    name = "qlm"
    holds_back = True
    evicts_to_swap = True
    overtaking = Overtaking.BY_DEADLINE
    discard: Callable[[Tracked], None]
    changed: Callable[[InstanceLedger], None]

    def __init__(
        self,
        estimator: ServiceEstimator,
        weights: Mapping[str, float],
        *,
        delta: float = 0.5,
        replan_interval_s: float = 1.0,
        first_token_only: frozenset[str] = frozenset(),
        balancing: bool = True,
    ) -> None:
        self._estimator = estimator
        self._weights = weights
        self._delta = delta
        self._replan_interval_s = replan_interval_s
        self._first_token_only = first_token_only
        self._balancing = balancing
        self.at_rest = False
        self._problems = -1
        """The number of the last one that counts: a start leaves one out."""
        self._loosest_slo_s = 0.0
        """Of all requests so far."""

    def start(self, ledgers: dict[str, InstanceLedger]) -> None:
        self._ledgers = ledgers
        self._problems += 1  # a plan under way is of groups that are no more
        self._snapshot = SnapshotTaker(ledgers, self._estimator, self._weights)
        asked = self._estimator
        if isinstance(asked, AskedEstimator):
            asked = asked.questions
        self._question_snapshot = SnapshotTaker(ledgers, asked, self._weights)
        """For questions, so that they leave no trace in what decisions see."""
        self._queues = VirtualQueues(ledgers, self._snapshot, self._delta)
        self.discard = self._queues.leave
        self.changed = self._queues.idle.changed
        self._visits = Visits(self._snapshot, ledgers)
        self._leave_at = self._visits.leave_at
        self._hungry: dict[str, dict[str, None]] = {}
        """By loaded model: instances that were left with nothing to serve."""
        self._replan_at = -_NEVER if self._balancing else _NEVER
        """Not before; and not while nothing waits."""
        self._intervals = 1
        """So many from the last plan to the next ..."""
        self._only_class: str | None = None
        """... as all that it was made for is of this class."""
        self._one_model = len(by_model(ledgers)) == 1
        """No instance ever leaves its model, so that nothing waits for one that has left it."""

    @property
    def wake_at(self) -> float:
        leave_at = self._leave_at.next_at
        if self._replan_at < leave_at and self._queues.groups:
            return self._replan_at
        return leave_at

    def woken(self, now: float) -> Iterable[str]:
        return self._leave_at.due(now)

    # What waits

    def order(self, ledger: InstanceLedger, now: float) -> Sequence[RequestGroup]:
        """The instance's virtual queue, but the loaded model's groups first: it has not been left yet."""
        queue = self._queues.of[ledger.id]
        model = ledger.next_model()
        if not queue or queue[0].model == model:
            return queue
        return sorted(queue, key=lambda group: group.model != model)

    def standing(self, item: Tracked, now: float) -> Standing:
        assert item.group is not None, f"{item!r} waits in no group"
        name = item.group.instance
        return Standing((name,), count_ahead(self.order(self._ledgers[name], now), item))

    def standing_of_new(self, request: Request, now: float) -> Standing:
        key = self._queues.key(request, False)
        group = self._queues.open_group(key)
        if group is not None:
            return self.standing(group.items[-1], now).behind()
        item = Tracked(request)
        group = RequestGroup(-1, key, 1)
        group.items.append(item)
        group.context_tokens = item.context_tokens
        name, position = self._queues.spot(group, now, self._question_snapshot)
        return Standing((name,), sum(map(len, self._queues.of[name][:position])))

    def add(self, item: Tracked, now: float) -> Iterable[str]:
        request, queues = item.request, self._queues
        model = request.model
        if request.slo_s > self._loosest_slo_s:
            self._loosest_slo_s = request.slo_s
        if not (self._one_model or item.attempt):
            self._visits.arrived(request, now)
        group = queues.join(item, now)
        if self._intervals > 1 and request.slo_class != self._only_class:
            self._intervals = 1
            self._replan_at = self._asked_at + self._replan_interval_s
        home = group.instance
        helper = self._helper(model, home) if self._hungry.get(model) else None
        if len(group.items) > 1 and queues.of[home][0].model == self._ledgers[home].model:
            # It stands behind others, which wait for room.
            return (helper,) if helper is not None else ()
        return (home, helper) if helper is not None else (home,)

    def _helper(self, model: str, home: str) -> str | None:
        """Another instance that has the model loaded and nothing to serve."""
        hungry = self._hungry.get(model)
        while hungry:
            name = next(iter(hungry))
            if name != home and self._ledgers[name].next_model() == model:
                return name
            del hungry[name]
        return None

    # What an instance does next

    def next_for(self, ledger: InstanceLedger, now: float) -> Tracked | None:
        queues = self._queues
        if now >= queues.review_at:
            queues.review(now)
        queue = queues.of[ledger.id]
        model = ledger.model
        resident = queue[0] if queue else None
        if resident is not None and resident.model != model:
            resident = _first_of(queue, model)
            if self._visits.should_end(ledger, queue, resident, now):
                return queue[0].head
        elif self._leave_at.next_at < _NEVER:
            self._leave_at.set(ledger.id, _NEVER)
        if resident is None:
            if model is None or not self._balancing:
                return None
            if queues.groups:
                resident = self._steal(model, decided=False) or self._steal(model, decided=True)
            if resident is None:
                self._hungry.setdefault(model, {})[ledger.id] = None
                return None
        elif self._balancing and not self._one_model:
            assert model is not None
            other = self._steal(model, decided=False)
            if (
                other is not None
                and other.first_deadline < resident.first_deadline
                and self._ledgers[other.instance].model != model
            ):
                resident = other
        return resident.items[0]

    def _steal(self, model: str, *, decided: bool) -> RequestGroup | None:
        """The most urgent group of the model, wherever it waits, with something to win or not.

        Not one whose own instance is loading the model: it waits for that.
        """
        best = self._queues.most_urgent(model, decided=decided)
        if best is not None:
            own = self._ledgers[best.instance]
            if own.model != model == own.next_model() and own.ready_at < best.first_deadline:
                return None
        return best

    def victims(self, ledger: InstanceLedger, item: Tracked, now: float) -> Sequence[Tracked]:
        """Running requests to evict when waiting for departures would miss the deadline.

        Those of looser classes, and of its own where nothing is promised beyond the first token, which they
        have.
        """
        if item.request.slo_s >= self._loosest_slo_s and not self._first_token_only:
            return ()
        if item.served or item.deadline < now:
            return ()
        group = item.group
        assert group is not None
        service = self._snapshot.service_on(ledger, group)
        need = item.context_tokens
        each = ledger.context_tokens / len(ledger.running)
        wait_s = max(1.0, need / each) * service.decode_s
        if now + wait_s + service.prefill_s + margin_s(wait_s) < item.deadline:
            return ()
        chosen: list[Tracked] = []
        for other in self._looser(ledger, item):
            if need <= 0:
                break
            chosen.append(other)
            need -= other.pulled_context
        return chosen if need <= 0 else ()

    def _looser(self, ledger: InstanceLedger, item: Tracked) -> Sequence[Tracked]:
        """What runs there and may be evicted for ``item``, first what is best taken."""
        looser = [
            other
            for other in ledger.running.values()
            if other.state is RUNNING
            and other.served
            and (
                other.request.slo_s > item.request.slo_s
                or (other.request.slo_s == item.request.slo_s and self._promises_no_more(other))
            )
            and other.evictions < MAX_EVICTIONS
        ]
        looser.sort(
            key=lambda other: (
                -other.request.slo_s,
                -self._estimator.remaining_tokens(ledger, other),
                -other.request.arrived_at,
                other.request.id,
            )
        )
        return looser

    def _promises_no_more(self, item: Tracked) -> bool:
        return item.request.slo_class in self._first_token_only

    # The global plan

    def replan(self, now: float) -> Replan | None:
        if now < self._replan_at or not self._queues.groups:
            return None
        self._queues.regroup()
        self._asked_at = now
        self._replan_at = now + self._replan_interval_s
        self._problems += 1
        self._asked = PlanProblem(
            number=self._problems,
            groups=tuple([self._snapshot.group(g, now) for g in self._queues.groups.values()]),
            instances=tuple(self._snapshot.instances(now)),
            current={name: tuple([g.id for g in queue]) for name, queue in self._queues.of.items()},
        )
        return Replan(self._asked)

    def adopt(self, plan: Plan, now: float) -> Iterable[str]:
        if plan.number != self._problems:
            return ()
        undecided = sum([len(g.items) for g in self._queues.groups.values() if not g.decided])
        self._visits.miss_share = min(1.0, plan.cost / undecided) if undecided else 0.0
        changed = self._queues.adopt(replace(plan, queues=in_turn(self._asked, plan.queues)), now)
        if not self._one_model:
            # What the plan expects to miss concerns those that it leaves alone too.
            return tuple(self._ledgers)
        classes = {group.slo_class for group in self._asked.groups}
        if changed or len(classes) > 1:
            self._intervals = 1
        else:
            self._intervals = min(2 * self._intervals, MOST_INTERVALS)
            (self._only_class,) = classes
        self._replan_at = self._asked_at + self._intervals * self._replan_interval_s
        return changed


def _first_of(queue: Sequence[RequestGroup], model: str | None) -> RequestGroup | None:
    return next((group for group in queue if group.model == model), None)
