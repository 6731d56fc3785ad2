"""How large request groups should be: what δ does to SLOs, swaps and the size of plans.

    qlm-sim experiment delta_sweep          # some minutes
    qlm-sim experiment delta_sweep --quick  # two scenarios, three values

δ is the size of a request group as a share of the average batch. Small groups can be ordered finely, and make
large plans, which the same search budget orders worse; large groups are served as one, whatever their
deadlines. Overloaded scenarios of 1,500 requests, drawn as in random_scenarios from seeds of their own.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from random_scenarios import random_scenario

from qlm_sim.config import Scenario
from qlm_sim.config.scenario import SchedulerConfig
from qlm_sim.replay import replay
from qlm_sim.report.style import FAINT_INK, INK, house_style, new_figure

DELTAS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
SEEDS = tuple(range(8_000, 8_010))
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


def run(out: Path, quick: bool) -> None:
    """Write delta_sweep.md, .json and .png to ``out``."""
    deltas = DELTAS[1::2] if quick else DELTAS
    seeds = SEEDS[:2] if quick else SEEDS
    measured: dict[float, list[Figures]] = {delta: [] for delta in deltas}
    for seed in seeds:
        scenario = strained(seed)
        for delta in deltas:
            figures = measure(scenario, delta)
            measured[delta].append(figures)
            print(
                f"{seed} δ {delta:g}: " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            )
    means = {
        delta: {name: float(np.mean([each[name] for each in runs])) for name in runs[0]}
        for delta, runs in measured.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "delta_sweep.json").write_text(json.dumps(measured, indent=2) + "\n")
    (out / "delta_sweep.md").write_text(table(means, errors(measured)))
    draw(out / "delta_sweep.png", measured)


def errors(measured: dict[float, list[Figures]]) -> dict[float, float]:
    """Standard error of each δ's mean attainment, in points, over the scenarios.

    Each scenario is held against its own mean: how hard it is says nothing of δ.
    """
    rows = np.array([[100 * each["slo_attainment"] for each in runs] for runs in measured.values()])
    spread = (rows - rows.mean(axis=0)).std(axis=1, ddof=1) / np.sqrt(rows.shape[1])
    return dict(zip(measured, spread.tolist(), strict=True))


def table(means: dict[float, Figures], error: dict[float, float]) -> str:
    default = SchedulerConfig().delta
    attained = [100 * figures["slo_attainment"] for figures in means.values()]
    lines = [
        "# The size of request groups",
        "",
        f"Means over random scenarios at {OVERLOAD:g} times their rate, under `qlm`. Made by "
        "`qlm-sim experiment delta_sweep`.",
        "",
        "| δ | SLO met | goodput/s | swaps | evictions | groups a plan |",
        "|---|---|---|---|---|---|",
    ]
    for delta, figures in means.items():
        lines.append(
            f"| {delta:g}{' (default)' if delta == default else ''} "
            f"| {100 * figures['slo_attainment']:.2f} ± {error[delta]:.2f} % | {figures['goodput_rps']:.2f} "
            f"| {figures['swaps']:.1f} | {figures['evictions']:,.0f} | {figures['groups_per_plan']:.1f} |"
        )
    lines += [
        "",
        f"The attainments lie within {max(attained) - min(attained):.2f} points; the largest standard error "
        f"of one of them is {max(error.values()):.2f} points.",
    ]
    return "\n".join(lines) + "\n\n![SLO attainment and groups a plan by δ](delta_sweep.png)\n"


def draw(path: Path, measured: dict[float, list[Figures]]) -> None:
    """Attainment, with its standard error over the scenarios, and the size of plans, by δ."""
    deltas = list(measured)
    with house_style():
        figure = new_figure(3.0, "Request groups of δ average batches, qlm in overload")
        left, right = figure.subplots(1, 2)
        rows = np.array([[100 * each["slo_attainment"] for each in measured[delta]] for delta in deltas])
        spread = list(errors(measured).values())
        left.errorbar(deltas, rows.mean(axis=1), yerr=spread, color="#0b62a8", marker="o", capsize=3)
        left.set_ylabel("SLO met, %")
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
