"""How fast and how large simulators are, side by side in one run: QLM, Dynamo's replay, Vidur.

    qlm-sim experiment compare_simulators          # 2,000 and 20,000 requests, 3 rounds, some minutes
    qlm-sim experiment compare_simulators --quick  # 2,000 requests, 1 round

Dynamo (Rust) and Vidur (Python) come from PyPI into environments of their own. All read the same file of
requests, each in a process of its own, one after the other, round by round; figures are medians.
"""

import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from statistics import median

from simulators import (
    Outcome,
    Simulator,
    Unavailable,
    dynamo,
    qlm,
    source_of_lengths,
    vidur,
    write_requests,
    write_step_times,
)

RATE_RPS = 24.0
REPLICAS = 4
SMALL, LARGE = 2_000, 20_000
REMARKS = """
* In the loop: requests per wall-clock second of the simulation alone. QLM's counts building the requests
  and the summary; Dynamo's is the time it reports itself, without reading the trace; Vidur's leaves out its
  imports and tables, and was measured once.
* Process: the whole of it, from the interpreter's start to the printed summary; CPU seconds of the same.
* Dynamo's own step times are a polynomial that knows neither model nor GPU: what it predicts with them is not
  comparable. Vidur's own are trained on tables that it downloads from Hugging Face; the package has none, so
  it was not trained. With QLM's step times all three serve the same load on like engines, and their
  predictions are comparable. What differs then is who gets a request: Dynamo and Vidur deal requests out in
  turn as they arrive; QLM's `vllm` gives each to the engine with the least to do, and `qlm` keeps back
  what an engine cannot run yet. 24 requests/s are past what four such engines serve, so over 20,000
  requests TTFT measures the length of the run (see near_saturation.md for loads below that).
""".lstrip()


def run(out: Path, quick: bool) -> None:
    """Write compare_simulators.md and .json to ``out``."""
    rounds = 1 if quick else 3
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        step_times = Path(folder) / "step_times.npz"
        write_step_times(step_times)
        simulators = available(
            failures,
            lambda: qlm("vllm", REPLICAS),
            lambda: qlm("qlm", REPLICAS),
            lambda: dynamo(REPLICAS),
            lambda: dynamo(REPLICAS, step_times),
            lambda: vidur(REPLICAS, step_times),
        )
        medians = {}
        for size in (SMALL,) if quick else (SMALL, LARGE):
            trace = Path(folder) / f"{size}.jsonl"
            write_requests(trace, size, RATE_RPS, seed=0)
            medians[size] = side_by_side(simulators, trace, rounds, failures)
    out.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": (where := machine()),
        "lengths": source_of_lengths(),
        "rounds": rounds,
        "median": {size: {name: asdict(row) for name, row in rows.items()} for size, rows in medians.items()},
        "failures": failures,
    }
    (out / "compare_simulators.json").write_text(json.dumps(document, indent=2) + "\n")
    text = page(medians, rounds, failures, where)
    (out / "compare_simulators.md").write_text(text)
    print(text)


def available(failures: list[str], *makers: Callable[[], Simulator]) -> list[Simulator]:
    """The simulators that could be installed."""
    found = []
    for make in makers:
        try:
            found.append(make())
        except Unavailable as error:
            failures.append(str(error))
    return found


def side_by_side(
    simulators: list[Simulator], trace: Path, rounds: int, failures: list[str]
) -> dict[str, Outcome]:
    """Medians over the rounds. One that fails is told of and left out from then on."""
    outcomes: dict[str, list[Outcome]] = {}
    for number in range(rounds):
        for simulator in [each for each in simulators if number < each.most_rounds]:
            try:
                outcomes.setdefault(simulator.title, []).append(simulator.run(trace))
            except Unavailable as error:
                failures.append(str(error))
                simulators.remove(simulator)
    return {title: middle(runs) for title, runs in outcomes.items() if runs}


def middle(runs: list[Outcome]) -> Outcome:
    """The median of each figure; predictions are the same in every round."""
    return Outcome(
        **{field.name: median(getattr(each, field.name) for each in runs) for field in fields(Outcome)}
    )


def machine() -> str:
    """Where and beside how much other work; to be called when the runs are done."""
    return (
        f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}, load average "
        f"{os.getloadavg()[1]:.0f}"
    )


def page(medians: Mapping[int, Mapping[str, Outcome]], rounds: int, failures: list[str], where: str) -> str:
    """The result as Markdown."""
    lines = [
        "# Simulators side by side",
        "",
        f"Llama-2-7B on {REPLICAS} A100-80, Poisson arrivals at {RATE_RPS:g} requests/s, "
        f"{source_of_lengths()}, prompt and output at most 4,096 together. "
        f"Medians of {rounds} alternating rounds on {where}. "
        "Made by `qlm-sim experiment compare_simulators`.",
    ]
    for size, rows in medians.items():
        base = next(iter(rows.values()))
        lines += [
            "",
            f"## {size:,} requests",
            "",
            "| simulator | in the loop, req/s | ratio | process, s | ratio | CPU, s | ratio | peak MiB |"
            " TTFT mean, s | p99 | E2E mean, s | p99 |",
            "|---" + "|---:" * 11 + "|",
        ]
        for title, row in rows.items():
            lines.append(
                f"| {title} | {row.finished / row.loop_s:,.0f} | {base.loop_s / row.loop_s:.2f} | "
                f"{row.process_s:.2f} | {row.process_s / base.process_s:.2f} | {row.cpu_s:.2f} | "
                f"{row.cpu_s / base.cpu_s:.2f} | "
                f"{row.peak_mib:.0f} | {row.ttft_mean_s:.3g} | {row.ttft_p99_s:.3g} | {row.e2e_mean_s:.3g} | "
                f"{row.e2e_p99_s:.3g} |"
            )
    lines += [
        "",
        "Ratios are to the first row: of speed in the loop, and of seconds. "
        "Other work on the machine (see the",
        "load average) stretches wall-clock seconds by as much; CPU seconds it changes little.",
        "",
        REMARKS,
    ]
    lines += [f"* Did not run: {failure}" for failure in failures]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    run(Path(__file__).parent / "results", quick=False)
