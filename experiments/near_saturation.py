"""How far simulators agree on waiting as the load nears what an engine can serve, and why they do not.

    qlm-sim experiment near_saturation          # 70, 85, 95 and 105 % of capacity, 5 seeds, some minutes
    qlm-sim experiment near_saturation --quick  # 70 and 105 %, 2 seeds

One Llama-2-7B on one A100-80, so that nobody routes; the same requests for each simulator. Capacity is
the rate at which an engine works off requests that all wait from the start.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy import stats
from simulators import Simulator, dynamo, qlm, source_of_lengths, write_requests, write_step_times

LOADS = (0.70, 0.85, 0.95, 1.05)
REQUESTS = 10_000
WHY = """
Simulators differ near saturation because their step times do: the same rate is another share of another
capacity, and waiting grows without bound as that share nears 1. Where step times are the same, schedulers
that were written apart agree as far as capacity reaches. Past it the mean measures how long the run lasts,
and the few percent between the capacities decide it: Dynamo's two tables hold QLM's step times nearly, for
they price a step by its prompt tokens and its decodes apart, and a prompt's later chunks as if nothing
came before.
"""


def run(out: Path, quick: bool) -> None:
    """Write near_saturation.md and .json to ``out``. Raises Unavailable where Dynamo cannot be installed."""
    loads, seeds = (LOADS[::3], range(2)) if quick else (LOADS, range(5))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_step_times(folder / "step_times.npz")
        ours, alike, foreign = qlm("vllm", 1), dynamo(1, folder / "step_times.npz"), dynamo(1)
        capacities = {each.title: capacity(each, folder) for each in (ours, alike, foreign)}
        ours_rps, foreign_rps = capacities[ours.title], capacities[foreign.title]
        cases = {
            ours.title: (ours, ours_rps),
            alike.title: (alike, ours_rps),
            f"{foreign.title}, the same rates": (foreign, ours_rps),
            f"{foreign.title}, shares of its own capacity": (foreign, foreign_rps),
        }
        ttft_s: dict[str, dict[float, list[float]]] = {title: {} for title in cases}
        for load in loads:
            for seed in seeds:
                for title, (simulator, capacity_rps) in cases.items():
                    trace = folder / f"{load * capacity_rps:.3f}-{seed}.jsonl"
                    if not trace.exists():
                        write_requests(trace, REQUESTS, load * capacity_rps, seed)
                    ttft_s[title].setdefault(load, []).append(simulator.run(trace).ttft_mean_s)
    out.mkdir(parents=True, exist_ok=True)
    document = {"capacity_rps": capacities, "lengths": source_of_lengths(), "ttft_mean_s": ttft_s}
    (out / "near_saturation.json").write_text(json.dumps(document, indent=2) + "\n")
    text = page(capacities, ttft_s, len(seeds))
    (out / "near_saturation.md").write_text(text)
    print(text)


def capacity(simulator: Simulator, folder: Path) -> float:
    """Requests per second while ``REQUESTS`` wait from the start."""
    trace = folder / "backlog.jsonl"
    write_requests(trace, REQUESTS, 1e6, seed=0)
    return simulator.run(trace).throughput_rps


def page(
    capacities: Mapping[str, float], ttft_s: Mapping[str, Mapping[float, list[float]]], seeds: int
) -> str:
    """The result as Markdown."""
    loads = list(next(iter(ttft_s.values())))
    listed = "; ".join(f"{title}: {rps:.2f}" for title, rps in capacities.items())
    lines = [
        "# Waiting near saturation",
        "",
        f"Mean TTFT in seconds of {REQUESTS:,} requests, Llama-2-7B on one A100-80, Poisson arrivals, "
        f"{source_of_lengths()}. Means of {seeds} seeds ± 95 % confidence. Capacities in requests/s, with "
        f"{REQUESTS:,} requests waiting from the start: {listed}. Loads are shares of the first, but for the "
        "last row. Made by `qlm-sim experiment near_saturation`.",
        "",
        "| simulator | " + " | ".join(f"{load:.0%} of capacity" for load in loads) + " |",
        "|---" + "|---:" * len(loads) + "|",
    ]
    for title, by_load in ttft_s.items():
        lines.append(
            f"| {title} | " + " | ".join(mean_and_confidence(by_load[load]) for load in loads) + " |"
        )
    return "\n".join(lines) + "\n" + WHY


def mean_and_confidence(values: list[float]) -> str:
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.3g} ± {half:.2g}"


if __name__ == "__main__":
    run(Path(__file__).parent / "results", quick=False)
