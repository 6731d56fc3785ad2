"""vLLM behind a least-loaded router: first come, first served on every instance.

As operators run it: an instance serves the model that it started with, and a router sends each
request to the least loaded instance of its model. A model that no instance started with goes to
whichever instance should serve it first, swaps included; there the request at the head of the queue
decides which model is loaded, once the engine has run empty. Requests wait in arrival order, and the
engine gets everything at once, as far as the loaded model reaches.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from qlm_sim.core.actions import Replan
from qlm_sim.core.groups import RequestGroup
from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lifecycle import Tracked
from qlm_sim.core.plan import Plan
from qlm_sim.core.policy import Overtaking, Standing
from qlm_sim.core.types import Request
from qlm_sim.estimator.service import ServiceEstimator, group_service
from qlm_sim.policies.lines import stretches

TYPICAL_PROMPT_TOKENS = 256
"""Prompt length at which instances are compared; only the ratios between them matter."""


class _Route:
    """Where requests of one model may run. Lists of one length."""

    def __init__(self) -> None:
        self.instances: list[str] = []
        self.request_s: list[float] = []
        """Engine seconds of one request there ..."""
        self.added_s: list[float] = []
        """... with the swap that it would take ..."""
        self.wait_s: list[float] = []
        """... and behind all that is there."""

    def append(self, instance: str, request_s: float) -> None:
        self.instances.append(instance)
        for column in (self.request_s, self.added_s, self.wait_s):
            column.append(request_s)


class VllmPolicy:
    """FCFS per instance, least-loaded dispatch."""

    name = "vllm"
    holds_back = False
    evicts_to_swap = False
    overtaking = Overtaking.NONE
    wake_at = float("inf")

    def __init__(self, estimator: ServiceEstimator) -> None:
        self._estimator = estimator

    def start(self, ledgers: dict[str, InstanceLedger]) -> None:
        self._ledgers = ledgers
        self._queues: dict[str, deque[Tracked]] = {name: deque() for name in ledgers}
        self._queued_s = dict.fromkeys(ledgers, 0.0)
        """Engine seconds that each queue stands for: service and the swaps between its models."""
        self.at_rest = True
        self._charges: dict[str, float] = {}
        """What each waiting request added to its queue's seconds."""
        self._routes: dict[str, _Route] = {}
        """By model."""
        self._places: dict[str, list[tuple[str, _Route, int]]] = {name: [] for name in ledgers}
        """By instance: the models that are routed there, their routes, and its place in each."""
        self._stale: dict[str, InstanceLedger] = {}
        """Instances whose waits must be computed anew."""
        at_home = {ledger.spec.resident for ledger in ledgers.values()}
        for ledger in ledgers.values():
            for model, profile in ledger.spec.models.items():
                if model in at_home and model != ledger.spec.resident:
                    continue
                lengths = self._estimator.lengths.of_model(model)
                service = group_service(profile, TYPICAL_PROMPT_TOKENS, lengths)
                request_s = service.prefill_s + service.decode_s
                route = self._routes.setdefault(model, _Route())
                self._places[ledger.id].append((model, route, len(route.instances)))
                route.append(ledger.id, request_s)
            self._stale[ledger.id] = ledger

    def add(self, item: Tracked, now: float) -> Iterable[str]:
        chosen, charge_s = self._route(item.request.model)
        item.instance = chosen
        self._charges[item.request.id] = charge_s
        self.at_rest = False
        self._queues[chosen].append(item)
        self._queued_s[chosen] += charge_s
        self._stale[chosen] = self._ledgers[chosen]
        return (chosen,)

    def _route(self, model: str) -> tuple[str, float]:
        """The instance where a request of the model would wait least, and the seconds that it adds there."""
        for ledger in self._stale.values():
            self._refresh(ledger)
        self._stale.clear()
        route = self._routes[model]
        place = route.wait_s.index(min(route.wait_s))
        return route.instances[place], route.added_s[place]

    def _refresh(self, ledger: InstanceLedger) -> None:
        """Compute anew what a request of each model would wait for on the instance."""
        name = ledger.id
        queue = self._queues[name]
        last = queue[-1].request.model if queue else ledger.next_model
        running, queued_s = len(ledger.running), self._queued_s[name]
        for model, route, place in self._places[name]:
            added_s = request_s = route.request_s[place]
            if last != model:
                added_s += ledger.swap_s(model)
            route.added_s[place] = added_s
            route.wait_s[place] = running * request_s + queued_s + added_s

    def discard(self, item: Tracked) -> None:
        name = item.instance
        queue = self._queues[name]
        if queue[0] is item:
            queue.popleft()
        else:
            queue.remove(item)
        charge_s = self._charges.pop(item.request.id)
        self.at_rest = not self._charges
        self._queued_s[name] = self._queued_s[name] - charge_s if queue else 0.0
        self._stale[name] = self._ledgers[name]

    def changed(self, ledger: InstanceLedger) -> None:
        self._stale[ledger.id] = ledger

    def next_for(self, ledger: InstanceLedger, now: float) -> Tracked | None:
        queue = self._queues[ledger.id]
        return queue[0] if queue else None

    def woken(self, now: float) -> Iterable[str]:
        return ()

    def victims(self, ledger: InstanceLedger, item: Tracked, now: float) -> Sequence[Tracked]:
        return ()

    def order(self, ledger: InstanceLedger, now: float) -> Sequence[RequestGroup]:
        return stretches(self._queues[ledger.id])

    def standing(self, item: Tracked, now: float) -> Standing:
        return Standing((item.instance,), self._queues[item.instance].index(item))

    def standing_of_new(self, request: Request, now: float) -> Standing:
        instance, _ = self._route(request.model)
        return Standing((instance,), len(self._queues[instance]))

    def replan(self, now: float) -> Replan | None:
        return None

    def adopt(self, plan: Plan, now: float) -> Iterable[str]:
        return ()
