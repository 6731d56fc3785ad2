"""What every world of engines must do on the same orders: a script gives the orders, laws judge the log.

A script stands where the scheduler core does. It answers to events, so that it plays alike in simulated
time, on fake engines and on real ones, however long they take.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qlm_sim.core.actions import Action, Evict, Pull, SwapModel
from qlm_sim.core.events import (
    Event,
    FirstToken,
    InstanceDown,
    InstanceUp,
    ModelSwapped,
    RequestArrived,
    RequestEvicted,
    RequestFailed,
    RequestFinished,
)

LONG = 300
"""Tokens of a request that must still run when it is evicted, though the machine be busy."""

Answer = Callable[[Event], list[Action]]


@dataclass(frozen=True)
class Ask:
    """A request with what it will say."""

    id: str
    prompt_tokens: int = 20
    output_tokens: int = 12
    model: str = "a"


@dataclass(frozen=True)
class Scenario:
    name: str
    asks: Sequence[Ask]
    script: Callable[[], Answer]
    """Makes a fresh script: from an event to orders."""
    instances: Sequence[str] = ("i0",)
    models: Sequence[str] = ("a",)
    needs: frozenset[str] = frozenset()
    """What a world must be able to do: "swap", "crash"."""
    finish: frozenset[str] | None = None
    """The requests that finish; None for all."""
    evicted: frozenset[str] = frozenset()
    """The requests that are given back at least once."""
    failed: frozenset[str] = frozenset()
    max_num_seqs: int = 4

    @property
    def finishing(self) -> frozenset[str]:
        return self.finish if self.finish is not None else frozenset(ask.id for ask in self.asks)


@dataclass
class Script:
    """Pulls every arrival to ``home``, then does what is written for an event of a kind and a request."""

    home: str = "i0"
    pulls: frozenset[str] | None = None
    """The arrivals to pull; None for all."""
    on: dict[tuple[type, str], list[list[Action]]] = field(default_factory=dict)
    """By (kind of event, request or model or instance): what to order the first time, the second, ..."""

    def __call__(self, event: Event) -> list[Action]:
        if isinstance(event, RequestArrived):
            request_id = event.request.id
            if self.pulls is None or request_id in self.pulls:
                return [Pull(request_id, 1, self.home)]
            return []
        if isinstance(event, ModelSwapped):
            name = event.model
        elif isinstance(event, InstanceUp):
            name = event.spec.id
        elif isinstance(event, InstanceDown):
            name = event.instance
        else:
            name = getattr(event, "request_id", "")
        orders = self.on.get((type(event), name))
        return orders.pop(0) if orders else []


def _evict(request_id: str, attempt: int = 1, instance: str = "i0") -> Evict:
    return Evict(request_id, attempt, instance, keep_kv=False)


SCENARIOS = [
    Scenario("one request", [Ask("r0")], Script),
    Scenario("a batch", [Ask(f"r{i}", output_tokens=6 + 5 * i) for i in range(4)], Script),
    Scenario("a single token", [Ask("r0", output_tokens=1), Ask("r1", prompt_tokens=1)], Script),
    Scenario(
        "more than it runs at once waits inside",
        [Ask(f"r{i}", output_tokens=8) for i in range(6)],
        Script,
        max_num_seqs=2,
    ),
    Scenario(
        "evicted and taken up again where it was",
        [Ask("r0", output_tokens=LONG), Ask("r1", output_tokens=40)],
        lambda: Script(
            on={
                (FirstToken, "r0"): [[_evict("r0")]],
                (RequestEvicted, "r0"): [[Pull("r0", 2, "i0")]],
            }
        ),
        evicted=frozenset({"r0"}),
    ),
    Scenario(
        "evicted three times",
        [Ask("r0", output_tokens=LONG)],
        lambda: Script(
            on={
                (FirstToken, "r0"): [[_evict("r0", n)] for n in (1, 2, 3)],
                (RequestEvicted, "r0"): [[Pull("r0", n, "i0")] for n in (2, 3, 4)],
            }
        ),
        evicted=frozenset({"r0"}),
    ),
    Scenario(
        "evicted here, taken up there",
        [Ask("r0", output_tokens=LONG), Ask("r1", output_tokens=20)],
        lambda: Script(
            on={
                (FirstToken, "r0"): [[_evict("r0")]],
                (RequestEvicted, "r0"): [[Pull("r0", 2, "i1")]],
            }
        ),
        instances=("i0", "i1"),
        evicted=frozenset({"r0"}),
    ),
    Scenario(
        "one that waits inside the engine is evicted",
        [Ask("r0", output_tokens=LONG), Ask("r1", output_tokens=LONG), Ask("r2", output_tokens=5)],
        lambda: Script(
            on={
                (FirstToken, "r0"): [[_evict("r2")]],
                (RequestFinished, "r0"): [[Pull("r2", 2, "i0")]],
            }
        ),
        evicted=frozenset({"r2"}),
        max_num_seqs=2,
    ),
    Scenario(
        "a cancelled one frees its place",
        [Ask("r0", output_tokens=800), Ask("r1", output_tokens=5)],
        lambda: Script(
            pulls=frozenset({"r0"}),
            on={
                (FirstToken, "r0"): [[_evict("r0")]],
                (RequestEvicted, "r0"): [[Pull("r1", 1, "i0")]],
            },
        ),
        finish=frozenset({"r1"}),
        evicted=frozenset({"r0"}),
        max_num_seqs=1,
    ),
    Scenario(
        "an eviction that comes too late changes nothing",
        [Ask("r0", output_tokens=3), Ask("r1", output_tokens=10)],
        lambda: Script(on={(RequestFinished, "r0"): [[_evict("r0")]]}),
    ),
    Scenario(
        "one that is too long fails alone",
        [Ask("r0", prompt_tokens=1500), Ask("r1")],
        Script,
        finish=frozenset({"r1"}),
        failed=frozenset({"r0"}),
    ),
    Scenario(
        "a swap between two requests",
        [Ask("r0"), Ask("r1", model="b")],
        lambda: Script(
            pulls=frozenset({"r0"}),
            on={
                (RequestFinished, "r0"): [[SwapModel("i0", "b")]],
                (ModelSwapped, "b"): [[Pull("r1", 1, "i0")]],
            },
        ),
        models=("a", "b"),
        needs=frozenset({"swap"}),
    ),
    Scenario(
        "evicted for a swap, and taken up after the swap back",
        [Ask("r0", output_tokens=LONG), Ask("r1", model="b")],
        lambda: Script(
            pulls=frozenset({"r0"}),
            on={
                (FirstToken, "r0"): [[_evict("r0")]],
                (RequestEvicted, "r0"): [[SwapModel("i0", "b")]],
                (ModelSwapped, "b"): [[Pull("r1", 1, "i0")]],
                (RequestFinished, "r1"): [[SwapModel("i0", "a")]],
                (ModelSwapped, "a"): [[Pull("r0", 2, "i0")]],
            },
        ),
        models=("a", "b"),
        needs=frozenset({"swap"}),
        evicted=frozenset({"r0"}),
    ),
    Scenario(
        "what a lost engine had goes on elsewhere",
        [Ask("r0", output_tokens=LONG), Ask("r1", output_tokens=LONG)],
        lambda: Script(
            on={(InstanceDown, "i0"): [[Pull("r0", 2, "i1"), Pull("r1", 2, "i1")]]},
        ),
        instances=("i0", "i1"),
        needs=frozenset({"crash"}),
    ),
]


class ScriptedCore:
    """A core that does what a script says."""

    wake_at = float("inf")

    def __init__(self, script: Answer) -> None:
        self._script = script

    def handle(self, now: float, events: Sequence[Event]) -> list[Action]:
        return [action for event in events for action in self._script(event)]


@dataclass
class Run:
    """What came of a scenario in one world."""

    settles: list[tuple[float, tuple[Event, ...], tuple[Action, ...]]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    """What was said, in worlds with text."""
    expected: dict[str, str] = field(default_factory=dict)
    """What an undisturbed engine says."""

    def record(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None:
        self.settles.append((now, tuple(events), tuple(actions)))

    def events(self, *kinds: type) -> list[Event]:
        return [event for _, events, _ in self.settles for event in events if isinstance(event, kinds)]

    def over(self) -> set[str]:
        """Requests that finished or failed."""
        return {event.request_id for event in self.events(RequestFinished, RequestFailed)}  # type: ignore[union-attr]
