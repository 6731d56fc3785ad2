"""What a decision costs as the backlog grows: from 1,000 to 400,000 queued requests on 80 instances.

    qlm-sim experiment solver_scale          # some two minutes
    qlm-sim experiment solver_scale --quick  # up to 30,000 requests

80 A100-80 that may each serve five models, four SLO classes, and a burst of requests in ten seconds, in the
simulated cluster. Each burst runs in a process of its own. The core is timed from outside, in CPU seconds of
one core: every ``handle``, and of every global plan the ``handle`` that takes the snapshot, the solving, and
the ``handle`` that puts the plan in force.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time

import numpy as np

from qlm_sim.cluster.simulation import simulate
from qlm_sim.config import Scenario
from qlm_sim.config.instances import instances
from qlm_sim.config.scenario import ClusterConfig, MixEntry
from qlm_sim.core.actions import Action, Replan
from qlm_sim.core.events import Event, FirstToken, PlanReady, RequestArrived, RequestFinished
from qlm_sim.core.manager import QueueManager
from qlm_sim.core.plan import Plan, PlanProblem
from qlm_sim.core.types import SloClass
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.policies import SchedulerSettings, make_core
from qlm_sim.report.style import house_style, new_figure
from qlm_sim.solver.inline import InlineSolver
from qlm_sim.solver.search import solve
from qlm_sim.workload.workload import Workload

INSTANCES = 80
MODELS = ("mistral-7b", "qwen2.5-7b", "llama-2-7b", "llama-3.1-8b", "vicuna-13b")
CLASSES = (
    SloClass("interactive", 20.0),
    SloClass("batch-1", 60.0),
    SloClass("batch-15", 900.0),
    SloClass("batch-2", 3600.0),
)
BURST_S = 10.0
UNTIL_S = 12.5
BURSTS = (25_000, 30_000, 40_000, 70_000, 130_000, 230_000, 430_000)
"""Requests; the instances take some 20,000 at once."""
QUICK = BURSTS[:3]
BAR_S, EVENT_BAR_S = 0.2, 50e-6
"""What a plan may take from events to plan, and a request event on average."""


@dataclass
class PlanTimes:
    """One global plan, in CPU seconds."""

    queued: int
    """Requests that waited."""
    groups: int
    snapshot_s: float
    solve_s: float = 0.0
    adopt_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.snapshot_s + self.solve_s + self.adopt_s


@dataclass
class Burst:
    """One run."""

    requests: int
    events: int
    """Arrivals, first tokens and finishes."""
    handle_s: float
    """All of the core's time but for the snapshots and the taking up of plans."""
    memory_bytes: int
    """What the process grew by while the burst came in, the simulated cluster included."""
    plans: list[PlanTimes]

    @property
    def deepest(self) -> PlanTimes:
        return max(self.plans, key=lambda plan: plan.queued)

    @property
    def event_s(self) -> float:
        """Decision cost of a request event: all that the core did, plans put down on events."""
        return (self.handle_s + sum(plan.total_s for plan in self.plans)) / self.events


class TimedCore:
    """The core, its calls timed."""

    def __init__(self, core: QueueManager) -> None:
        self._core = core
        self.plans: list[PlanTimes] = []
        self.handle_s = 0.0
        self.events = 0

    @property
    def wake_at(self) -> float:
        return self._core.wake_at

    def handle(self, now: float, events: Sequence[Event]) -> list[Action]:
        began = process_time()
        actions = self._core.handle(now, events)
        took_s = process_time() - began
        self.events += sum(type(each) in (RequestArrived, FirstToken, RequestFinished) for each in events)
        if any(type(each) is PlanReady for each in events):
            self.plans[-1].adopt_s = took_s
        elif actions and type(actions[-1]) is Replan:
            groups = actions[-1].problem.groups
            self.plans.append(PlanTimes(sum(group.requests for group in groups), len(groups), took_s))
        else:
            self.handle_s += took_s
        return actions

    def solve(self, problem: PlanProblem) -> Plan:
        began = process_time()
        plan = solve(problem)
        self.plans[-1].solve_s = process_time() - began
        return plan


class Nowhere:
    def record(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None:
        pass


def burst(requests: int) -> Burst:
    """Measure one burst, in this process."""
    mix = tuple(MixEntry(model=model, slo_class="interactive", share=1.0) for model in MODELS)
    cluster = ClusterConfig(gpu="A100-80", count=INSTANCES, models=MODELS)
    specs = instances(Scenario(name="scale", cluster=(cluster,), mix=mix))
    core = TimedCore(make_core("qlm", specs, SchedulerSettings()))
    work = workload(requests)
    before = memory_bytes()
    simulate(work, specs, EngineConfig(), core, Nowhere(), solver=InlineSolver(core.solve), until_s=UNTIL_S)
    return Burst(requests, core.events, core.handle_s, memory_bytes() - before, core.plans)


def workload(requests: int) -> Workload:
    rng = np.random.default_rng(requests)
    return Workload(
        ids=[f"r{number}" for number in range(requests)],
        arrival_s=np.sort(rng.uniform(0, BURST_S, requests)),
        prompt_tokens=np.clip(rng.lognormal(5.0, 1.0, requests), 4, 2000).astype(int),
        output_tokens=np.clip(rng.lognormal(5.0, 0.8, requests), 2, 1500).astype(int),
        max_tokens=np.full(requests, 2048),
        models=MODELS,
        model_index=rng.integers(0, len(MODELS), requests),
        slo_classes=CLASSES,
        slo_index=rng.integers(0, len(CLASSES), requests),
    )


def memory_bytes() -> int:
    """Resident memory of this process. Zero where there is no /proc."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.exists() else 0


def run(out: Path, quick: bool) -> None:
    """Write solver_scale.md, .json and .png to ``out``."""
    bursts = []
    for requests in QUICK if quick else BURSTS:
        done = subprocess.run(
            [sys.executable, __file__, str(requests)], check=True, stdout=subprocess.PIPE, text=True
        )
        data = json.loads(done.stdout)
        bursts.append(Burst(**data | {"plans": [PlanTimes(**plan) for plan in data["plans"]]}))
        deepest = bursts[-1].deepest
        print(f"{deepest.queued:,} queued in {deepest.groups:,} groups: {1e3 * deepest.total_s:.0f} ms")
    out.mkdir(parents=True, exist_ok=True)
    (out / "solver_scale.json").write_text(json.dumps([asdict(each) for each in bursts], indent=1) + "\n")
    (out / "solver_scale.md").write_text(_report(bursts))
    _draw(out / "solver_scale.png", bursts)


def exponent(bursts: Sequence[Burst]) -> float:
    """k in: time of a plan, from events to plan, grows as the k-th power of groups x log groups."""
    plans = [plan for each in bursts for plan in each.plans if plan.groups >= 100]
    groups = np.array([plan.groups for plan in plans])
    total_s = np.array([plan.total_s for plan in plans])
    return float(np.polyfit(np.log(groups * np.log(groups)), np.log(total_s), 1)[0])


def _report(bursts: Sequence[Burst]) -> str:
    lines = [
        "# Decisions under a growing backlog",
        "",
        f"Bursts of requests for {len(MODELS)} models in {len(CLASSES)} SLO classes on {INSTANCES} A100-80. "
        f"CPU time of one core ({platform.machine()}, Python {platform.python_version()}); made by "
        "`qlm-sim experiment solver_scale`. Each row is the deepest backlog of a burst. The plan is what the "
        "handle that takes the snapshot, solving, and the handle that puts the plan in force took. An event "
        "is an arrival, a first token or a finish, and its cost is all that the core and the solver did in "
        "the run, plans included, over the events. Memory is what the process grew by, the simulated cluster "
        "included.",
        "",
        "| queued | groups | snapshot, ms | solve, ms | adopt, ms | plan, ms | event, µs | bytes/request |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in bursts:
        plan = each.deepest
        cells = (1e3 * s for s in (plan.snapshot_s, plan.solve_s, plan.adopt_s, plan.total_s))
        lines.append(
            f"| {plan.queued:,} | {plan.groups:,} | "
            + " | ".join(f"{cell:.1f}" for cell in cells)
            + f" | {1e6 * each.event_s:.1f} | {each.memory_bytes / each.requests:,.0f} |"
        )
    slowest = max((plan for each in bursts for plan in each.plans), key=lambda plan: plan.total_s)
    lines += [
        "",
        f"Of all {sum(len(each.plans) for each in bursts)} plans the slowest took "
        f"{1e3 * slowest.total_s:.0f} ms, with {slowest.queued:,} requests queued (bar: "
        f"{1e3 * BAR_S:.0f} ms). A plan's time grows as the {exponent(bursts):.2f}th power of groups x log "
        "groups: the search is cut off by its budget, and what is left are passes over the groups. While "
        "requests pour in, groups that came since the snapshot are placed when the plan is adopted.",
    ]
    return "\n".join(lines) + "\n"


def _draw(path: Path, bursts: Sequence[Burst]) -> None:
    with house_style():
        figure = new_figure(3.6)
        left, right = figure.subplots(1, 2)
        plans = [plan for each in bursts for plan in each.plans if plan.queued >= 1000]
        queued = np.array([plan.queued for plan in plans])
        left.scatter(queued, [1e3 * plan.total_s for plan in plans], s=9, color="#0b62a8", label="plan")
        left.axhline(1e3 * BAR_S, color="#667085", linewidth=0.8, linestyle=":")
        left.text(1000, 1.05e3 * BAR_S, f"bar: {1e3 * BAR_S:.0f} ms", fontsize=8)
        last = max(plans, key=lambda plan: plan.queued)
        groups = np.array(sorted(plan.groups for plan in plans))
        reference = last.total_s * groups * np.log(groups) / (last.groups * np.log(last.groups))
        left.plot(
            np.sort(queued),
            1e3 * reference,
            color="#e69f00",
            linewidth=1,
            label="as groups x log groups grow",
        )
        left.set(
            xscale="log", yscale="log", xlabel="requests queued", ylabel="ms", title="From events to plan"
        )
        left.legend(loc="lower right")
        depths = [each.deepest.queued for each in bursts]
        right.plot(depths, [1e6 * each.event_s for each in bursts], marker="o", color="#0b62a8")
        right.axhline(1e6 * EVENT_BAR_S, color="#667085", linewidth=0.8, linestyle=":")
        right.text(depths[0], 1.02e6 * EVENT_BAR_S, f"bar: {1e6 * EVENT_BAR_S:.0f} µs", fontsize=8)
        right.set(
            xscale="log",
            ylim=(0, 1.2e6 * EVENT_BAR_S),
            xlabel="requests queued at the deepest",
            ylabel="µs",
            title="Decision cost of a request event",
        )
        left.yaxis.set_major_formatter("{x:g}")
        for axes in (left, right):
            axes.set_xlim(900, 600_000)
            axes.xaxis.set_major_formatter("{x:,.0f}")
        figure.savefig(path, dpi=110)


if __name__ == "__main__":
    print(json.dumps(asdict(burst(int(sys.argv[1])))))
