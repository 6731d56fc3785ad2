"""What a scheduling policy is: it orders what waits. It touches no engine.

The manager tells a policy what waits (``add``, ``discard``) and asks, whenever an instance could
take something, what that instance should serve next (``next_for``). An answer of another model than
the loaded one means: switch now.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from qlm_sim.core.actions import Replan
from qlm_sim.core.forecast import Forecast
from qlm_sim.core.groups import RequestGroup
from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lifecycle import Tracked
from qlm_sim.core.plan import Plan
from qlm_sim.core.types import Request


class Overtaking(Enum):
    """Which of the requests that are still to come will go before one that waits, in the long run."""

    NONE = 0
    BY_DEADLINE = 1
    """Those that are due before it."""
    BY_SLO = 2
    """Those of tighter SLOs."""


class Estimator(Protocol):
    """What is believed of output lengths and the engines' speed."""

    def growth_tokens(self, ledger: InstanceLedger, item: Tracked, now: float) -> float:
        """KV tokens to keep for what runs there, and for ``item`` beside it, beyond what they bring along:
        generated and to come."""
        ...

    def slowness(self, ledger: InstanceLedger, model: str) -> float:
        """Seconds that the instance takes of ``model`` per second of its profile."""
        ...


class Learner(Protocol):
    """Who is told what happens, and learns from it what an Estimator believes."""

    def arrived(self, item: Tracked, now: float) -> None:
        """``item`` has come, and was let in."""
        ...

    def first_token(self, ledger: InstanceLedger, item: Tracked, now: float) -> None:
        """``item``, which runs there, decodes from now on."""
        ...

    def finished(self, ledger: InstanceLedger, item: Tracked, now: float, output_tokens: int) -> None:
        """``item``, which runs there, is done after that many tokens."""
        ...

    def left(self, ledger: InstanceLedger, item: Tracked, now: float, output_tokens: int | None) -> None:
        """``item``, which runs there, leaves before its end; None where its tokens are not known."""
        ...

    def reported(self, ledger: InstanceLedger, now: float) -> None:
        """The engine has reported: ``ledger.reported`` is new."""
        ...


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a request stands in line, by the order in force."""

    instances: tuple[str, ...]
    """Who serves the line: the next of it goes to whichever has room first. None: it is not served."""
    ahead: int
    """Requests of the line before it; those that are on an engine already are not of the line."""

    def behind(self) -> "Standing":
        """The next place."""
        return Standing(self.instances, self.ahead + 1)


Order = Callable[[InstanceLedger, float], Sequence[RequestGroup]]
"""``Policy.order``."""


class Forecaster(Protocol):
    """Forecasts waits. Decides nothing, and leaves nothing behind that a decision could read."""

    fresh_s: float
    """What was forecast of a line serves for so long at least, in seconds. Who asks may change it."""

    def forecast(
        self,
        item: Tracked,
        standing: Standing | None,
        ledgers: Mapping[str, InstanceLedger],
        order: Order,
        now: float,
    ) -> Forecast:
        """The wait of ``item``, which has no first token yet. ``standing``: None where it is on an engine."""
        ...


class Policy(Protocol):
    """Orders the waiting requests."""

    name: str
    holds_back: bool
    """Pull only what the engine can run now, so that what waits stays in our control."""
    evicts_to_swap: bool
    """Clear an instance for a swap by eviction; otherwise by letting it run empty."""
    overtaking: Overtaking

    @property
    def at_rest(self) -> bool:
        """Nothing waits, so that no instance need be asked what to serve; may be False all the same."""
        ...

    @property
    def wake_at(self) -> float:
        """When it wants to be asked again, though nothing happened; infinity for never."""
        ...

    def woken(self, now: float) -> Iterable[str]:
        """``wake_at`` has come. Returns the instances that may want something else now."""
        ...

    def start(self, ledgers: dict[str, InstanceLedger]) -> None:
        """Called once, with the ledgers, which the policy reads and never changes."""
        ...

    def add(self, item: Tracked, now: float) -> Iterable[str]:
        """``item`` waits from now on. Returns the instances that may want to take it."""
        ...

    def discard(self, item: Tracked) -> None:
        """``item`` waits no longer: it was pulled or cancelled."""
        ...

    def changed(self, ledger: InstanceLedger) -> None:
        """What runs on the instance is not what did, or it serves another model now."""
        ...

    def next_for(self, ledger: InstanceLedger, now: float) -> Tracked | None:
        """The waiting request that the instance should serve next, or None to leave it as it is."""
        ...

    def victims(self, ledger: InstanceLedger, item: Tracked, now: float) -> Sequence[Tracked]:
        """Running requests to evict so that ``item``, which does not fit now, can run."""
        ...

    def order(self, ledger: InstanceLedger, now: float) -> Sequence[RequestGroup]:
        """The line that the instance serves: what waits, in the order in which it would serve all of it."""
        ...

    def standing(self, item: Tracked, now: float) -> Standing:
        """Where ``item``, which waits, stands."""
        ...

    def standing_of_new(self, request: Request, now: float) -> Standing:
        """Where the request would stand if it arrived now. Changes nothing."""
        ...

    def replan(self, now: float) -> Replan | None:
        """A snapshot to be solved, if the policy wants a new plan now. Asked once ``wake_at`` has come."""
        ...

    def adopt(self, plan: Plan, now: float) -> Iterable[str]:
        """Put a solved plan in force. Returns the instances that it touches."""
        ...
