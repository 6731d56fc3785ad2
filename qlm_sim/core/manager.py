"""The scheduler core: facts in, orders out, and nothing else.

``handle(now, events)`` applies every event of one instant and then decides once. It knows no clock,
no engine and no file, so a run can be replayed from its event log, and a test needs only lists.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from qlm_sim.core.actions import Action, Evict, Reject
from qlm_sim.core.admission import Admission
from qlm_sim.core.events import (
    EngineReported,
    Event,
    FirstToken,
    InstanceDown,
    InstanceUp,
    ModelSwapped,
    PlanReady,
    Progress,
    RequestArrived,
    RequestCancelled,
    RequestEvicted,
    RequestFailed,
    RequestFinished,
    TimerFired,
)
from qlm_sim.core.forecast import Forecast
from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lifecycle import EVICTING, RUNNING, WAITING, Tracked
from qlm_sim.core.lso import LsoAgent
from qlm_sim.core.policy import Estimator, Forecaster, Learner, Policy
from qlm_sim.core.types import InstanceSpec, Lso, Request


class QueueManager:
    """Tracks every live request and every instance, and lets the policy and the agents decide."""

    def __init__(
        self,
        instances: Sequence[InstanceSpec],
        policy: Policy,
        estimator: Estimator,
        learner: Learner | None,
        forecaster: Callable[[], Forecaster],
        allowed: frozenset[Lso] = frozenset(Lso),
        admission: Admission | None = None,
    ) -> None:
        """``learner``: who is told what happens; ``forecaster``: makes the one that is asked;
        ``admission``: None lets everything in."""
        self.policy = policy
        self._admission = admission
        self.estimator = estimator
        self._learner = learner
        self._make_forecaster = forecaster
        self.requests: dict[str, Tracked] = {}
        self.ledgers = {spec.id: InstanceLedger(spec) for spec in instances}
        self.stale_events = 0
        """Engine events of attempts that were over: counted and dropped."""
        self._holds_back = policy.holds_back
        self._agent = LsoAgent(policy, estimator, allowed)
        self._touched: dict[str, None] = {}
        self._served = frozenset(model for spec in instances for model in spec.models)
        """Models that some instance may serve."""
        self._stranded: dict[str, Tracked] = {}
        """Requests for other models, which wait for an instance to come up."""
        self._apply: dict[type, Callable[[float, Any], None]] = {
            RequestArrived: self._arrived,
            RequestCancelled: self._cancelled,
            FirstToken: self._first_token,
            Progress: self._progress,
            RequestFinished: self._finished,
            RequestEvicted: self._evicted,
            RequestFailed: self._failed,
            ModelSwapped: self._swapped,
            InstanceUp: self._instance_up,
            InstanceDown: self._instance_down,
            EngineReported: self._reported,
            PlanReady: self._plan_ready,
            TimerFired: self._timer_fired,
        }
        policy.start(self.ledgers)
        self.wake_at = policy.wake_at
        """When the policy wants a TimerFired, in seconds; infinity for never."""

    def handle(self, now: float, events: Sequence[Event]) -> list[Action]:
        """Apply the events of one instant, then decide once."""
        actions: list[Action] = []
        self._orders = actions
        apply, touched = self._apply, self._touched
        for event in events:
            apply[type(event)](now, event)
        policy = self.policy
        if touched:
            for instance in touched:
                if policy.at_rest:
                    break
                ledger = self.ledgers.get(instance)
                if ledger is not None:
                    self._agent.reconcile(ledger, now, actions)
            touched.clear()
        wake_at = policy.wake_at
        if wake_at <= now:
            replan = policy.replan(now)
            if replan is not None:
                actions.append(replan)
            wake_at = policy.wake_at
        self.wake_at = wake_at
        return actions

    # Questions. What is asked, and when, changes no decision.

    @cached_property
    def forecaster(self) -> Forecaster:
        """Who is asked."""
        return self._make_forecaster()

    def forecast(self, request_id: str, now: float) -> Forecast | None:
        """The wait, from ``now``, for the first token of a request that arrived.

        None where there is no such request, where it has its first token already, or where no instance
        serves its model now. Read
        ``position``, ``mean_s``, ``median_s``, ``quantile(p)`` and ``p_slo_met`` of the answer. Make the core
        with ``SchedulerSettings(forecasts=True)``, or some policies' cores learn nothing. Takes
        microseconds while the last forecast of the line is fresh, and some milliseconds to make a new one.
        """
        item = self.requests.get(request_id)
        if item is None or item.served or request_id in self._stranded:
            return None
        standing = None
        if item.state is WAITING:
            standing = self.policy.standing(item, now)
        elif item.state is EVICTING:
            standing = self.policy.standing_of_new(item.request, now)
        return self.forecaster.forecast(item, standing, self.ledgers, self.policy.order, now)

    def forecast_new(self, request: Request, now: float) -> Forecast:
        """The wait of a request if it arrived now. It is not let in, and nothing is kept of it.

        Its model must be one that an instance may serve (``serves``).
        """
        standing = self.policy.standing_of_new(request, now)
        return self.forecaster.forecast(Tracked(request), standing, self.ledgers, self.policy.order, now)

    def serves(self, model: str) -> bool:
        """Whether some instance that is up may serve the model."""
        return model in self._served

    # Events, one method each. Each marks the instances whose decision it may change.

    def _arrived(self, now: float, event: RequestArrived) -> None:
        request = event.request
        item = Tracked(request, event.output_tokens)
        admission = self._admission
        if admission is not None and self.serves(request.model):
            standing = self.policy.standing_of_new(request, now)
            order = self.policy.order
            forecast = admission.forecaster.forecast(item, standing, self.ledgers, order, now)
            if admission.refuses(forecast):
                self._orders.append(Reject(request.id, forecast.mean_s))
                return
        self.requests[request.id] = item
        if self._learner is not None:
            self._learner.arrived(item, now)
        self._wait(item, now)

    def _wait(self, item: Tracked, now: float) -> None:
        if item.request.model not in self._served:
            self._stranded[item.request.id] = item
            return
        for instance in self.policy.add(item, now):
            self._touched[instance] = None

    def _cancelled(self, now: float, event: RequestCancelled) -> None:
        item = self.requests.get(event.request_id)
        if item is None:
            self.stale_events += 1
        elif item.state is WAITING:
            item.cancelled = True
            if self._stranded.pop(event.request_id, None) is None:
                self.policy.discard(item)
            del self.requests[event.request_id]
        else:
            item.cancelled = True
            if item.state is RUNNING:
                item.state = EVICTING
                self.ledgers[item.instance].evicting += 1
                self._orders.append(Evict(event.request_id, item.attempt, item.instance, keep_kv=False))

    def _on_engine(self, request_id: str, attempt: int, instance: str) -> Tracked | None:
        """The request that an event speaks of, or None if that attempt is over."""
        item = self.requests.get(request_id)
        if (
            item is not None
            and item.attempt == attempt
            and item.instance == instance
            and item.state is not WAITING
        ):
            return item
        self.stale_events += 1
        return None

    def _first_token(self, now: float, event: FirstToken) -> None:
        item = self._on_engine(event.request_id, event.attempt, event.instance)
        if item is not None:
            item.served = True
            ledger = self.ledgers[event.instance]
            if self._learner is not None:
                self._learner.first_token(ledger, item, now)
            if self._holds_back and ledger.prefill_is_full(item.request.model):
                # Prompts, its own among them, kept others from being pulled.
                self._touched[event.instance] = None
            ledger.began_decoding(item, now)

    def _progress(self, now: float, event: Progress) -> None:
        item = self._on_engine(event.request_id, event.attempt, event.instance)
        if item is not None:
            item.output_tokens = event.output_tokens

    def _leave_engine(self, ledger: InstanceLedger, item: Tracked) -> None:
        if item.state is EVICTING:
            ledger.evicting -= 1
        ledger.left(item)
        self.policy.changed(ledger)
        self._touched[ledger.id] = None

    def _finished(self, now: float, event: RequestFinished) -> None:
        item = self._on_engine(event.request_id, event.attempt, event.instance)
        if item is not None:
            ledger = self.ledgers[event.instance]
            if self._learner is not None:
                self._learner.finished(ledger, item, now, event.output_tokens)
            self._leave_engine(ledger, item)
            del self.requests[event.request_id]

    def _evicted(self, now: float, event: RequestEvicted) -> None:
        item = self._on_engine(event.request_id, event.attempt, event.instance)
        if item is None:
            return
        ledger = self.ledgers[event.instance]
        if self._learner is not None:
            self._learner.left(ledger, item, now, event.output_tokens)
        self._leave_engine(ledger, item)
        if item.cancelled:
            del self.requests[event.request_id]
            return
        item.state = WAITING
        item.output_tokens = event.output_tokens
        item.kv_home = event.instance if event.kv_on_host else None
        if item.served:
            item.deadline = now + item.request.slo_s
        self._wait(item, now)

    def _failed(self, now: float, event: RequestFailed) -> None:
        item = self._on_engine(event.request_id, event.attempt, event.instance)
        if item is not None:
            ledger = self.ledgers[event.instance]
            if self._learner is not None:
                self._learner.left(ledger, item, now, None)
            self._leave_engine(ledger, item)
            del self.requests[event.request_id]

    def _swapped(self, now: float, event: ModelSwapped) -> None:
        ledger = self.ledgers.get(event.instance)
        if ledger is None:
            self.stale_events += 1
            return
        ledger.swapped(event.model, event.swap_s)
        ledger.model = event.model
        ledger.swapping_to = None
        ledger.loaded_at = now
        ledger.host.touch(event.model, ledger.spec.models[event.model].weight_bytes)
        self.policy.changed(ledger)
        self._touched[event.instance] = None

    def _instance_up(self, now: float, event: InstanceUp) -> None:
        self.ledgers[event.spec.id] = InstanceLedger(event.spec)
        self._restart_policy(now)

    def _instance_down(self, now: float, event: InstanceDown) -> None:
        ledger = self.ledgers.pop(event.instance)
        for item in ledger.running.values():
            if self._learner is not None:
                self._learner.left(ledger, item, now, None)
            item.state = WAITING
            item.first_token_at = None
            if item.served:
                item.deadline = now + item.request.slo_s
            if item.cancelled:
                del self.requests[item.request.id]
        for item in self.requests.values():
            if item.kv_home == event.instance:
                item.kv_home = None
        self._restart_policy(now)

    def _restart_policy(self, now: float) -> None:
        """The set of instances changed: everything that waits is placed anew."""
        self.policy.start(self.ledgers)
        self._served = frozenset(model for ledger in self.ledgers.values() for model in ledger.spec.models)
        self._stranded.clear()
        for item in self.requests.values():
            if item.state is WAITING:
                item.group = None
                self._wait(item, now)

    def _reported(self, now: float, event: EngineReported) -> None:
        ledger = self.ledgers.get(event.instance)
        if ledger is None:
            self.stale_events += 1
            return
        ledger.reported = event
        if self._learner is not None:
            self._learner.reported(ledger, now)
        self._touched[event.instance] = None

    def _plan_ready(self, now: float, event: PlanReady) -> None:
        for instance in self.policy.adopt(event.plan, now):
            self._touched[instance] = None

    def _timer_fired(self, now: float, event: TimerFired) -> None:
        for instance in self.policy.woken(now):
            self._touched[instance] = None
