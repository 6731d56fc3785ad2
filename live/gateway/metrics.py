"""/metrics: what the gateway, the scheduler and the engines do, for Prometheus.

vLLM's names where the meaning is the same (``vllm:...``), as seen by the client: waits in the gateway count.
``request_slo_violation_total`` and ``request_predicted_ttft_seconds`` are the names that other routers use.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

from live.gateway.accuracy import Accuracy
from live.gateway.intake import Entry
from live.gateway.logs import RequestLog
from qlm_sim.core.actions import Action, Evict, Replan, SwapModel
from qlm_sim.core.events import Event, ModelSwapped

SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
"""vLLM's bounds of the time to the first token."""
TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
SOLVER_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
RECENT = 1000
"""Requests of a class over which its attainment is shown."""


class Metrics:
    """Hears of every request and every settle. One registry of its own, so that tests can have several."""

    def __init__(self, log: RequestLog | None = None) -> None:
        """``log``: told every request that is over."""
        self._log = log
        self.registry = CollectorRegistry()
        self.accuracy = {"all": Accuracy(), "queued": Accuracy()}
        """Of all requests whose wait was estimated, and of those that did not get an engine at once."""
        self.swaps = 0
        self.evictions = 0
        self.finished = 0
        self.tokens = 0
        self.finished_by_tenant: dict[str, int] = {}
        self.waits: dict[str, deque[tuple[float, float, float]]] = {}
        """By class, of its last first tokens: when, wait and target in seconds."""
        self.recent: dict[str, deque[bool]] = {}
        """Whether the last requests of each class met their SLO."""
        counter, gauge, histogram = self._counter, self._gauge, self._histogram

        def of_counter(*told: Any) -> Callable[..., Counter]:
            return cache(counter(*told).labels)

        def of_histogram(*told: Any) -> Callable[..., Histogram]:
            return cache(histogram(*told).labels)

        model = ["model_name"]
        self._ttft = of_histogram(
            "vllm:time_to_first_token_seconds", "Time to the first token, from arrival", model
        )
        self._tpot = of_histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time between tokens of a request",
            model,
            TOKEN_SECONDS,
        )
        self._e2e = of_histogram(
            "vllm:e2e_request_latency_seconds", "Time to the last token, from arrival", model
        )
        self._prompt_tokens = of_counter("vllm:prompt_tokens", "Prompt tokens of finished requests", model)
        self._generation_tokens = of_counter("vllm:generation_tokens", "Tokens generated", model)
        self._success = of_counter("vllm:request_success", "Requests finished", model)
        self._running = gauge("vllm:num_requests_running", "Requests on engines", model)
        self._waiting = gauge("vllm:num_requests_waiting", "Requests without an engine", model)
        self._violations = of_counter(
            "request_slo_violation", "Finished requests that missed a target of their SLO", ["slo_class"]
        )
        self._predicted = of_histogram(
            "request_predicted_ttft_seconds", "Estimated time to the first token, at arrival", model
        )
        self._slo_requests = of_counter(
            "qlm_slo_requests", "Requests that are over, by whether they met their SLO", ["slo_class", "met"]
        )
        self._attainment = gauge(
            "qlm_slo_attainment", f"Share of the last {RECENT} requests that met their SLO", ["slo_class"]
        )
        self._estimated = of_histogram(
            "qlm_estimated_wait_seconds", "Median estimate of the wait for the first token", ["slo_class"]
        )
        self._actual = of_histogram(
            "qlm_actual_wait_seconds", "Wait for the first token, where it was estimated", ["slo_class"]
        )
        self._scored = counter("qlm_estimate_scored", "Estimates that were compared with what came")
        self._within = of_counter(
            "qlm_estimate_within", "Of these, waits that came within the quantile told", ["quantile"]
        )
        self._coverage = gauge(
            "qlm_estimate_coverage",
            "Share of recent waits within the quantile told, of all requests or those that queued",
            ["requests", "quantile"],
        )
        self._error = gauge(
            "qlm_estimate_error_seconds",
            "Recent error of the median: mean absolute, or bias (told less came)",
            ["requests", "kind"],
        )
        self._r2 = gauge(
            "qlm_estimate_r2", "R2 of recent estimates against the waits that came", ["requests"]
        )
        self._queue = gauge(
            "qlm_queue_length",
            "Requests that no engine has, evicted ones among them",
            ["model_name", "slo_class"],
        )
        self._virtual = gauge(
            "qlm_virtual_queue_length", "Requests on an instance's virtual queue", ["instance"]
        )
        self._held = gauge("qlm_held_requests", "Requests held back by fair shares", ["tenant"])
        self._up = gauge("qlm_instance_up", "Whether the instance serves", ["instance"])
        self._swap_count = of_counter("qlm_model_swaps", "Model swaps ordered", ["instance", "model_name"])
        self._swap_seconds = of_histogram(
            "qlm_model_swap_seconds", "Seconds that model swaps took", ["instance"]
        )
        self._evict_count = of_counter("qlm_evictions", "Running requests taken back", ["instance"])
        self._plans = counter("qlm_plans", "Global plans asked for")
        self._solver = histogram("qlm_solver_seconds", "Seconds to solve a global plan", [], SOLVER_SECONDS)
        self._tenant_requests = of_counter(
            "qlm_tenant_requests", "Requests that are over, by outcome", ["tenant", "outcome"]
        )
        self._tenant_tokens = of_counter("qlm_tenant_tokens", "Tokens, by kind", ["tenant", "kind"])
        self._tenant_ttft = of_histogram("qlm_tenant_ttft_seconds", "Time to the first token", ["tenant"])
        self._tenant_queued = gauge("qlm_tenant_queued", "Requests in the house", ["tenant"])
        self._refusals = of_counter("qlm_refused", "Requests refused at the door", ["tenant", "reason"])
        self._batch_lines = gauge("qlm_batch_lines", "Lines of unfinished batches", ["state"])
        self._leader = gauge("qlm_leader", "1 where this gateway schedules")
        self._solved = 0

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: Sequence[str] = (), buckets: Sequence[float] = SECONDS
    ) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    # The intake's watcher.

    def refused(self, tenant: str, reason: str) -> None:
        self._refusals(tenant, reason).inc()

    def first_token(self, entry: Entry) -> None:
        assert entry.first_token_at is not None
        ttft_s = entry.first_token_at - entry.arrived_at
        waits = self.waits.get(entry.slo.name)
        if waits is None:
            waits = self.waits[entry.slo.name] = deque(maxlen=RECENT)
        waits.append((entry.first_token_at, ttft_s, entry.slo.ttft_s))
        if entry.batch:
            return
        self._ttft(entry.job.request.model).observe(ttft_s)
        self._tenant_ttft(entry.tenant.name).observe(ttft_s)
        estimate = entry.estimate
        if estimate is not None:
            slo_class = entry.slo.name
            self._predicted(entry.job.request.model).observe(estimate.median_s)
            self._estimated(slo_class).observe(estimate.median_s)
            self._actual(slo_class).observe(ttft_s)
            self.accuracy["all"].score(estimate.median_s, estimate.p90_s, ttft_s)
            if not entry.at_once:
                self.accuracy["queued"].score(estimate.median_s, estimate.p90_s, ttft_s)
            self._scored.inc()
            if ttft_s <= estimate.median_s:
                self._within("0.5").inc()
            if ttft_s <= estimate.p90_s:
                self._within("0.9").inc()

    def left(self, entry: Entry, outcome: str) -> None:
        tenant = entry.tenant.name
        self._tenant_requests(tenant, outcome).inc()
        if outcome == "cancelled":
            # The client's own choice is neither met nor missed.
            if self._log is not None:
                self._log.over(entry, outcome, None)
            return
        met = False
        if outcome == "finished" and entry.finished_at is not None:
            request = entry.job.request
            end_s = entry.finished_at - entry.arrived_at
            first_s = (entry.first_token_at or entry.finished_at) - entry.arrived_at
            tokens = entry.output_tokens
            self.finished += 1
            self.tokens += tokens
            self.finished_by_tenant[tenant] = self.finished_by_tenant.get(tenant, 0) + 1
            self._success(request.model).inc()
            self._prompt_tokens(request.model).inc(request.prompt_tokens)
            self._generation_tokens(request.model).inc(tokens)
            self._tenant_tokens(tenant, "prompt").inc(request.prompt_tokens)
            self._tenant_tokens(tenant, "output").inc(tokens)
            self._e2e(request.model).observe(end_s)
            if tokens > 1:
                self._tpot(request.model).observe((end_s - first_s) / (tokens - 1))
            met = entry.slo.met(first_s, end_s, tokens)
        name = entry.slo.name
        self._slo_requests(name, "true" if met else "false").inc()
        if not met:
            self._violations(name).inc()
        recent = self.recent.get(name)
        if recent is None:
            recent = self.recent[name] = deque(maxlen=RECENT)
        recent.append(met)
        if self._log is not None:
            self._log.over(entry, outcome, met)

    # The service's listener.

    def settled(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None:
        for event in events:
            if type(event) is ModelSwapped:
                self._swap_seconds(event.instance).observe(event.swap_s)
        for action in actions:
            kind = type(action)
            if kind is Evict:
                self.evictions += 1
                self._evict_count(action.instance).inc()  # type: ignore[union-attr]
            elif kind is SwapModel:
                self.swaps += 1
                self._swap_count(action.instance, action.model).inc()  # type: ignore[union-attr]
            elif kind is Replan:
                self._plans.inc()

    def solved(self, plans: int, seconds: float) -> None:
        """The solver's own count of plans, and the seconds of its last."""
        if plans != self._solved:
            self._solved = plans
            self._solver.observe(seconds)

    # Exposition.

    def attainment(self) -> dict[str, float]:
        """Share of recent requests that met their SLO, by class."""
        return {name: sum(recent) / len(recent) for name, recent in self.recent.items() if recent}

    def text(
        self,
        snapshot: dict[str, Any] | None,
        waiting: dict[tuple[str, str], int],
        present: dict[str, int],
        held: dict[str, int],
        batch_lines: dict[str, int],
        leader: bool,
    ) -> bytes:
        """The page. Gauges are read when it is asked for.

        ``waiting``: by every model and class; ``present`` and ``held``: requests by tenant.
        """
        for name, share in self.attainment().items():
            self._attainment.labels(name).set(share)
        for requests, accuracy in self.accuracy.items():
            for quantile, share in accuracy.coverage().items():
                self._coverage.labels(requests, quantile).set(share)
            for kind, seconds in accuracy.errors().items():
                self._error.labels(requests, kind).set(seconds)
            self._r2.labels(requests).set(accuracy.r2())
        self._leader.set(leader)
        for gauge in (
            self._queue,
            self._virtual,
            self._tenant_queued,
            self._held,
            self._up,
            self._running,
            self._waiting,
        ):
            gauge.clear()
        for (model, slo_class), count in waiting.items():
            self._queue.labels(model, slo_class).set(count)
            self._waiting.labels(model).inc(count)
            self._running.labels(model)  # makes it 0 where nothing runs
        for tenant, count in present.items():
            self._tenant_queued.labels(tenant).set(count)
        for tenant, count in held.items():
            self._held.labels(tenant).set(count)
        for state, count in batch_lines.items():
            self._batch_lines.labels(state).set(count)
        for instance in (snapshot or {}).get("instances", ()):
            self._up.labels(instance["id"]).set(instance["status"] == "up")
            self._virtual.labels(instance["id"]).set(sum(group["requests"] for group in instance["queue"]))
            if instance["model"]:
                self._running.labels(instance["model"]).inc(len(instance["running"]))
        return generate_latest(self.registry)


def wall_seconds() -> int:
    """Now, in whole seconds since the epoch, as OpenAI's API tells times."""
    return int(time.time())
