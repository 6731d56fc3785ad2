"""How well waits are forecast: what a request was told when it arrived, against what it waited.

    qlm-sim experiment rwt_accuracy          # about four minutes
    qlm-sim experiment rwt_accuracy --quick  # one seed of a few cases

Every request of a replay is told the mean, median and 90 % bound of its time to first token at its
arrival. The estimator has learnt output lengths from an earlier replay of other requests; it starts
without knowledge of the engine's speed and throughput beyond the profile. The seeds here took no part in
its making; the cases did, with other seeds, but for those that are held out. ``naive`` is what is
published as QLM's code: requests ahead times mean output tokens over a
constant token throughput, here that of a full batch by the profile, with the same learnt mean.

``R² at best`` is what nobody who does not know the true lengths can pass: the same requests are replayed
with outputs drawn anew among prompts of like length, and what of the time from place to place varies
between those replays is left as the error.

Azure's traces are read from the folder that QLM_DATA names; without it, their cases are left out.
"""

import os
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qlm_sim.cluster.simulation import simulate
from qlm_sim.config import Scenario
from qlm_sim.config.instances import instances
from qlm_sim.config.scenario import ClusterConfig, MixEntry, WorkloadConfig
from qlm_sim.core.actions import Action
from qlm_sim.core.events import Event, FirstToken, RequestArrived, RequestFinished
from qlm_sim.core.manager import QueueManager
from qlm_sim.core.types import InstanceSpec
from qlm_sim.estimator.asked import AskedEstimator
from qlm_sim.estimator.lengths import OutputLengths, kind_of
from qlm_sim.estimator.service import group_service
from qlm_sim.policies import SchedulerSettings, make_core
from qlm_sim.replay import scenario_workload
from qlm_sim.report.style import FAINT_INK, INK, house_style, new_figure
from qlm_sim.solver.inline import InlineSolver
from qlm_sim.solver.search import solve
from qlm_sim.workload.readers import read_trace
from qlm_sim.workload.workload import Trace, Workload

Floats = NDArray[np.float64]

SEEDS = tuple(range(9_001, 9_007))
WARM_SEED = 500
"""Added to a seed: the requests that lengths are learnt from."""
REDRAWS = 8
"""Replays with outputs drawn anew."""
ASK_AGAIN_S = 20.0
"""Seconds between two times at which some of those who wait are asked about again ..."""
ASK_AGAIN = 8
"""... and how many of them."""
BACKLOG = 64
"""A queue of so many requests ahead is a backlog."""
BLUE, ORANGE = "#0b62a8", "#e69f00"


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of replay: an instance, its model, and what comes how fast."""

    gpu: str
    model: str
    rate_rps: float
    requests: int = 3_500
    """As many as a trace of the paper has."""
    workload: str = "sharegpt"
    mega: float = 0.0
    """Share of requests with prompts of 4,000 to 12,000 tokens."""
    classes: tuple[str, ...] = ("batch-2",)
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
            notes.append(f"{len(self.classes)} classes")
        if self.policy != "static":
            notes.append(self.policy)
        if self.perturb != 1.0:
            notes.append(f"steps x {self.perturb}")
        if not self.learnt:
            notes.append("nothing learnt")
        return f"{self.gpu}, {self.model}, {', '.join(notes)}, {self.rate_rps:g}/s"


def _azure(name: str) -> str:
    folder = Path(os.environ.get("QLM_DATA", "../shared")) / "data" / "azure_llm_2023"
    return str(folder / f"AzureLLMInferenceTrace_{name}.csv")


OVERLOADED = (
    Case("A10", "mistral-7b", 12),
    Case("A10", "llama-2-7b", 6),
    Case("A100-80", "vicuna-13b", 15),
    Case("A100-80", "mistral-7b", 40),
    Case("H100", "llama-3.1-8b", 60),
    Case("L40S", "qwen2.5-7b", 20),
    Case("A100-80", "mistral-7b", 15, workload=_azure("conv")),
    Case("H100", "llama-3.1-8b", 30, workload=_azure("code")),
    Case("A100-80", "llama-3.1-8b", 20, mega=0.1),
)
"""Queues that grow, one class, first come first served."""
HELD_OUT = (
    Case("RTX-4090", "llama-3.1-8b", 12),
    Case("A10G", "qwen2.5-7b", 10),
    Case("A100-40", "llama-2-13b", 6),
    Case("H200", "codellama-34b", 30),
)
"""Overloaded too, but first replayed when all else was done."""
NEAR_SATURATION = (
    Case("A10", "mistral-7b", 4),
    Case("A100-80", "vicuna-13b", 5),
    Case("A100-80", "mistral-7b", 15),
    Case("H100", "llama-3.1-8b", 27),
    Case("L40S", "qwen2.5-7b", 6.5),
)
PERTURBED = tuple(
    replace(case, perturb=factor)
    for case in (OVERLOADED[0], OVERLOADED[2], OVERLOADED[4])
    for factor in (0.8, 1.2)
)
UNLEARNT = tuple(replace(case, learnt=False) for case in (OVERLOADED[0], OVERLOADED[2], OVERLOADED[4]))
REORDERED = (
    Case("A100-80", "vicuna-13b", 8, policy="qlm"),
    Case("A100-80", "vicuna-13b", 8, policy="qlm", classes=("interactive", "batch-1", "batch-2")),
)
"""Queues whose order changes after a request was told its wait."""


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

    def where(self, rows: NDArray[np.bool_]) -> "Told":
        return Told(*(getattr(self, name)[rows] for name in self.__slots__))

    def with_chance(self, variance: float) -> "Told":
        return replace(self, chance=np.full_like(self.waited, variance))

    @staticmethod
    def joined(parts: Sequence["Told"]) -> "Told":
        return Told(*(np.concatenate([getattr(p, name) for p in parts]) for name in Told.__slots__))


class Telling:
    """A core that is asked for the wait of every request as it arrives, and notes its first token."""

    def __init__(
        self, core: QueueManager, spec: InstanceSpec, model: str, *, arrivals: bool, again: bool
    ) -> None:
        """Asks about ``arrivals``, about some of those who wait ``again`` and again, or about nobody."""
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
        self.started_at: dict[str, float] = {}

    @property
    def wake_at(self) -> float:
        return self._core.wake_at

    def handle(self, now: float, events: Sequence[Event]) -> list[Action]:
        actions = self._core.handle(now, events)
        for event in events:
            if isinstance(event, RequestArrived) and self._arrivals:
                self._told.append((event.request.id, now, self._tell(event.request.id, now)))
            elif isinstance(event, FirstToken | RequestFinished):
                self.started_at.setdefault(event.request_id, now)
        if now >= self._ask_at:
            self._ask_at = now + ASK_AGAIN_S
            waiting = [name for name in self._core.requests if name not in self.started_at]
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

    def told(self, again: bool) -> Told:
        notes = self._again if again else self._told
        rows = [(*told, self.started_at[name] - at, np.nan) for name, at, told in notes]
        return Told(*np.array(rows).T)


class _NoRecord:
    def record(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None:
        """What is told is all that is kept."""


def _scenario(case: Case, seed: int) -> Scenario:
    shares = [(name, 1 / len(case.classes)) for name in case.classes]
    mix = [MixEntry(case.model, name, share * (1 - case.mega)) for name, share in shares]
    if case.mega:
        mix += [MixEntry(case.model, n, s * case.mega, prompt_tokens=(4_000, 12_000)) for n, s in shares]
    return Scenario(
        name="rwt",
        seed=seed,
        mix=tuple(mix),
        cluster=(ClusterConfig(gpu=case.gpu, count=1, models=(case.model,)),),
        workload=WorkloadConfig(
            trace=case.workload, requests=case.requests, arrivals="poisson", rate_rps=case.rate_rps
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
) -> tuple[Telling, QueueManager]:
    scenario = _scenario(case, seed)
    specs = instances(scenario)
    workload, _ = scenario_workload(scenario, specs, _trace(case.workload))
    if redraw is not None:
        workload = replace(workload, output_tokens=_redrawn(workload, redraw))
    core = make_core(case.policy, specs, SchedulerSettings(forecasts=True))
    if lengths is not None:
        core.estimator.lengths = lengths  # type: ignore[attr-defined]
        core.estimator.questions.lengths = deepcopy(lengths)  # type: ignore[attr-defined]
    telling = Telling(core, specs[0], case.model, arrivals=tell, again=again)
    simulate(
        workload,
        specs,
        scenario.engine,
        telling,
        _NoRecord(),
        solver=InlineSolver(solve),
        perturb=case.perturb,
    )
    return telling, core


def _redrawn(workload: Workload, rng: np.random.Generator) -> NDArray[np.int64]:
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
    tokens = 1.0


_FIRST_TOKEN = _FirstToken()


@cache
def chance(case: Case, replays: int) -> float:
    """Variance of waits, in s², that only the true lengths would foretell; of those in a backlog."""
    workload, _ = scenario_workload(
        _scenario(case, SEEDS[0]), instances(_scenario(case, SEEDS[0])), _trace(case.workload)
    )
    starts = []
    for number in range(replays):
        redraw = np.random.default_rng(number) if number else None
        started_at = _replay(case, SEEDS[0], redraw=redraw, tell=False)[0].started_at
        starts.append([started_at[name] for name in workload.ids])
    first_tokens = np.array(starts)
    ahead = np.arange(len(workload.ids)) - np.searchsorted(
        np.maximum.accumulate(first_tokens[0]), workload.arrival_s
    )
    backlog = np.flatnonzero(ahead >= BACKLOG)
    from_place = first_tokens[:, backlog] - first_tokens[:, backlog - ahead[backlog]]
    return float(from_place.var(axis=0, ddof=1).mean())


def measured(case: Case, seeds: Sequence[int]) -> dict[str, Told]:
    """What requests were told and waited, in one replay for each seed; under qlm also when asked again."""
    again = case.policy != "static"
    parts: dict[str, list[Told]] = {}
    for seed in seeds:
        lengths = learnt(case, seed + WARM_SEED) if case.learnt else None
        telling, _ = _replay(case, seed, lengths, again=again)
        parts.setdefault(case.name, []).append(telling.told(again=False))
        if again:
            parts.setdefault(f"{case.name}, asked again", []).append(telling.told(again=True))
    return {name: Told.joined(told) for name, told in parts.items()}


def r_squared(predicted: Floats, actual: Floats) -> float:
    """Share of the variance of ``actual`` that ``predicted`` explains as it stands, without a fit."""
    return float(1 - ((predicted - actual) ** 2).sum() / ((actual - actual.mean()) ** 2).sum())


@dataclass(frozen=True, slots=True)
class Score:
    """How good the forecasts of some requests were."""

    requests: int
    mean_wait_s: float
    r2: float
    r2_at_best: float
    """What R² would be if errors were no more than chance."""
    naive_r2: float
    bias: float
    """Sum of means told over sum of waits, less 1."""
    naive_bias: float
    covered: float
    """Share of waits within their 90 % bound."""
    below_median: float

    @staticmethod
    def of(told: Told) -> "Score":
        waited = told.waited
        return Score(
            requests=len(waited),
            mean_wait_s=float(waited.mean()),
            r2=r_squared(told.mean, waited),
            r2_at_best=float(1 - told.chance.mean() / waited.var()),
            naive_r2=r_squared(told.naive, waited),
            bias=float(told.mean.sum() / waited.sum() - 1),
            naive_bias=float(told.naive.sum() / waited.sum() - 1),
            covered=float((waited <= told.bound).mean()),
            below_median=float((waited <= told.median).mean()),
        )

    def cells(self, deep: bool) -> str:
        at_best = "" if not deep else "- | " if np.isnan(self.r2_at_best) else f"{self.r2_at_best:.4f} | "
        return (
            f"{self.requests:,} | {self.mean_wait_s:.2f} | {self.r2:.4f} | {at_best}"
            f"{self.naive_r2:.3f} | {100 * self.bias:+.1f} | {100 * self.naive_bias:+.1f} | "
            f"{100 * self.covered:.1f} | {100 * self.below_median:.1f}"
        )


def _head(deep: bool) -> str:
    names = ["case", "requests", "mean wait, s", "R²", "naive R²", "bias, %", "naive bias, %"]
    names += ["within 90 % bound, %", "below median, %"]
    if deep:
        names.insert(4, "R² at best")
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def _rows(results: dict[str, Told], deep: bool) -> Iterator[str]:
    kept = {}
    for name, told in results.items():
        part = told.where((told.ahead >= BACKLOG) == deep)
        if len(part.waited) >= 50:
            kept[name] = part
            yield f"| {name} | {Score.of(part).cells(deep)} |"
    kept = {name: part for name, part in kept.items() if not name.endswith("asked again")}
    if len(kept) > 1:
        yield f"| **all** | {Score.of(Told.joined(list(kept.values()))).cells(deep)} |"


def _scatter(results: dict[str, Told], path: Path, title: str) -> None:
    """Told against waited, a panel for each case; a sample of its requests."""
    with house_style():
        columns = 3
        rows = -(-len(results) // columns)
        figure = new_figure(2.9 * rows + 0.4, title)
        for index, (name, told) in enumerate(results.items()):
            axes = figure.add_subplot(rows, columns, index + 1)
            every = slice(None, None, max(1, len(told.waited) // 1_500))
            top = float(told.waited.max()) * 1.05
            for column, colour, label in ((told.naive, ORANGE, "naive"), (told.mean, BLUE, "forecast")):
                axes.scatter(
                    told.waited[every], column[every], s=3, color=colour, alpha=0.5, linewidths=0, label=label
                )
            axes.plot([0, top], [0, top], color=FAINT_INK, linewidth=0.8)
            axes.set(xlim=(0, top), ylim=(0, 1.2 * top))
            gpu, model, rest = name.split(", ", 2)
            axes.set_title(f"{gpu}, {model}\n{rest}", fontsize=8, color=INK)
            axes.set_xlabel("waited, s")
            axes.set_ylabel("told, s")
            if not index:
                axes.legend(loc="upper left", markerscale=4)
        figure.savefig(path, dpi=110)


@dataclass(frozen=True, slots=True)
class Section:
    """Tables of one kind of case, and a figure."""

    key: str
    cases: tuple[Case, ...]
    seeds: int
    title: str
    text: str


SECTIONS = (
    Section(
        "overloaded",
        OVERLOADED,
        6,
        "Queues that grow, first come first served",
        "The queue is in order, so that a position means something. One instance, one class.",
    ),
    Section(
        "held_out",
        HELD_OUT,
        4,
        "The same, on what nobody looked at before",
        "GPUs and models of which no replay was run, and no number seen, while the estimator was made. One "
        "of the replays on the RTX-4090 is forecast up to 39 % too long in its second half, the others as "
        "elsewhere; why is not known yet.",
    ),
    Section(
        "near_saturation",
        NEAR_SATURATION,
        2,
        "Near saturation",
        "Short queues come and go. Most requests wait for no departure at all, but for the iteration under "
        "way and their own prefill; what there is of variance is mostly chance.",
    ),
    Section(
        "perturbed",
        PERTURBED,
        3,
        "Engines that are not as their profile says",
        "Every step takes 0.8 or 1.2 times what the profile promises; the estimator is not told.",
    ),
    Section(
        "unlearnt",
        UNLEARNT,
        3,
        "Nothing learnt before",
        "The first requests are told by the prior (mean 256 tokens), the others by what has come in.",
    ),
    Section(
        "reordered",
        REORDERED,
        1,
        "Queues that are reordered",
        "The policy qlm puts shorter and more urgent work ahead of what waits, and does so anew with every "
        "plan. A forecast says what the order in force means; it cannot know who will come and be put ahead, "
        "so that what is told at arrival is too short for those who are overtaken. *Asked again* are those "
        f"who wait, {ASK_AGAIN} or so every {ASK_AGAIN_S:g} s, about the rest of their wait.",
    ),
)


def run(out: Path, quick: bool) -> None:
    """Write rwt_accuracy.md and one PNG for each of its sections to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    flag = " --quick" if quick else ""
    lines = [
        "# Forecast and actual waiting times",
        "",
        f"Made by `qlm-sim experiment rwt_accuracy{flag}`, with seeds that took no part in making the "
        "estimator; its constants were chosen on other seeds of these cases, but for those held out. Told at "
        "arrival against waited until the first token. R² is that of the means as they "
        "were told, no line fitted; naive is n · mean tokens / throughput. R² at best is what the chance in "
        f"output lengths leaves to anybody who does not know them, from {REDRAWS} replays with lengths drawn "
        "anew; it supposes that their distribution is known exactly, while the estimator has it from 3,500 "
        "requests. Waits of one replay are alike in their error: a case of 6 replays is worth some fifteen "
        "independent requests, which lets its coverage stray 8 points around what it would be of many.",
    ]
    for section in SECTIONS:
        results: dict[str, Told] = {}
        seeds = SEEDS[: 1 if quick else section.seeds]
        for case in section.cases[:2] if quick else section.cases:
            if case.workload != "sharegpt" and not Path(case.workload).exists():
                lines += ["", f"Left out: {case.name}, as {Path(case.workload).name} is not under QLM_DATA."]
                continue
            told = measured(case, seeds)
            if case.policy == "static" and section.key != "near_saturation":
                left = chance(replace(case, learnt=True), 3 if quick else REDRAWS)
                told = {name: part.with_chance(left) for name, part in told.items()}
            results |= told
            print(f"{case.name}: R² {Score.of(results[case.name]).r2:.4f}")
        lines += ["", f"## {section.title}", "", f"{section.text} {len(seeds)} replay(s) of each case."]
        for deep, note in (
            (True, f"{BACKLOG} requests or more ahead"),
            (False, f"Fewer than {BACKLOG} ahead"),
        ):
            rows = list(_rows(results, deep))
            if rows:
                lines += ["", f"{note}:", "", _head(deep), *rows]
        _scatter(results, out / f"rwt_accuracy_{section.key}.png", section.title)
        lines += ["", f"![{section.title}](rwt_accuracy_{section.key}.png)"]
    (out / "rwt_accuracy.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(Path(__file__).parent / "results", quick=False)
