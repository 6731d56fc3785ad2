"""How large request groups should be: what δ does to SLOs, swaps and the size of plans.

    qlm-sim experiment delta_sweep          # some ten minutes on two cores
    qlm-sim experiment delta_sweep --quick  # two scenarios, three values

δ is the size of a request group as a share of the average batch. Small groups can be ordered finely, and make
large plans, which the same search budget orders worse; large groups are served as one, whatever their
deadlines. Overloaded scenarios of 1,500 requests, drawn as in random_scenarios from seeds of their own.

What is asked is over which range δ matters at all: where it cannot be told from the best by two standard
errors, the size of plans decides. The default is the smallest δ, which binds fewest requests together, whose
plans are hardly larger than those of the largest groups.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from random_scenarios import random_scenario

from qlm_sim.config import Scenario
from qlm_sim.config.scenario import SchedulerConfig
from qlm_sim.processes import run_jobs
from qlm_sim.replay import replay
from qlm_sim.report.style import FAINT_INK, INK, house_style, new_figure

DELTAS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
SEEDS = tuple(range(8_000, 8_024))
OVERLOAD = 1.5
"""Factor on the scenarios' rates: where all is met, no δ matters."""

Figures = dict[str, float]


def strained(seed: int) -> Scenario:
    """A random scenario under more load than it was drawn with."""
    scenario = random_scenario(seed)
    rate_rps = round(OVERLOAD * (scenario.workload.rate_rps or 1.0), 2)
    return replace(scenario, workload=replace(scenario.workload, requests=1_500, rate_rps=rate_rps))


def measure(scenario: Scenario, delta: float) -> Figures:
    """One run of qlm with groups of that size."""
    (run,) = replay(replace(scenario, scheduler=SchedulerConfig(policies=("qlm",), delta=delta)))
    summary: dict[str, Any] = run.summary
    return {
        "slo_attainment": summary["slo_attainment"]["overall"],
        "goodput_rps": summary["goodput_rps"],
        "swaps": summary["swaps"],
        "evictions": summary["evictions"],
        "groups_per_plan": float(np.mean([plan.groups for plan in run.plans])) if run.plans else 0.0,
    }


@dataclass(frozen=True, slots=True)
class Sweep:
    """All values of δ on one scenario, for a process of its own."""

    seed: int
    deltas: tuple[float, ...]

    def __call__(self, report: Callable[[Any], None]) -> list[Figures]:
        return [measure(strained(self.seed), delta) for delta in self.deltas]


def run(out: Path, quick: bool) -> None:
    """Write delta_sweep.md, .json and .png to ``out``."""
    deltas = DELTAS[1::2] if quick else DELTAS
    jobs = [Sweep(seed, deltas) for seed in (SEEDS[:2] if quick else SEEDS)]
    sweeps = run_jobs(jobs, os.cpu_count() or 1, lambda number, note: None)
    measured = {delta: [sweep[at] for sweep in sweeps] for at, delta in enumerate(deltas)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "delta_sweep.json").write_text(json.dumps(measured, indent=2) + "\n")
    (out / "delta_sweep.md").write_text(table(measured))
    draw(out / "delta_sweep.png", measured)


def attained(measured: dict[float, list[Figures]]) -> NDArray[np.float64]:
    """SLO attainment in percent, by δ and scenario."""
    return np.array([[100 * each["slo_attainment"] for each in runs] for runs in measured.values()])


def behind(measured: dict[float, list[Figures]]) -> list[tuple[float, float]]:
    """By δ: points behind the best δ on average, and the standard error of that over the scenarios."""
    rows = attained(measured)
    gap = rows[np.argmax(rows.mean(axis=1))] - rows
    return list(
        zip(gap.mean(axis=1).tolist(), (gap.std(axis=1, ddof=1) / gap.shape[1] ** 0.5).tolist(), strict=True)
    )


def alike(measured: dict[float, list[Figures]]) -> list[float]:
    """Those that are not more than two standard errors behind the best."""
    return [d for d, (gap, error) in zip(measured, behind(measured), strict=True) if gap <= 2 * error]


def table(measured: dict[float, list[Figures]]) -> str:
    default = SchedulerConfig().delta
    count = len(next(iter(measured.values())))
    lines = [
        "# The size of request groups",
        "",
        f"Means over {count} random scenarios at {OVERLOAD:g} times their rate, under `qlm`. Made by "
        "`qlm-sim experiment delta_sweep`.",
        "",
        "| δ | SLO met, % | behind the best δ, points | goodput/s | swaps | evictions | groups a plan |",
        "|---|---|---|---|---|---|---|",
    ]
    for (delta, runs), (gap, error) in zip(measured.items(), behind(measured), strict=True):
        mean = {name: float(np.mean([each[name] for each in runs])) for name in runs[0]}
        lines.append(
            f"| {delta:g}{' (default)' if delta == default else ''} | {100 * mean['slo_attainment']:.2f} "
            f"| {gap:.2f} ± {error:.2f} | {mean['goodput_rps']:.2f} | {mean['swaps']:.1f} "
            f"| {mean['evictions']:,.0f} | {mean['groups_per_plan']:.1f} |"
        )
    flat = alike(measured)
    others = ", ".join(f"{delta:g}" for delta in measured if delta not in flat) or "none"
    groups = [float(np.mean([each["groups_per_plan"] for each in runs])) for runs in measured.values()]
    saved = (groups[0] - groups[list(measured).index(default)]) / (groups[0] - groups[-1])
    most = list(measured)[-1]
    by_delta = dict(zip(measured, attained(measured).mean(axis=1).tolist(), strict=True))
    own = by_delta[default]
    smaller = max(met for delta, met in by_delta.items() if delta < default)
    lines += [
        "",
        "± is the standard error over the scenarios, each held against itself; a few of them decide nearly "
        f"all of it. More than two such errors behind the best: {others}. So attainment cannot tell δ apart "
        f"between {flat[0]:g} and {flat[-1]:g}. What δ does decide is how large plans are: of what groups of "
        f"{most:g} average batches save there, those of {default:g} have {saved:.0%}, and bind "
        f"{default / most:.2g} times as many requests to one turn. The default, {default:g}, is where the "
        "right curve becomes flat: larger groups would save little more, smaller ones make larger plans "
        f"and attained {smaller:.2f} % at most, against {own:.2f} %.",
    ]
    return "\n".join(lines) + "\n\n![SLO attainment and groups a plan by δ](delta_sweep.png)\n"


def draw(path: Path, measured: dict[float, list[Figures]]) -> None:
    """How far behind the best each δ is, with its standard error, and the size of plans."""
    deltas = list(measured)
    with house_style():
        figure = new_figure(3.0, "Request groups of δ average batches, qlm in overload")
        left, right = figure.subplots(1, 2)
        gaps, errors = zip(*behind(measured), strict=True)
        left.errorbar(deltas, gaps, yerr=errors, color="#0b62a8", marker="o", capsize=3)
        left.set_ylabel("SLO met, points behind the best δ")
        left.axhline(0, color=FAINT_INK, linewidth=0.8)
        left.invert_yaxis()
        groups = [np.mean([each["groups_per_plan"] for each in measured[delta]]) for delta in deltas]
        right.plot(deltas, groups, color="#0b62a8", marker="o")
        right.set_ylabel("groups a plan")
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xticks(deltas, [f"{delta:g}" for delta in deltas])
            axes.minorticks_off()
            axes.set_xlabel("δ")
            axes.axvline(SchedulerConfig().delta, color=FAINT_INK, linestyle=":", linewidth=1)
        left.annotate(
            "default",
            (SchedulerConfig().delta, 0.04),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            color=INK,
        )
        figure.savefig(path, dpi=110)
