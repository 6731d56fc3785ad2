"""Replays in which requests are told their wait, and what came of it: what ``rwt_accuracy`` measures.

A case is an instance, its model, and what comes how fast. Its replays differ by seed and are independent. The
estimator knows the output lengths of as many earlier requests; it starts without knowledge of the engine's
speed and throughput beyond the profile, and without a record of forecasts.
"""

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlm_sim.cluster.simulation import simulate
from qlm_sim.config import Scenario
from qlm_sim.config.instances import instances
from qlm_sim.config.scenario import ClusterConfig, WorkloadConfig
from qlm_sim.core.actions import Action
from qlm_sim.core.events import Event, FirstToken, RequestArrived, RequestFinished
from qlm_sim.core.manager import QueueManager
from qlm_sim.core.types import InstanceSpec
from qlm_sim.estimator.asked import AskedEstimator
from qlm_sim.estimator.lengths import OutputLengths, kind_of
from qlm_sim.estimator.service import group_service
from qlm_sim.policies import SchedulerSettings, make_core
from qlm_sim.replay import scenario_workload
from qlm_sim.solver.inline import InlineSolver
from qlm_sim.solver.search import solve
from qlm_sim.workload.mix import MixEntry
from qlm_sim.workload.readers import read_trace
from qlm_sim.workload.workload import Trace, Workload

Floats = NDArray[np.float64]

WARM_SEED = 500
"""Added to a seed: the requests that lengths are learnt from."""
ASK_AGAIN_S = 20.0
"""Seconds between two times at which some of those who wait are asked about again ..."""
ASK_AGAIN = 8
"""... and how many of them."""
BACKLOG = 64
"""A queue of so many requests ahead is a backlog."""


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of replay: an instance, its model, and what comes how fast."""

    gpu: str
    model: str
    rate_rps: float
    requests: int = 3_500
    """That are told their wait: as many as a trace of the paper has."""
    times: int = 1
    """So many times as many come, so that arrivals go on while those wait."""
    workload: str = "sharegpt"
    mega: float = 0.0
    """Share of requests with prompts of 4,000 to 12,000 tokens."""
    classes: tuple[str, ...] = ("batch-2",)
    """In equal shares; one that is named twice has two."""
    policy: str = "static"
    """Oldest first: with one class on one instance, first come first served."""
    perturb: float = 1.0
    """The engine's step times over the profile's."""
    learnt: bool = True
    """Whether lengths are known from an earlier replay."""

    @property
    def name(self) -> str:
        notes = [self.workload.rsplit("_", 1)[-1].removesuffix(".csv")]
        if self.mega:
            notes.append(f"{self.mega:.0%} mega-prompts")
        if len(self.classes) > 1:
            shares = [self.classes.count(name) for name in dict.fromkeys(self.classes)]
            notes.append(f"{len(shares)} classes {':'.join(map(str, shares))}")
        if self.times > 1:
            notes.append("going on")
        if self.policy != "static":
            notes.append(self.policy)
        if self.perturb != 1.0:
            notes.append(f"steps x {self.perturb}")
        if not self.learnt:
            notes.append("nothing learnt")
        return f"{self.gpu}, {self.model}, {', '.join(notes)}, {self.rate_rps:g}/s"


def azure(name: str) -> str:
    """Where Azure's trace of that name would be."""
    folder = Path(os.environ.get("QLM_DATA", "../shared")) / "data" / "azure_llm_2023"
    return str(folder / f"AzureLLMInferenceTrace_{name}.csv")


@dataclass(frozen=True, slots=True)
class Told:
    """What requests were told at arrival and what came of it: columns of one length, in seconds."""

    ahead: Floats
    """Requests before it that had no first token."""
    mean: Floats
    median: Floats
    bound: Floats
    """90 % bound."""
    naive: Floats
    waited: Floats
    chance: Floats
    """Variance that no forecast can foresee, in s², on average over the case; not a number where unknown."""
    replay: Floats
    """Seed of the replay."""

    def where(self, rows: NDArray[np.bool_]) -> "Told":
        return Told(*(getattr(self, name)[rows] for name in self.__slots__))

    def with_chance(self, variance: float) -> "Told":
        return replace(self, chance=np.full_like(self.waited, variance))

    @property
    def deep(self) -> NDArray[np.bool_]:
        """Of those told in a backlog."""
        return self.ahead >= BACKLOG

    @staticmethod
    def joined(parts: Sequence["Told"]) -> "Told":
        return Told(*(np.concatenate([getattr(p, name) for p in parts]) for name in Told.__slots__))


class Telling:
    """A core that is asked for the wait of every request as it arrives, and notes its first token."""

    def __init__(
        self, core: QueueManager, spec: InstanceSpec, model: str, *, arrivals: int, again: bool
    ) -> None:
        """Asks about so many ``arrivals``, and about some of them ``again`` and again while they wait."""
        self._core = core
        assert isinstance(core.estimator, AskedEstimator)
        self._service = core.estimator.questions
        self._spec = spec
        self._model = model
        self._arrivals = arrivals
        self._ask_at = ASK_AGAIN_S if again else float("inf")
        self._told: list[tuple[str, float, tuple[float, ...]]] = []
        """Id, time and what it was told."""
        self._again: list[tuple[str, float, tuple[float, ...]]] = []
        self._asked: dict[str, None] = {}
        self.started_at: dict[str, float] = {}

    @property
    def wake_at(self) -> float:
        return self._core.wake_at

    def handle(self, now: float, events: Sequence[Event]) -> list[Action]:
        actions = self._core.handle(now, events)
        for event in events:
            if isinstance(event, RequestArrived) and len(self._told) < self._arrivals:
                self._asked[event.request.id] = None
                self._told.append((event.request.id, now, self._tell(event.request.id, now)))
            elif isinstance(event, FirstToken | RequestFinished):
                self.started_at.setdefault(event.request_id, now)
        if now >= self._ask_at:
            self._ask_at = now + ASK_AGAIN_S
            waiting = [name for name in self._asked if name not in self.started_at]
            for name in waiting[:: max(1, len(waiting) // ASK_AGAIN)]:
                self._again.append((name, now, self._tell(name, now)))
        return actions

    def _tell(self, request_id: str, now: float) -> tuple[float, ...]:
        told = self._core.forecast(request_id, now)
        assert told is not None, f"{request_id} had its first token before it arrived"
        ahead = told.position
        return float(ahead), told.mean_s, told.median_s, told.quantile(0.9), ahead * self._naive_s()

    def _naive_s(self) -> float:
        """Seconds per request ahead: mean tokens over the token throughput of a full batch."""
        lengths = self._service.lengths.of_model(self._model)
        return group_service(self._spec.models[self._model], 256, lengths).decode_s

    def told(self, again: bool, seed: int) -> Told:
        notes = self._again if again else self._told
        rows = [(*told, self.started_at[name] - at, np.nan, seed) for name, at, told in notes]
        return Told(*np.array(rows).T)


class _NoRecord:
    def record(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None:
        """What is told is all that is kept."""


def _scenario(case: Case, seed: int) -> Scenario:
    each = 1 / len(case.classes)
    shares = [(name, each * case.classes.count(name)) for name in dict.fromkeys(case.classes)]
    mix = [MixEntry(case.model, name, share * (1 - case.mega)) for name, share in shares]
    if case.mega:
        mix += [MixEntry(case.model, n, s * case.mega, prompt_tokens=(4_000, 12_000)) for n, s in shares]
    return Scenario(
        name="rwt",
        seed=seed,
        mix=tuple(mix),
        cluster=(ClusterConfig(gpu=case.gpu, count=1, models=(case.model,)),),
        workload=WorkloadConfig(
            trace=case.workload,
            requests=case.times * case.requests,
            arrivals="poisson",
            rate_rps=case.rate_rps,
        ),
    )


@cache
def _trace(name: str) -> Trace:
    return read_trace(name, warn=lambda note: None)


def _replay(
    case: Case,
    seed: int,
    lengths: OutputLengths | None = None,
    *,
    redraw: np.random.Generator | None = None,
    again: bool = False,
    tell: bool = True,
) -> Telling:
    scenario = _scenario(case, seed)
    specs = instances(scenario)
    workload, _ = scenario_workload(scenario, specs, _trace(case.workload))
    if redraw is not None:
        workload = replace(workload, output_tokens=_redrawn(workload, redraw))
    core = make_core(case.policy, specs, SchedulerSettings(forecasts=True))
    if lengths is not None:
        core.estimator.lengths = lengths  # type: ignore[attr-defined]
        core.estimator.questions.lengths = deepcopy(lengths)  # type: ignore[attr-defined]
    telling = Telling(core, specs[0], case.model, arrivals=case.requests if tell else 0, again=again)
    simulate(
        workload,
        specs,
        scenario.engine,
        telling,
        _NoRecord(),
        solver=InlineSolver(solve),
        perturb=case.perturb,
    )
    return telling


def _redrawn(workload: Workload, rng: np.random.Generator) -> NDArray[Any]:
    """Output lengths drawn from those of the 250 or so requests with the most similar prompts."""
    outputs = workload.output_tokens.copy()
    order = np.argsort(workload.prompt_tokens, kind="stable")
    for alike in np.array_split(order, max(1, len(order) // 250)):
        outputs[alike] = workload.output_tokens[rng.choice(alike, len(alike))]
    return outputs


def learnt(case: Case, seed: int) -> OutputLengths:
    """What is known of output lengths when the replay of that seed has been served."""
    scenario = _scenario(case, seed)
    workload, _ = scenario_workload(scenario, instances(scenario), _trace(case.workload))
    lengths = OutputLengths()
    for request, tokens in workload.requests():
        lengths.began(request.id, kind_of(request), _FIRST_TOKEN)
        lengths.ended(request.id, kind_of(request), tokens, finished=True)
    return lengths


class _FirstToken:
    def tokens(self) -> float:
        return 1.0


_FIRST_TOKEN = _FirstToken()


def chance(case: Case, seed: int, replays: int) -> float:
    """Variance of waits, in s², that only the true lengths would foretell; of those in a backlog."""
    scenario = _scenario(case, seed)
    workload, _ = scenario_workload(scenario, instances(scenario), _trace(case.workload))
    starts = []
    for number in range(replays):
        redraw = np.random.default_rng(number) if number else None
        started_at = _replay(case, seed, redraw=redraw, tell=False).started_at
        starts.append([started_at[name] for name in workload.ids])
    first_tokens = np.array(starts)
    ahead = np.arange(len(workload.ids)) - np.searchsorted(
        np.maximum.accumulate(first_tokens[0]), workload.arrival_s
    )
    backlog = np.flatnonzero(ahead >= BACKLOG)
    from_place = first_tokens[:, backlog] - first_tokens[:, backlog - ahead[backlog]]
    return float(from_place.var(axis=0, ddof=1).mean())


@dataclass(frozen=True, slots=True)
class CaseJob:
    """The replays of a case, one after the other, for a process of its own."""

    case: Case
    seeds: tuple[int, ...]
    redraws: int
    """Replays with outputs drawn anew, for what chance leaves; 0: not asked."""

    def __call__(self, report: Callable[[Any], None]) -> dict[str, Told]:
        """What requests were told and waited; of those asked again under a name of their own."""
        case = self.case
        again = case.policy != "static"
        parts: dict[str, list[Told]] = {}
        for seed in self.seeds:
            lengths = learnt(replace(case, times=1), seed + WARM_SEED) if case.learnt else None
            telling = _replay(case, seed, lengths, again=again)
            parts.setdefault(case.name, []).append(telling.told(False, seed))
            if again:
                parts.setdefault(f"{case.name}, asked again", []).append(telling.told(True, seed))
            report(seed)
        told = {name: Told.joined(parts) for name, parts in parts.items()}
        if self.redraws:
            variance = chance(case, self.seeds[0], self.redraws)
            told = {name: part.with_chance(variance) for name, part in told.items()}
        return told
