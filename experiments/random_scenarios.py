"""Every policy on random multi-model scenarios: does qlm win where nobody chose the case for it?

    qlm-sim experiment random_scenarios          # 20 scenarios, five minutes or so on two cores
    qlm-sim experiment random_scenarios --quick  # 4 of them, in less than one

Clusters of 1 to 3 A100-80 and up to 3 A10, 2 to 5 models, one to three SLO classes a model, ShareGPT
lengths, Poisson or bursty arrivals, from idle to well past saturation. The seeds were drawn once and
used nowhere else: what was tuned was tuned on others.
"""

import json
from pathlib import Path

import numpy as np

from qlm_sim.config import Scenario
from qlm_sim.config.scenario import ClusterConfig, MixEntry, SchedulerConfig, WorkloadConfig
from qlm_sim.policies import POLICIES
from qlm_sim.replay import replay

SEEDS = range(8_300, 8_320)
A10_MODELS = ("mistral-7b", "qwen2.5-7b", "llama-2-7b")
A100_MODELS = (*A10_MODELS, "llama-3.1-8b", "vicuna-13b", "codellama-34b")
CLASSES = ("interactive", "batch-1", "batch-2")


def random_scenario(seed: int) -> Scenario:
    """A scenario that depends on the seed alone."""
    rng = np.random.default_rng(seed)
    models = [str(name) for name in rng.choice(A100_MODELS, int(rng.integers(2, 6)), replace=False)]
    large = int(rng.integers(1, 4))
    small_models = tuple(model for model in models if model in A10_MODELS)
    small = int(rng.integers(0, 4)) if small_models else 0
    cluster = [ClusterConfig(gpu="A100-80", count=large, models=tuple(models))]
    if small:
        cluster.append(ClusterConfig(gpu="A10", count=small, models=small_models))
    mix = [
        MixEntry(model=model, slo_class=slo_class, share=float(rng.uniform(0.1, 1.0)))
        for model in models
        for slo_class in CLASSES
        if rng.random() < 0.6
    ] or [MixEntry(model=models[0], slo_class="interactive", share=1.0)]
    rate_rps = float(rng.uniform(3, 13)) * large + float(rng.uniform(0.3, 1.5)) * small
    return Scenario(
        name=f"random-{seed}",
        cluster=tuple(cluster),
        mix=tuple(mix),
        seed=seed,
        workload=WorkloadConfig(
            requests=int(rng.integers(1_500, 4_000)),
            arrivals=str(rng.choice(["poisson", "gamma:2"])),
            rate_rps=round(rate_rps, 2),
        ),
        scheduler=SchedulerConfig(policies=tuple(POLICIES)),
    )


def run(out: Path, quick: bool) -> None:
    """Write random_scenarios.md and .json to ``out``."""
    attained: dict[int, dict[str, float]] = {}
    for seed in SEEDS[:4] if quick else SEEDS:
        runs = replay(random_scenario(seed), processes=2)
        attained[seed] = {one.name: one.summary["slo_attainment"]["overall"] for one in runs}
        print(f"{seed}: " + "  ".join(f"{name} {100 * x:.1f}" for name, x in attained[seed].items()))
    out.mkdir(parents=True, exist_ok=True)
    (out / "random_scenarios.json").write_text(json.dumps(attained, indent=2) + "\n")
    (out / "random_scenarios.md").write_text(table(attained))


def table(attained: dict[int, dict[str, float]]) -> str:
    """The result as Markdown, best baseline against qlm and qlm against the upper bound."""
    names = list(next(iter(attained.values())))
    baselines = [name for name in names if name not in ("qlm", "clairvoyant")]
    behind = {seed: max(row[name] for name in baselines) - row["qlm"] for seed, row in attained.items()}
    lines = [
        "# Random multi-model scenarios",
        "",
        "SLO attainment in percent. Made by `qlm-sim experiment random_scenarios`.",
        "",
        "| seed | cluster | models | rate, req/s | " + " | ".join(names) + " |",
        "|---" * (4 + len(names)) + "|",
    ]
    for seed, row in attained.items():
        scenario = random_scenario(seed)
        cluster = " + ".join(f"{group.count} {group.gpu}" for group in scenario.cluster)
        models = len({entry.model for entry in scenario.mix})
        cells = " | ".join(f"{100 * row[name]:.1f}" for name in names)
        lines.append(f"| {seed} | {cluster} | {models} | {scenario.workload.rate_rps} | {cells} |")
    won = sum(gap <= 0 for gap in behind.values())
    lines += [
        "",
        f"qlm is at or above every baseline in {won} of {len(behind)} scenarios; "
        f"at worst {100 * max(0.0, *behind.values()):.2f} points below the best one.",
    ]
    if "clairvoyant" in names:
        short = np.mean([row["clairvoyant"] - row["qlm"] for row in attained.values()])
        where = "below" if short >= 0 else "above"
        lines.append(f"On average it is {100 * abs(short):.2f} points {where} clairvoyant.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(Path(__file__).parent / "results", quick=False)
