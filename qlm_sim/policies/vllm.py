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
        self.added_s: list[float] = []
        """Engine seconds of one request there with the swap that it would take ..."""
        self.wait_s: list[float] = []
        """... and behind all that is there."""

    def append(self, instance: str, request_s: float) -> None:
        self.instances.append(instance)
        self.added_s.append(request_s)
        self.wait_s.append(request_s)


class _Line:
    """What waits for one instance."""

    __slots__ = ("charges", "ledger", "places", "queue", "queued_s")

    def __init__(self, ledger: InstanceLedger) -> None:
        self.ledger = ledger
        self.queue: deque[Tracked] = deque()
        self.charges: deque[float] = deque()
        """What each of them added to ..."""
        self.queued_s = 0.0
        """... the engine seconds that the queue stands for: service and the swaps between its models."""
        self.places: list[tuple[str, float, _Route, int]] = []
        """The models that are routed here, engine seconds of one request of each, their routes, and the
        instance's place in each."""


class VllmPolicy:
    """FCFS per instance, least-loaded dispatch."""

    name = "vllm"
    holds_back = False
    evicts_to_swap = False
    overtaking = Overtaking.NONE

    def __init__(self, estimator: ServiceEstimator) -> None:
        self._estimator = estimator
        self.wake_at = float("inf")

    def start(self, ledgers: dict[str, InstanceLedger]) -> None:
        self._lines = {name: _Line(ledger) for name, ledger in ledgers.items()}
        self._stale = dict(self._lines)
        """Those whose waits must be computed anew."""
        self._waiting = 0
        self.at_rest = True
        self._routes: dict[str, _Route] = {}
        """By model."""
        at_home = {ledger.spec.resident for ledger in ledgers.values()}
        for ledger in ledgers.values():
            for model, profile in ledger.spec.models.items():
                if model in at_home and model != ledger.spec.resident:
                    continue
                lengths = self._estimator.lengths.of_model(model)
                service = group_service(profile, TYPICAL_PROMPT_TOKENS, lengths)
                request_s = service.prefill_s + service.decode_s
                route = self._routes.setdefault(model, _Route())
                self._lines[ledger.id].places.append((model, request_s, route, len(route.instances)))
                route.append(ledger.id, request_s)

    def add(self, item: Tracked, now: float) -> Iterable[str]:
        chosen, charge_s = self._route(item.request.model)
        item.instance = chosen
        self._waiting += 1
        self.at_rest = False
        line = self._stale[chosen] = self._lines[chosen]
        line.queue.append(item)
        line.charges.append(charge_s)
        line.queued_s += charge_s
        return (chosen,)

    def _route(self, model: str) -> tuple[str, float]:
        """The instance where a request of the model would wait least, and the seconds that it adds there.

        Waits are computed anew first, where they may have changed.
        """
        for line in self._stale.values():
            ledger, queue, queued_s = line.ledger, line.queue, line.queued_s
            last = queue[-1].request.model if queue else ledger.next_model()
            running = len(ledger.running)
            for served, request_s, route, place in line.places:
                added_s = request_s
                if last != served:
                    added_s += ledger.swap_s(served)
                route.added_s[place] = added_s
                route.wait_s[place] = running * request_s + queued_s + added_s
        self._stale.clear()
        route = self._routes[model]
        place = route.wait_s.index(min(route.wait_s))
        return route.instances[place], route.added_s[place]

    def discard(self, item: Tracked) -> None:
        name = item.instance
        line = self._stale[name] = self._lines[name]
        queue, charges = line.queue, line.charges
        if queue[0] is item:
            queue.popleft()
            charge_s = charges.popleft()
        else:
            place = queue.index(item)
            charge_s = charges[place]
            del queue[place], charges[place]
        line.queued_s = line.queued_s - charge_s if queue else 0.0
        self._waiting -= 1
        self.at_rest = not self._waiting

    def changed(self, ledger: InstanceLedger) -> None:
        name = ledger.id
        self._stale[name] = self._lines[name]

    def next_for(self, ledger: InstanceLedger, now: float) -> Tracked | None:
        queue = self._lines[ledger.id].queue
        return queue[0] if queue else None

    def woken(self, now: float) -> Iterable[str]:
        return ()

    def victims(self, ledger: InstanceLedger, item: Tracked, now: float) -> Sequence[Tracked]:
        return ()

    def order(self, ledger: InstanceLedger, now: float) -> Sequence[RequestGroup]:
        return stretches(self._lines[ledger.id].queue)

    def standing(self, item: Tracked, now: float) -> Standing:
        return Standing((item.instance,), self._lines[item.instance].queue.index(item))

    def standing_of_new(self, request: Request, now: float) -> Standing:
        instance, _ = self._route(request.model)
        return Standing((instance,), len(self._lines[instance].queue))

    def replan(self, now: float) -> Replan | None:
        return None

    def adopt(self, plan: Plan, now: float) -> Iterable[str]:
        return ()
