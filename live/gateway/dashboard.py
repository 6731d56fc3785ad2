"""/dashboard: one page that shows what the scheduler does now, fed by server-sent events.

The page is a file of its own (dashboard.html) with nothing to build or to load from elsewhere.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from importlib import resources
from typing import Any, Protocol

import msgspec
import numpy as np
from starlette.responses import StreamingResponse

from live.config import LiveConfig
from live.gateway.batch_runner import BatchRunner
from live.gateway.intake import Intake
from live.gateway.metrics import Metrics
from qlm_sim.core.actions import Action, Evict, SwapModel
from qlm_sim.core.events import Event, InstanceDown, InstanceUp, ModelSwapped, PlanReady

EVERY_S = 1.0
"""Between two states that a page is sent."""
HAPPENINGS = 200
"""Swaps, evictions and the like that are kept to be shown."""
HISTORY_S = 120
SHOWN_WAITS = 400
"""Points of each class in the page's picture."""

_encode = msgspec.json.Encoder().encode


def page() -> str:
    return resources.files("live.gateway").joinpath("dashboard.html").read_text(encoding="utf-8")


class Shown(Protocol):
    """What is shown of ``live.service.Service``."""

    solver: Any

    def now(self) -> float: ...

    def snapshot(self) -> dict[str, Any]: ...


class DashboardFeed:
    """Keeps what the page shows beyond the service's snapshot, and streams states."""

    def __init__(
        self, service: Shown, intake: Intake, metrics: Metrics, runner: BatchRunner, config: LiveConfig
    ) -> None:
        self._service = service
        self._intake = intake
        self._metrics = metrics
        self._runner = runner
        self._config = config
        self._happenings: deque[dict[str, Any]] = deque(maxlen=HAPPENINGS)
        self._number = 0
        self._closed = False
        self._state: bytes = b""
        self._made_at = -EVERY_S
        self._rates: deque[tuple[float, int, int]] = deque(maxlen=HISTORY_S)

    def settled(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None:
        """The service's listener."""
        for event in events:
            kind = type(event)
            if kind is ModelSwapped:
                self._happened(now, "swapped", event.instance, f"{event.model} in {event.swap_s:.2f} s")  # type: ignore[union-attr]
            elif kind is InstanceUp:
                self._happened(now, "up", event.spec.id, "serves")  # type: ignore[union-attr]
            elif kind is InstanceDown:
                self._happened(now, "down", event.instance, "is gone")  # type: ignore[union-attr]
            elif kind is PlanReady:
                self._metrics.solved(self._service.solver.solved, self._service.solver.solve_s)
        evicted: Counter[tuple[str, str]] = Counter()
        for action in actions:
            if type(action) is Evict:
                entry = self._intake.entries.get(action.request_id)
                evicted[action.instance, entry.slo.name if entry is not None else "cancelled"] += 1
            elif type(action) is SwapModel:
                self._happened(now, "swap", action.instance, f"to {action.model}")
        for (instance, slo_class), count in evicted.items():
            self._happened(now, "evict", instance, f"{count} × {slo_class}")

    def _happened(self, now: float, kind: str, instance: str, text: str) -> None:
        self._number += 1
        self._happenings.append(
            {"number": self._number, "at": now, "kind": kind, "instance": instance, "text": text}
        )

    def waiting(self) -> Counter[tuple[str, str]]:
        """Requests that no engine has, evicted ones among them, by model and class; zeros are told too."""
        waiting = Counter(
            {(model.name, slo.name): 0 for model in self._config.model for slo in self._config.slo}
        )
        waiting.update(
            (entry.job.request.model, entry.slo.name)
            for entry in self._intake.entries.values()
            if self._intake.waits(entry)
        )
        return waiting

    def stream(self) -> StreamingResponse:
        return StreamingResponse(
            self._states(), media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )

    def close(self) -> None:
        """End the streams: a page then asks anew, and finds the gateway that schedules by then."""
        self._closed = True

    async def _states(self) -> AsyncIterator[bytes]:
        while not self._closed:
            now = self._service.now()
            if now - self._made_at >= EVERY_S * 0.9:
                self._made_at = now
                self._state = b"data: " + _encode(self.state()) + b"\n\n"
            yield self._state
            await asyncio.sleep(EVERY_S)

    def state(self) -> dict[str, Any]:
        """Everything that the page shows, as plain data."""
        now = self._service.now()
        metrics, intake = self._metrics, self._intake
        accuracy = metrics.accuracy["queued"]
        snapshot = self._service.snapshot()
        waiting = self.waiting()
        self._rates.append((now, metrics.finished, metrics.tokens))
        then, finished, tokens = self._rates[max(0, len(self._rates) - 6)]
        span_s = max(now - then, 1e-9)
        return {
            "now": now,
            "policy": self._config.scheduler.policy,
            "draining": intake.draining,
            "totals": {
                "waiting": waiting.total(),
                "running": snapshot["running"],
                "held": intake.windows.held,
                "batch_lines": self._runner.lines["queued"],
                "finished": metrics.finished,
                "requests_per_s": (metrics.finished - finished) / span_s if now > then else 0.0,
                "tokens_per_s": (metrics.tokens - tokens) / span_s if now > then else 0.0,
                "swaps": metrics.swaps,
                "evictions": metrics.evictions,
            },
            "classes": self._classes(waiting),
            "instances": [_instance(each) for each in snapshot["instances"]],
            "tenants": self._tenants(),
            "estimates": {
                "scored": accuracy.scored,
                "coverage": accuracy.coverage(),
                "errors": accuracy.errors(),
                "r2": accuracy.r2(),
            },
            "happenings": list(self._happenings)[-40:],
            "waits": [
                {"at": at, "slo_class": name, "wait_s": wait_s, "target_s": target_s}
                for name, waits in metrics.waits.items()
                for at, wait_s, target_s in list(waits)[-SHOWN_WAITS:]
                if at > now - HISTORY_S
            ],
        }

    def _classes(self, waiting_of: Counter[tuple[str, str]]) -> list[dict[str, Any]]:
        attainment = self._metrics.attainment()
        waiting: Counter[str] = Counter()
        for (_, name), count in waiting_of.items():
            waiting[name] += count
        told = []
        for each in self._config.slo:
            waits = [wait_s for _, wait_s, _ in self._metrics.waits.get(each.name, ())]
            p50, p90 = map(float, np.quantile(waits, (0.5, 0.9))) if waits else (None, None)
            told.append(
                {
                    "name": each.name,
                    "target_s": each.ttft_s,
                    "attainment": attainment.get(each.name),
                    "over": len(self._metrics.recent.get(each.name, ())),
                    "waiting": waiting[each.name],
                    "wait_p50_s": p50,
                    "wait_p90_s": p90,
                }
            )
        return told

    def _tenants(self) -> list[dict[str, Any]]:
        present = self._intake.by_tenant()
        held = self._intake.windows.held_by_tenant()
        names = [tenant.name for tenant in self._config.tenant] or ["default"]
        return [
            {
                "name": name,
                "present": present.get(name, 0),
                "held": held.get(name, 0),
                "finished": self._metrics.finished_by_tenant.get(name, 0),
            }
            for name in names
        ]


def _instance(told: dict[str, Any]) -> dict[str, Any]:
    """An instance of the service's snapshot; its running requests by class."""
    running: Counter[str] = Counter(each["slo_class"] for each in told["running"])
    return {
        **{name: told[name] for name in ("id", "status", "model", "swapping_to", "kv_utilization")},
        "running": dict(sorted(running.items())),
        "queue": told["queue"][:60],
        "queued": sum(group["requests"] for group in told["queue"]),
    }
