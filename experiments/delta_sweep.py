"""How large request groups should be: what δ does to SLOs, swaps and the size of plans.

    qlm-sim experiment delta_sweep          # two minutes on two cores
    qlm-sim experiment delta_sweep --quick  # two scenarios of each kind, three values

δ is the size of a request group as a share of the average batch. Small groups can be ordered finely, and make
large plans, which the same search budget orders worse; large groups are served as one, whatever their
deadlines. Two kinds of scenarios, both overloaded: several models and classes, drawn as in random_scenarios
from seeds of their own, and one class of one model, where nothing but deadlines tells requests apart.

The default is the largest δ, which makes the smallest plans, that is in neither kind behind the best by more
than two standard errors.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from random_scenarios import random_scenario

from qlm_sim.config import Scenario
from qlm_sim.config.scenario import ClusterConfig, MixEntry, SchedulerConfig, WorkloadConfig
from qlm_sim.core.types import SloClass
from qlm_sim.processes import run_jobs
from qlm_sim.replay import replay
from qlm_sim.report.style import FAINT_INK, INK, house_style, new_figure

DELTAS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
OVERLOAD = 1.5
"""Factor on the random scenarios' rates: where all is met, no δ matters."""
CROWD_RPS = (6.0, 8.0)
"""Requests per second and instance of the crowds: from barely too much for Llama-2-7B on an A100-80 on."""

Figures = dict[str, float]
Measured = dict[float, list[Figures]]
"""By δ, of each scenario."""


def strained(seed: int) -> Scenario:
    """A random scenario under more load than it was drawn with."""
    scenario = random_scenario(seed)
    rate_rps = round(OVERLOAD * (scenario.workload.rate_rps or 1.0), 2)
    return replace(scenario, workload=replace(scenario.workload, requests=1_500, rate_rps=rate_rps))


def crowded(seed: int, folder: Path) -> Scenario:
    """Requests of one class for one model, more than its one to four instances can serve in time.

    Lengths are lognormal, of about the means of Azure's conversations (883 and 282 tokens). Tokens are
    promised too, so that nobody is evicted for another: what is late is late.
    """
    rng = np.random.default_rng(seed)
    instances = int(rng.integers(1, 5))
    requests = 1_500 * instances
    prompt = np.clip(rng.lognormal(np.log(959) - 0.5, 1.0, requests), 8, 3500).astype(int)
    output = np.clip(rng.lognormal(np.log(283) - 0.32, 0.8, requests), 2, 4096 - prompt).astype(int)
    trace = folder / f"crowd-{seed}.csv"
    np.savetxt(
        trace,
        [*zip(prompt, output, strict=True)],
        "%d",
        ",",
        header="prompt_tokens,output_tokens",
        comments="",
    )
    return Scenario(
        name=f"crowded-{seed}",
        slo=(SloClass("chat", ttft_s=20.0, tpot_s=0.2),),
        cluster=(ClusterConfig(gpu="A100-80", count=instances, models=("llama-2-7b",)),),
        mix=(MixEntry(model="llama-2-7b", slo_class="chat", share=1.0),),
        seed=seed,
        workload=WorkloadConfig(
            trace=str(trace),
            arrivals="poisson",
            rate_rps=round(instances * float(rng.uniform(*CROWD_RPS)), 2),
        ),
    )


SEVERAL = f"Several models and classes, at {OVERLOAD:g} times the rates of random scenarios"
ONE = "One class of one model, more than its instances serve in time"
SEEDS = {SEVERAL: range(8_000, 8_024), ONE: range(8_100, 8_116)}


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

    scenario: Scenario
    deltas: tuple[float, ...]

    def __call__(self, report: Callable[[Any], None]) -> list[Figures]:
        return [measure(self.scenario, delta) for delta in self.deltas]


def run(out: Path, quick: bool) -> None:
    """Write delta_sweep.md, .json and .png to ``out``."""
    deltas = DELTAS[1::2] if quick else DELTAS
    with TemporaryDirectory(prefix="qlm-crowds-") as folder:
        scenarios = {
            kind: [
                strained(seed) if kind == SEVERAL else crowded(seed, Path(folder))
                for seed in (seeds[:2] if quick else seeds)
            ]
            for kind, seeds in SEEDS.items()
        }
        jobs = [Sweep(each, deltas) for kind in SEEDS for each in scenarios[kind]]
        sweeps = iter(run_jobs(jobs, os.cpu_count() or 1, lambda number, note: None))
    measured: dict[str, Measured] = {}
    for kind, of_kind in scenarios.items():
        rows = [next(sweeps) for _ in of_kind]
        measured[kind] = {delta: [row[at] for row in rows] for at, delta in enumerate(deltas)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "delta_sweep.json").write_text(json.dumps(measured, indent=2) + "\n")
    (out / "delta_sweep.md").write_text(report(measured))
    draw(out / "delta_sweep.png", measured)


def attained(measured: Measured) -> NDArray[np.float64]:
    """SLO attainment in percent, by δ and scenario."""
    return np.array([[100 * each["slo_attainment"] for each in runs] for runs in measured.values()])


def behind(measured: Measured) -> list[tuple[float, float]]:
    """By δ: points behind the best δ on average, and the standard error of that over the scenarios."""
    rows = attained(measured)
    gap = rows[np.argmax(rows.mean(axis=1))] - rows
    return list(
        zip(gap.mean(axis=1).tolist(), (gap.std(axis=1, ddof=1) / gap.shape[1] ** 0.5).tolist(), strict=True)
    )


def alike(measured: Measured) -> list[float]:
    """Those that are not more than two standard errors behind the best."""
    return [d for d, (gap, error) in zip(measured, behind(measured), strict=True) if gap <= 2 * error]


def report(measured: dict[str, Measured]) -> str:
    """The result as Markdown."""
    default = SchedulerConfig().delta
    lines = ["# The size of request groups", "", "Under `qlm`. Made by `qlm-sim experiment delta_sweep`."]
    for kind, each in measured.items():
        lines += ["", f"## {kind}", "", *table(each)]
    good = [
        delta for delta in next(iter(measured.values())) if all(delta in alike(e) for e in measured.values())
    ]
    lines += [
        "",
        "± is the standard error over the scenarios, each held against itself. Not more than two such errors "
        f"behind the best in either kind: {', '.join(f'{delta:g}' for delta in good) or 'none'}. The largest "
        f"of them makes the smallest plans; the default is {default:g}.",
    ]
    return "\n".join(lines) + "\n\n![SLO attainment and groups a plan by δ](delta_sweep.png)\n"


def table(measured: Measured) -> list[str]:
    """Means over the scenarios of one kind."""
    default = SchedulerConfig().delta
    lines = [
        f"Means over {len(next(iter(measured.values())))} scenarios.",
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
    return lines


def draw(path: Path, measured: dict[str, Measured]) -> None:
    """By kind of scenario, how far behind the best each δ is, and the size of plans."""
    with house_style():
        figure = new_figure(3.0, "Request groups of δ average batches, qlm in overload")
        left, right = figure.subplots(1, 2)
        for (kind, each), color, marker in zip(measured.items(), ("#0b62a8", "#b5541c"), "os", strict=True):
            deltas = list(each)
            gaps, errors = zip(*behind(each), strict=True)
            left.errorbar(
                deltas, gaps, yerr=errors, color=color, marker=marker, capsize=3, label=kind.split(",")[0]
            )
            groups = [np.mean([one["groups_per_plan"] for one in each[delta]]) for delta in deltas]
            right.plot(deltas, groups, color=color, marker=marker)
        left.set_ylabel("SLO met, points behind the best δ")
        left.axhline(0, color=FAINT_INK, linewidth=0.8)
        left.invert_yaxis()
        left.legend(frameon=False, loc="lower left")
        right.set_ylabel("groups a plan")
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xticks(deltas, [f"{delta:g}" for delta in deltas])
            axes.minorticks_off()
            axes.set_xlabel("δ")
            axes.axvline(SchedulerConfig().delta, color=FAINT_INK, linestyle=":", linewidth=1)
        left.annotate(
            "default",
            (SchedulerConfig().delta, 0.5),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            color=INK,
        )
        figure.savefig(path, dpi=110)
