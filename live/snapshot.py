"""The service's state as plain data, for dashboards and queue pages."""

from collections.abc import Mapping
from typing import Any

from live.engines.instance import Instance
from qlm_sim.core.lifecycle import State
from qlm_sim.core.manager import QueueManager


def snapshot(core: QueueManager, instances: Mapping[str, Instance], now: float) -> dict[str, Any]:
    """JSON-able; times in seconds, those that end in _at since the service's start."""
    waiting = sum(item.state is State.WAITING for item in core.requests.values())
    return {
        "now": now,
        "waiting": waiting,
        "running": len(core.requests) - waiting,
        "stale_events": core.stale_events,
        "instances": [_instance(core, each) for each in instances.values()],
    }


def _instance(core: QueueManager, instance: Instance) -> dict[str, Any]:
    ledger = core.ledgers.get(instance.id)
    report = ledger.reported if ledger is not None else None
    return {
        "id": instance.id,
        "status": instance.status.value,
        "model": instance.model,
        "swapping_to": instance.swapping_to,
        "models": sorted(instance.models),
        "crashes": instance.crashes,
        "running": [
            {
                "id": attempt.live.id,
                "slo_class": attempt.live.job.request.slo_class,
                "tenant": attempt.live.job.tenant,
                "attempt": attempt.number,
                "output_tokens": attempt.output_tokens,
                "began": attempt.began,
                "evicting": attempt.evicting,
            }
            for attempt in instance.running.values()
        ],
        "kv_utilization": report.kv_utilization if report is not None else None,
        "engine_waiting": report.waiting if report is not None else None,
        "preemptions": report.preemptions if report is not None else None,
        "queue": _queue(core, instance.id) if ledger is not None else [],
    }


def _queue(core: QueueManager, instance_id: str) -> list[dict[str, Any]]:
    """The virtual queue, where the policy has one."""
    queue = getattr(core.policy, "queue", None)
    if queue is None:
        return []
    return [
        {
            "group": group.id,
            "model": group.key.model,
            "slo_class": group.key.slo_class,
            "requests": len(group),
            "late": group.key.late,
            "served": group.key.served,
            "first_deadline_at": group.first_deadline,
            "last_deadline_at": group.last_deadline,
        }
        for group in queue(instance_id)
    ]
