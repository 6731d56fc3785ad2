"""Why the scheduler did what it did: each plan's moves, what it expected, and the alternative's cost."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from qlm_sim.core.plan import GroupMove, PlanExplanation
from qlm_sim.metrics.run import PolicyRun


def plan_lines(plan: PlanExplanation) -> Iterator[str]:
    """A plan in words, a line for the plan and one for each group that it moved."""
    yield (
        f"{plan.at_s:.1f} s, plan {plan.number}: {plan.requests:,} waiting in {plan.groups} groups; expected "
        f"cost {plan.cost:.3g}, had nothing moved {plan.kept_cost:.3g}"
    )
    for move in plan.moves:
        yield f"  {move_text(move)}"


def explained(runs: Sequence[PolicyRun]) -> Iterator[str]:
    """Every plan of every run in words, with the policy's name before each line."""
    for run in runs:
        for plan in run.plans:
            for line in plan_lines(plan):
                yield f"{run.name}: {line}"


def move_text(move: GroupMove) -> str:
    """One move in words."""
    where = (
        f"takes another turn on {move.source}"
        if move.source == move.target
        else f"goes from {move.source} to {move.target}"
    )
    return (
        f"group {move.group} ({move.requests} x {move.model} {move.slo_class}) {where}: all first tokens "
        f"expected in {_seconds(move.wait_s)} instead of {_seconds(move.kept_wait_s)}, {_due(move.due_s)}"
    )


def plans_jsonl(runs: Sequence[PolicyRun]) -> str:
    """Every plan of every run, an object a line."""
    return "".join(
        json.dumps({"policy": run.name, **_plain(asdict(plan))}) + "\n" for run in runs for plan in run.plans
    )


def _plain(value: object) -> dict[str, object]:
    assert isinstance(value, dict)
    return {
        key: float(f"{item:.6g}")
        if isinstance(item, float)
        else [_plain(entry) for entry in item]
        if isinstance(item, list | tuple)
        else item
        for key, item in value.items()
    }


def _due(due_s: float) -> str:
    return f"due in {_seconds(due_s)}" if due_s >= 0 else f"overdue by {_seconds(-due_s)}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:,.0f} s"
