"""QLM: request groups on virtual queues, planned globally to miss as few SLOs as possible.

Follows Patke et al. (SoCC '24) in its parts: groups, a virtual queue per instance, a waiting-time
estimate, a global scheduler off the serving path, and the four operations. Where the paper is weak
it goes on: lateness is soft, a request whose deadline has passed steps behind those that can still
be met, and a model is left only when a deadline forces it or when the GPU is better used elsewhere.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, nsmallest
from itertools import count

from qlm_sim.core.actions import Replan
from qlm_sim.core.deadlines import Alarms, DeadlineIndex
from qlm_sim.core.groups import GroupKey, GroupTable, RequestGroup
from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lifecycle import RUNNING, Tracked
from qlm_sim.core.lso import fits
from qlm_sim.core.plan import GroupService, Plan, PlanProblem
from qlm_sim.core.policy import Standing
from qlm_sim.core.types import Request
from qlm_sim.estimator.asked import AskedEstimator
from qlm_sim.estimator.service import ServiceEstimator
from qlm_sim.policies.idle import IdleInstances
from qlm_sim.policies.lines import count_ahead
from qlm_sim.policies.snapshot import SnapshotTaker, best_visit
from qlm_sim.solver.search import insertion

_NEVER = float("inf")
MOST_SEEN = 128
"""Between two plans a new group is tried on instances that have about so many groups together ..."""
MOST_TRIED = 6
"""... and no more than so many that have its model and so many that do not."""
FAIRNESS_SHARE = 0.05
"""Share of an instance's time that swaps may take for the sake of those who have nothing to win any more."""
MAX_EVICTIONS = 3
"""Most times that one request is evicted to make room for a more urgent one of its model."""
MARGIN_S, MARGIN_SHARE = 1.0, 0.2
"""Time kept in hand before a deadline: seconds, and a share of the work that comes before it."""
PATIENCE_SLOS = 30.0
"""What was late stands back behind all that can be met for so many times its SLO, then has a turn as if it
had just come; the next turn half as long after that, and so on. So no overload starves it: soon after twice
so many SLOs its turns come one after the other, and at each it is met as likely as a new one is.
"""
SHORT_QUEUE = 8
"""Up to so many groups, a queue is looked through whenever it matters ..."""
OUTLOOK_S = 0.25
"""... and a longer one so seldom, unless its groups change."""


class QlmPolicy:
    """Virtual queues of request groups under a global plan."""

    name = "qlm"
    holds_back = True
    evicts_to_swap = True

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
        self._problems = 0
        self._loosest_slo_s = 0.0
        """Of all requests so far."""

    def start(self, ledgers: dict[str, InstanceLedger]) -> None:
        self._ledgers = ledgers
        self._table = GroupTable()
        self._queues: dict[str, list[RequestGroup]] = {name: [] for name in ledgers}
        self._idle = IdleInstances(ledgers, self._queues)
        self._snapshot = SnapshotTaker(ledgers, self._estimator, self._weights)
        asked = self._estimator
        if isinstance(asked, AskedEstimator):
            asked = asked.questions
        self._question_snapshot = SnapshotTaker(ledgers, asked, self._weights)
        """For questions, so that they leave no trace in what decisions see."""
        self._capable: dict[str, list[InstanceLedger]] = {}
        self._limits: dict[GroupKey, int] = {}
        """Sizes of new groups, as reckoned since the last plan was asked for."""
        for ledger in ledgers.values():
            for model in ledger.spec.models:
                self._capable.setdefault(model, []).append(ledger)
        self._of_model: dict[str, DeadlineIndex] = {}
        self._undecided = DeadlineIndex(self._table.groups)
        self._relegated: list[tuple[float, int, Tracked]] = []
        """Heap of what has been late, by when its next turn comes; it may have left since."""
        self._turns = count()
        self._hungry: dict[str, dict[str, None]] = {}
        """By loaded model: instances that were left with nothing to serve."""
        self._switch_at = Alarms()
        """By instance: when a deadline will force it to another model, if nothing changes."""
        self._outlooks: dict[str, _Outlook] = {}
        self._miss_share = 0.0
        """Share of the requests that can still be met which the plan in force expects to miss."""
        self._replan_at = _NEVER
        self._last_replan = -_NEVER

    @property
    def wake_at(self) -> float:
        switch_at = self._switch_at.next_at
        return switch_at if switch_at < self._replan_at else self._replan_at

    def woken(self, now: float) -> Iterable[str]:
        return self._switch_at.due(now)

    # What waits

    def order(self, ledger: InstanceLedger, now: float) -> Sequence[RequestGroup]:
        """The instance's virtual queue, but the loaded model's groups first: it has not been left yet."""
        queue = self._queues[ledger.id]
        model = ledger.next_model
        if not queue or queue[0].key.model == model:
            return queue
        return sorted(queue, key=lambda group: group.key.model != model)

    def standing(self, item: Tracked, now: float) -> Standing:
        assert item.group is not None, f"{item!r} waits in no group"
        name = item.group.instance
        return Standing((name,), count_ahead(self.order(self._ledgers[name], now), item))

    def standing_of_new(self, request: Request, now: float) -> Standing:
        item = Tracked(request)
        key = self._key(item)
        group = self._table.open_group(key)
        if group is not None:
            return self.standing(group.items[-1], now).behind()
        group = RequestGroup(-1, key, 1)
        group.items.append(item)
        group.context_tokens = item.context_tokens
        name, position = self._spot(group, now, self._question_snapshot)
        return Standing((name,), sum(map(len, self._queues[name][:position])))

    def add(self, item: Tracked, now: float) -> Iterable[str]:
        model = item.request.model
        if item.request.slo_s > self._loosest_slo_s:
            self._loosest_slo_s = item.request.slo_s
        group = self._join(item, self._key(item), now)
        home = group.instance
        helper = self._helper(model, home)
        if len(group) > 1 and self._queues[home][0].key.model == self._ledgers[home].model:
            # It stands behind others, which wait for room.
            return (helper,) if helper is not None else ()
        return (home, helper) if helper is not None else (home,)

    def _key(self, item: Tracked) -> GroupKey:
        request = item.request
        return GroupKey(request.model, request.slo_class, self._estimator.band(request), item.served)

    def _helper(self, model: str, home: str) -> str | None:
        """Another instance that has the model loaded and nothing to serve."""
        hungry = self._hungry.get(model)
        while hungry:
            name = next(iter(hungry))
            if self._ledgers[name].next_model == model and name != home:
                return name
            del hungry[name]
        return None

    def _join(self, item: Tracked, key: GroupKey, now: float) -> RequestGroup:
        group, new = self._table.join(item, key, self._group_limit(key))
        if new:
            self._place(group, now)
            self._index(group)
            if self._balancing and self._replan_at == _NEVER:
                self._replan_at = max(now, self._last_replan + self._replan_interval_s)
        return group

    def _group_limit(self, key: GroupKey) -> int:
        """Most requests of a group: δ times the batch that instances run of the model, on average.

        More, where so many of the key wait that every instance has such a group of it: the work of planning
        is not to grow with the backlog.
        """
        limit = self._limits.get(key)
        if limit is None:
            capable = self._capable[key.model]
            length = self._estimator.lengths.of_model(key.model).mean
            batch = 0.0
            for ledger in capable:
                profile = ledger.spec.models[key.model]
                batch += min(profile.max_num_seqs, profile.kv_capacity_tokens / (256 + length))
            most = max(self._delta * batch, self._table.waiting.get(key, 0))
            limit = self._limits[key] = max(1, int(most / len(capable)))
        return limit

    def _regroup(self) -> None:
        """Split groups that are far larger than they would be made now, and merge small neighbours."""
        self._limits.clear()
        for queue in self._queues.values():
            groups: list[RequestGroup] = []
            for group in queue:
                limit = self._group_limit(group.key)
                last = groups[-1] if groups else group
                if (
                    last is not group
                    and len(last) + len(group) <= limit
                    and last.key == group.key
                    and last.last_deadline <= group.first_deadline
                ):
                    self._table.merge(last, group)
                    continue
                groups.append(group)
                while len(group) > 2 * limit:
                    group = self._table.split(group, limit)
                    self._index(group)
                    groups.append(group)
            queue[:] = groups

    def _place(self, group: RequestGroup, now: float) -> None:
        """Put a new group on a virtual queue until the next plan."""
        model = group.key.model
        if group.key.decided and group.head.instance in self._queues:
            # Nothing can be missed any more: behind the others of its model, where it was.
            name = group.head.instance
            queue = self._queues[name]
            same = [p for p, other in enumerate(queue) if other.key.model == model]
            position = same[-1] + 1 if same else len(queue)
        else:
            name, position = self._spot(group, now, self._snapshot)
        group.instance = name
        self._queues[name].insert(position, group)
        self._idle.changed(self._ledgers[name])

    def _spot(self, group: RequestGroup, now: float, snapshot: SnapshotTaker) -> tuple[str, int]:
        """The instance and the position in its queue where a new group is best placed."""
        model = group.key.model
        for ledger in self._idle.least_loaded(model):
            if fits(ledger, group.head, snapshot.estimator, now):
                return ledger.id, 0
        near = self._least_queued(model)
        seen = {ledger.id: [snapshot.group(g, now) for g in self._queues[ledger.id]] for ledger in near}
        states = [snapshot.instance(ledger, now) for ledger in near]
        return insertion(states, seen, snapshot.group(group, now))

    def _least_queued(self, model: str) -> Sequence[InstanceLedger]:
        """Instances to place a group of the model on: the least queued ones, of like ones who have it."""
        near: list[InstanceLedger] = []
        seen = 0
        queues = self._queues
        capable = self._capable[model]
        if len(capable) > 2 * MOST_TRIED:
            ranks = [(len(queues[ledger.id]), at) for at, ledger in enumerate(capable)]
            has = [rank for rank in ranks if capable[rank[1]].next_model == model]
            lacks = [rank for rank in ranks if capable[rank[1]].next_model != model]
            capable = [capable[at] for ranks in (has, lacks) for _, at in nsmallest(MOST_TRIED, ranks)]
        for ledger in sorted(capable, key=lambda i: (len(queues[i.id]), i.next_model != model)):
            near.append(ledger)
            seen += len(queues[ledger.id])
            if seen > MOST_SEEN:
                break
        return near

    def _index(self, group: RequestGroup) -> None:
        index = self._of_model.get(group.key.model)
        if index is None:
            index = self._of_model[group.key.model] = DeadlineIndex(self._table.groups)
        index.add(group)
        if not group.key.decided:
            self._undecided.add(group)

    def discard(self, item: Tracked) -> None:
        group = self._table.leave(item)
        if not group.items:
            self._queues[group.instance].remove(group)
            self._idle.changed(self._ledgers[group.instance])
        elif group.first_deadline < item.deadline:
            # What was evicted before its first token came back behind younger ones.
            self._index(group)

    def _relegate_late(self, group: RequestGroup, now: float) -> None:
        """Move requests whose deadline has passed to a late group of their kind."""
        key = group.key
        late_key = GroupKey(key.model, key.slo_class, key.band, key.served, late=True)
        home = group.instance
        while group.items and group.first_deadline < now:
            item = group.head
            item.instance = home
            self.discard(item)
            self._join(item, late_key, now)
            request = item.request
            left_s = request.arrived_at + 2 * PATIENCE_SLOS * request.slo_s - now
            again_at = now + max(request.slo_s, left_s / 2)
            heappush(self._relegated, (again_at, next(self._turns), item))

    def _give_turns(self, now: float) -> None:
        """Let those that have stood back for long enough wait as if they had just come."""
        relegated = self._relegated
        while relegated and relegated[0][0] <= now:
            _, _, item = heappop(relegated)
            group = item.group
            if group is not None and group.key.late:
                item.instance = group.instance
                self.discard(item)
                item.deadline = now + item.request.slo_s
                self._join(item, self._key(item), now)

    # What an instance does next

    def changed(self, ledger: InstanceLedger) -> None:
        self._idle.changed(ledger)

    def next_for(self, ledger: InstanceLedger, now: float) -> Tracked | None:
        self._idle.changed(ledger)
        if self._relegated:
            self._give_turns(now)
        while not self._undecided.none_before(now):
            late = self._undecided.earliest()
            if late is None or late.first_deadline >= now:
                break
            self._relegate_late(late, now)
        queue = self._queues[ledger.id]
        model = ledger.model
        resident = None
        for group in queue:
            if group.key.model == model:
                resident = group
                break
        if queue and queue[0] is not resident:
            if self._should_switch(ledger, resident, now):
                return queue[0].head
        else:
            self._switch_at.set(ledger.id, _NEVER)
        if resident is None and self._balancing and model is not None:
            resident = self._steal(model)
            if resident is None:
                self._hungry.setdefault(model, {})[ledger.id] = None
        return resident.head if resident is not None else None

    def _should_switch(self, ledger: InstanceLedger, resident: RequestGroup | None, now: float) -> bool:
        """Whether to leave the loaded model for that of the first group of the queue.

        A deadline may force it. Otherwise work decides: a visit is left when the next one gets more done per
        second, its swap included; or, for groups that have nothing to win any more, when it has been long
        enough that swaps cost little.
        """
        outlook = self._outlook(ledger, now)
        model, service = outlook.model, outlook.service
        overhead_s = self._snapshot.leave_s(ledger, now) + ledger.swap_s(model)
        visit = best_visit(service, outlook.requests, overhead_s)
        # A model serves for as long as loading it took, so that swaps never take more than half the time.
        settled_at = now
        if ledger.running or outlook.joining:
            settled_at = max(now, ledger.loaded_at + ledger.swap_s(ledger.model or model))
        leave_at = _NEVER
        # What was just pulled has its first token first: else it would be taken off again for nothing.
        if not ledger.prefilling_tokens and visit.rate > self._snapshot.batch_use(ledger, outlook.joining):
            leave_at = now
        else:
            # The time that the swap takes could serve others, of whom that share is about to miss.
            lost = self._miss_share * overhead_s / (service.prefill_s + service.decode_s)
            if outlook.undecided > lost:
                leave_at = outlook.latest_at - (1 + MARGIN_SHARE) * overhead_s
            if resident is not None:
                leave_at = min(leave_at, ledger.loaded_at + overhead_s / FAIRNESS_SHARE)
        leave_at = max(leave_at, settled_at)
        self._switch_at.set(ledger.id, leave_at if leave_at > now else _NEVER)
        return leave_at <= now

    def _outlook(self, ledger: InstanceLedger, now: float) -> "_Outlook":
        """What the queue holds for the model of its first group."""
        queue = self._queues[ledger.id]
        known = self._outlooks.get(ledger.id)
        if (
            known is not None
            and len(queue) > SHORT_QUEUE
            and now - known.made_at < OUTLOOK_S
            and known.queue == queue
        ):
            return known
        first = queue[0].key.model
        requests = undecided = joining = 0
        clock_s = 0.0
        free = 1.0
        model = first
        latest_at = _NEVER
        for group in queue:
            service = self._snapshot.service_on(ledger, group)
            if group.key.model != model:
                model = group.key.model
                clock_s += ledger.swap_s(model)
                free = 1.0
            if not group.key.decided and model != ledger.model:
                start_s = clock_s + service.prefill_s
                if model == first:
                    undecided += len(group)
                if model == first or group.first_deadline > now + start_s:
                    latest_at = min(latest_at, group.first_deadline - start_s - self._margin_s(start_s))
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

    @staticmethod
    def _margin_s(ahead_s: float) -> float:
        """Seconds kept in hand before a deadline that lies ``ahead_s`` of work away."""
        return MARGIN_S + MARGIN_SHARE * ahead_s

    def _steal(self, model: str) -> RequestGroup | None:
        """The most urgent group of the model, wherever it waits.

        Not one whose own instance is loading the model: it waits for that.
        """
        index = self._of_model.get(model)
        best = index.earliest() if index is not None else None
        if best is not None:
            own = self._ledgers[best.instance]
            if own.model != model == own.next_model and own.ready_at < best.first_deadline:
                return None
        return best

    def victims(self, ledger: InstanceLedger, item: Tracked, now: float) -> Sequence[Tracked]:
        """Running requests to evict when waiting for departures would miss the deadline.

        Those of looser classes, and of its own where nothing is promised beyond the first token, which they
        have.
        """
        if (
            item.served
            or item.deadline < now
            or (item.request.slo_s >= self._loosest_slo_s and not self._first_token_only)
        ):
            return ()
        group = item.group
        assert group is not None
        service = self._snapshot.service_on(ledger, group)
        need = item.context_tokens
        each = ledger.context_tokens / len(ledger.running)
        wait_s = max(1.0, need / each) * service.decode_s
        if now + wait_s + service.prefill_s + self._margin_s(wait_s) < item.deadline:
            return ()
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
        chosen: list[Tracked] = []
        for other in looser:
            if need <= 0:
                break
            chosen.append(other)
            need -= other.pulled_context
        return chosen if need <= 0 else ()

    def _promises_no_more(self, item: Tracked) -> bool:
        return item.request.slo_class in self._first_token_only

    # The global plan

    def replan(self, now: float) -> Replan | None:
        if now < self._replan_at or not self._balancing:
            return None
        self._replan_at = _NEVER
        if not self._table.groups:
            return None
        self._regroup()
        self._last_replan = now
        self._replan_at = now + self._replan_interval_s
        self._problems += 1
        return Replan(
            PlanProblem(
                number=self._problems,
                groups=tuple(self._snapshot.group(g, now) for g in self._table.groups.values()),
                instances=tuple(self._snapshot.instances(now)),
                current={name: tuple(g.id for g in queue) for name, queue in self._queues.items()},
            )
        )

    def adopt(self, plan: Plan, now: float) -> Iterable[str]:
        if plan.number != self._problems:
            return ()
        groups = self._table.groups
        undecided = sum(len(g) for g in groups.values() if not g.key.decided)
        self._miss_share = min(1.0, plan.cost / undecided) if undecided else 0.0
        awaited = self._awaited()
        planned: set[int] = set()
        for name, ledger in self._ledgers.items():
            kept = []
            for group_id in plan.queues.get(name, ()):
                group = groups.get(group_id)
                if group is None:
                    continue
                if group_id in awaited and group.instance != name and group.key.model != ledger.model:
                    continue
                group.instance = name
                kept.append(group)
                planned.add(group_id)
            self._queues[name] = kept
            self._idle.changed(self._ledgers[name])
        for group in groups.values():
            if group.id in planned:
                continue
            if group.id in awaited:
                self._queues[group.instance].insert(0, group)
            else:
                self._place(group, now)
        return tuple(self._queues)

    def _awaited(self) -> set[int]:
        """Groups whose instance is loading their model: they wait for it."""
        return {
            group.id
            for name, queue in self._queues.items()
            if (wanted := self._ledgers[name].next_model) != self._ledgers[name].model
            for group in queue
            if group.key.model == wanted
        }


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
