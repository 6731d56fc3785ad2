"""The service's state as plain data, for dashboards and queue pages."""

from collections.abc import Mapping
from typing import Any

from live.engines.instance import Instance
from qlm_sim.core.instances import InstanceLedger
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
        "instances": [_instance(core, each, now) for each in instances.values()],
    }


def _instance(core: QueueManager, instance: Instance, now: float) -> dict[str, Any]:
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
        "queue": _queue(core, ledger, now) if ledger is not None else [],
    }


def _queue(core: QueueManager, ledger: InstanceLedger, now: float) -> list[dict[str, Any]]:
    """The line that the instance serves: its virtual queue, where the policy has one for each."""
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
        for group in core.policy.order(ledger, now)
    ]
