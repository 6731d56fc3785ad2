"""Virtual queues: the groups in line for each instance, and where a new one stands until the next plan.

Knows deadlines: what has missed its own steps behind what can still be met, and has a turn later on. Decides
nothing about what an instance does with its queue.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from heapq import heappop, heappush, nsmallest
from itertools import count

from qlm_sim.core.deadlines import DeadlineIndex
from qlm_sim.core.groups import GroupKey, GroupTable, RequestGroup
from qlm_sim.core.instances import InstanceLedger, by_model
from qlm_sim.core.lifecycle import Tracked
from qlm_sim.core.lso import fits
from qlm_sim.core.plan import Plan
from qlm_sim.core.types import Request
from qlm_sim.policies.idle import IdleInstances
from qlm_sim.policies.snapshot import SnapshotTaker
from qlm_sim.solver.search import insertion
from qlm_sim.solver.turns import behind_its_like

_NEVER = float("inf")
_key = cache(GroupKey)
MOST_SEEN = 128
"""Between two plans a new group is tried on instances that have about so many groups together ..."""
MOST_TRIED = 6
"""... and no more than so many that have its model and so many that do not."""
PATIENCE_SLOS = 30.0
"""What was late stands back behind all that can be met for so many times its SLO, then has a turn as if it
had just come; the next turn half as long after that, and so on. So no overload starves it: soon after twice
so many SLOs its turns come one after the other, and at each it is met as likely as a new one is.
"""


class VirtualQueues:
    """The groups that wait, each on the queue of one instance."""

    def __init__(self, ledgers: Mapping[str, InstanceLedger], snapshot: SnapshotTaker, delta: float) -> None:
        """``delta``: most requests of a group, as a share of the average batch."""
        self._ledgers = ledgers
        self._snapshot = snapshot
        self._band = snapshot.estimator.band
        self._delta = delta
        self._table = GroupTable()
        self.groups: Mapping[int, RequestGroup] = self._table.groups
        """All of them, by id."""
        self.of: dict[str, list[RequestGroup]] = {name: [] for name in ledgers}
        """By instance, in the order in which it serves them."""
        self.idle = IdleInstances(ledgers, self.of)
        self._capable = by_model(ledgers)
        self._limits: dict[GroupKey, int] = {}
        """Sizes of new groups, as reckoned since the last ``regroup`` ..."""
        self._waiting: dict[GroupKey, int] = {}
        """... when so many requests of each key waited."""
        self._of_model: dict[tuple[str, bool], DeadlineIndex] = {}
        """By model: groups with something to win, and (True) those that are decided."""
        self._undecided = DeadlineIndex(self._table.groups)
        self._relegated: list[tuple[float, int, Tracked]] = []
        """Heap of what has been late, by when its next turn comes; it may have left since."""
        self._turns = count()
        self.review_at = _NEVER
        """When it is time for ``review``, at the earliest."""

    # Coming and going

    def key(self, request: Request, served: bool, late: bool = False) -> GroupKey:
        return _key(request.model, request.slo_class, self._band(request), served, late)

    def join(self, item: Tracked, now: float, late: bool = False) -> RequestGroup:
        """``item`` waits from now on. A group of it alone is new, and has been placed."""
        key = self.key(item.request, item.served, late)
        group, new = self._table.join(item, key, self._limits.get(key) or self._limit(key))
        if new:
            self._place(group, now)
            self._index(group)
        return group

    def open_group(self, key: GroupKey) -> RequestGroup | None:
        """The group that the next request of that key would join; None if it would make a new one."""
        return self._table.open_group(key)

    def leave(self, item: Tracked) -> None:
        group = self._table.leave(item)
        if not group.items:
            self.of[group.instance].remove(group)
            self.idle.changed(self._ledgers[group.instance])
        elif group.items[0].deadline < item.deadline:
            # What was evicted before its first token came back behind younger ones.
            self._index(group)

    def _index(self, group: RequestGroup) -> None:
        kind = group.model, group.decided
        index = self._of_model.get(kind)
        if index is None:
            index = self._of_model[kind] = DeadlineIndex(self._table.groups)
        index.add(group)
        if not group.decided:
            self._undecided.add(group)
            if group.first_deadline < self.review_at:
                self.review_at = group.first_deadline

    def most_urgent(self, model: str, *, decided: bool) -> RequestGroup | None:
        """The group of the model with the earliest deadline, of those with something to win or of others."""
        index = self._of_model.get((model, decided))
        return index.earliest() if index is not None else None

    # Groups

    def _limit(self, key: GroupKey) -> int:
        """Most requests of a group: δ times the batch that instances run of the model, on average.

        More, where so many of the key wait that every instance has such a group of it: the work of planning
        is not to grow with the backlog.
        """
        capable = self._capable[key.model]
        length = self._snapshot.lengths_of(key.model).mean
        batch = 0.0
        for ledger in capable:
            profile = ledger.spec.models[key.model]
            batch += min(profile.max_num_seqs, profile.kv_capacity_tokens / (256 + length))
        most = max(self._delta * batch, self._waiting.get(key, 0))
        limit = self._limits[key] = max(1, int(most / len(capable)))
        return limit

    def regroup(self) -> None:
        """Split groups that are far larger than they would be made now, and merge small neighbours."""
        limits, waiting = self._limits, self._waiting
        limits.clear()
        waiting.clear()
        for group in self.groups.values():
            key = group.key
            waiting[key] = waiting.get(key, 0) + len(group.items)
        for queue in self.of.values():
            groups: list[RequestGroup] = []
            last = None
            for group in queue:
                key, size = group.key, len(group.items)
                limit = limits.get(key) or self._limit(key)
                if (
                    last is not None
                    and len(last.items) + size <= limit
                    and last.key == key
                    and last.last_deadline <= group.first_deadline
                ):
                    self._table.merge(last, group)
                    continue
                groups.append(group)
                while len(group.items) > 2 * limit:
                    group = self._table.split(group, limit)
                    self._index(group)
                    groups.append(group)
                last = group
            queue[:] = groups

    # Places

    def _place(self, group: RequestGroup, now: float) -> None:
        """Put a new group on a virtual queue until the next plan."""
        model = group.model
        if group.decided and group.head.instance in self.of:
            # Nothing can be missed any more: behind the others of its model, where it was.
            name = group.head.instance
            queue = self.of[name]
            same = [p for p, other in enumerate(queue) if other.model == model]
            position = same[-1] + 1 if same else len(queue)
        else:
            name, position = self.spot(group, now, self._snapshot)
        group.instance = name
        self.of[name].insert(position, group)
        self.idle.changed(self._ledgers[name])

    def spot(self, group: RequestGroup, now: float, snapshot: SnapshotTaker) -> tuple[str, int]:
        """The instance and the position in its queue where a new group is best placed."""
        model = group.model
        for ledger in self.idle.least_loaded(model):
            if fits(ledger, group.head, snapshot.estimator, now):
                return ledger.id, 0
        near = self._least_queued(model)
        seen = {ledger.id: [snapshot.group(g, now) for g in self.of[ledger.id]] for ledger in near}
        states = [snapshot.instance(ledger, now) for ledger in near]
        taken = snapshot.group(group, now)
        name, position = insertion(states, seen, taken)
        state = next(each for each in states if each.id == name)
        return name, behind_its_like(state, seen[name], taken, position)

    def _least_queued(self, model: str) -> Sequence[InstanceLedger]:
        """Instances to place a group of the model on: the least queued ones, of like ones who have it."""
        near: list[InstanceLedger] = []
        seen = 0
        queues = self.of
        capable = self._capable[model]
        if len(capable) > 2 * MOST_TRIED:
            ranks = [(len(queues[ledger.id]), at) for at, ledger in enumerate(capable)]
            has = [rank for rank in ranks if capable[rank[1]].next_model() == model]
            lacks = [rank for rank in ranks if capable[rank[1]].next_model() != model]
            capable = [capable[at] for ranks in (has, lacks) for _, at in nsmallest(MOST_TRIED, ranks)]
        for ledger in sorted(capable, key=lambda i: (len(queues[i.id]), i.next_model() != model)):
            near.append(ledger)
            seen += len(queues[ledger.id])
            if seen > MOST_SEEN:
                break
        return near

    # Lateness

    def review(self, now: float) -> None:
        """Let what has missed its deadline step back, and what stood back for long enough have a turn."""
        self._give_turns(now)
        while (late := self._undecided.earliest()) is not None and late.first_deadline < now:
            self._relegate_late(late, now)
        self.review_at = min(self._undecided.next_at, self._relegated[0][0] if self._relegated else _NEVER)

    def _relegate_late(self, group: RequestGroup, now: float) -> None:
        """Move requests whose deadline has passed to a late group of their kind."""
        home = group.instance
        while group.items and group.first_deadline < now:
            item = group.head
            item.instance = home
            self.leave(item)
            self.join(item, now, late=True)
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
                self.leave(item)
                item.deadline = now + item.request.slo_s
                self.join(item, now)

    # Plans

    def adopt(self, plan: Plan, now: float) -> Sequence[str]:
        """Order the groups as planned, as far as they are still there. Those that came since are placed.

        Returns the instances whose queue is another than before.
        """
        awaited = self._awaited()
        groups, before = self.groups, dict(self.of)
        planned: set[int] = set()
        for name, ledger in self._ledgers.items():
            kept = []
            for group_id in plan.queues.get(name, ()):
                group = groups.get(group_id)
                if group is None:
                    continue
                if group_id in awaited and group.instance != name and group.model != ledger.model:
                    continue
                group.instance = name
                kept.append(group)
                planned.add(group_id)
            self.of[name] = kept
            self.idle.changed(ledger)
        for group in groups.values():
            if group.id in planned:
                continue
            if group.id in awaited:
                self.of[group.instance].insert(0, group)
            else:
                self._place(group, now)
        return [name for name, queue in self.of.items() if queue != before[name]]

    def _awaited(self) -> set[int]:
        """Groups whose instance is loading their model: they wait for it."""
        return {
            group.id
            for name, queue in self.of.items()
            if (wanted := self._ledgers[name].next_model()) != self._ledgers[name].model
            for group in queue
            if group.model == wanted
        }
