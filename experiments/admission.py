"""Admission control in overload: what refusing at once does for those who are let in.

    qlm-sim experiment admission          # a few minutes
    qlm-sim experiment admission --quick  # one scenario, two thresholds

The requests of shipped scenarios at several times their rate, under qlm and edf. A request is refused where
its probability of meeting its SLO is below P. Refused requests count as missed.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlm_sim.config import load_scenario
from qlm_sim.replay import replay

CASES = (("paper-wa", 2.0), ("paper-wa", 3.0), ("multi-model", 2.0))
"""Scenario, and the factor on its rate."""
THRESHOLDS = (None, 0.1, 0.3, 0.5, 0.7, 0.9)
POLICIES = ("qlm", "edf")


def measure(name: str, factor: float, policy: str, admission: float | None) -> dict[str, Any]:
    scenario = load_scenario(name)
    (run,) = replay(
        replace(
            scenario,
            workload=replace(scenario.workload, rate_rps=factor * (scenario.workload.rate_rps or 1.0)),
            scheduler=replace(scenario.scheduler, policies=(policy,), admission=admission),
        )
    )
    summary = run.summary
    return {
        "scenario": name,
        "rate_factor": factor,
        "policy": policy,
        "admission": admission,
        "refused": summary["refused"],
        "met": summary["slo_attainment"]["overall"],
        "admitted_met": summary["slo_attainment"]["admitted"],
        "goodput_rps": summary["goodput_rps"],
        "ttft_p99_s": summary["ttft_s"]["p99"],
    }


def run(out: Path, quick: bool) -> None:
    """Write admission.md and .json to ``out``."""
    rows = []
    for name, factor in CASES[:1] if quick else CASES:
        for policy in POLICIES:
            for threshold in THRESHOLDS[::3] if quick else THRESHOLDS:
                rows.append(measure(name, factor, policy, threshold))
                print(" ".join(f"{key} {value}" for key, value in rows[-1].items()))
    out.mkdir(parents=True, exist_ok=True)
    (out / "admission.json").write_text(json.dumps(rows, indent=2) + "\n")
    (out / "admission.md").write_text(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Admission control in overload",
        "",
        "3,500 requests each. Refused requests count as missed. Made by `qlm-sim experiment admission`.",
        "",
        "| scenario | policy | P | refused | SLO met | of the admitted | goodput/s | TTFT p99 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        threshold = "none" if row["admission"] is None else f"{row['admission']:g}"
        lines.append(
            f"| {row['scenario']} x {row['rate_factor']:g} | {row['policy']} | {threshold} "
            f"| {row['refused']:,} | {100 * row['met']:.1f} % | {100 * row['admitted_met']:.1f} % "
            f"| {row['goodput_rps']:.2f} | {row['ttft_p99_s']:.1f} s |"
        )
    return "\n".join(lines) + "\n"
