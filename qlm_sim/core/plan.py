"""The global scheduler's question and its answer, as plain data.

A problem is a snapshot of what waits and of the instances; a plan is the order of groups for every
instance. Both are frozen and can travel to another process.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from msgspec import Struct


class WaitingGroup(Struct, frozen=True, gc=False):
    """A request group as the solver sees it."""

    id: int
    model: str
    slo_class: str
    requests: int
    weight: float
    """What one missed request costs."""
    decided: bool
    """Nothing can be missed any more: their deadline has passed, or their first token is out."""
    first_deadline_s: float
    """Seconds from now until its first request's token is due; negative when overdue."""
    last_deadline_s: float
    service: Mapping[str, "GroupService"]
    """By instance kind: what serving it takes there. Kinds that cannot serve it are absent."""


class GroupService(Struct, frozen=True, gc=False):
    """Serving one group on one kind of instance."""

    prefill_s: float
    """Engine seconds that one request's prefill takes."""
    decode_s: float
    """Engine seconds that one request's decoding takes of a full batch: the time between two
    departures of a full batch."""
    decode_sd_s: float
    """Standard deviation of decode_s from one request to the next."""
    batch: float
    """Requests like these that run together when the batch is full."""


class InstanceState(Struct, frozen=True, gc=False):
    """An instance as the solver sees it."""

    id: str
    kind: str
    """Instances of one kind serve every group alike."""
    model: str | None
    """The model that is loaded, or being loaded."""
    ready_s: float
    """Seconds until it can serve: the rest of a swap under way, else 0."""
    free: float
    """Share of a full batch that it can take at once, without waiting for a departure."""
    running: int
    leave_s: float
    """Seconds to clear the running batch away before a swap."""
    swap_s: Mapping[str, float]
    """Seconds to load each model it may serve."""
    running_s: float = 0.0
    """Seconds of a full engine that what runs will still take."""


@dataclass(frozen=True, slots=True)
class PlanProblem:
    """All that a solver may know. The same problem gives the same plan."""

    number: int
    groups: tuple[WaitingGroup, ...]
    instances: tuple[InstanceState, ...]
    current: Mapping[str, tuple[int, ...]]
    """The plan in force, where the solver starts from: group ids by instance."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Group ids by instance, in serving order."""

    number: int
    """Of the problem that it answers."""
    queues: Mapping[str, tuple[int, ...]]
    cost: float
    evaluations: int
    """Groups followed through queues on the way: the solver's work, by which its latency is modelled."""


@dataclass(frozen=True, slots=True)
class GroupMove:
    """A group that the plan serves elsewhere, or in another turn, than the plan before would have."""

    group: int
    model: str
    slo_class: str
    requests: int
    source: str
    target: str
    kept_wait_s: float
    """Expected seconds until the last of its requests has its first token, were it left."""
    wait_s: float
    """The same as planned."""
    due_s: float
    """Seconds until that token is due."""


@dataclass(frozen=True, slots=True)
class PlanExplanation:
    """One plan, beside the one that it replaced. Costs are about weighted SLO misses."""

    at_s: float
    number: int
    requests: int
    """Waiting requests that it orders."""
    groups: int
    kept_cost: float
    """Expected cost of the plan in force, had it been left."""
    cost: float
    moves: tuple[GroupMove, ...]

    @property
    def saved(self) -> float:
        return self.kept_cost - self.cost
