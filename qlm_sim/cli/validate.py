"""``qlm-sim validate``: a real engine's log, replayed through the simulated engine and compared."""

import argparse
import json
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlm_sim.cli.parser import Commands
from qlm_sim.cli.progress import say

if TYPE_CHECKING:
    from rich.table import Table

    from qlm_sim.models.engines import EngineVersion
    from qlm_sim.validation.request_log import RequestLog
    from qlm_sim.validation.simulated_log import SimulatedLog

_EXAMPLES = """examples:
  qlm-sim validate requests.csv --gpu H100 --model llama-2-7b
  qlm-sim validate requests.csv --gpu H100 --model llama-2-7b --repeat 10    # what chance does
  qlm-sim validate bench.json --gpu A100-80 --model llama-3.1-70b --tp 4 --engine vllm-0.8
  qlm-sim validate requests.jsonl --gpu my-gpu.toml --model path/to/config.json --engine-log vllm.log
"""

_TITLES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "E2E"}


def add_to(commands: Commands) -> None:
    from qlm_sim.cli.engine_flags import add_engine_flags

    parser = commands.add_parser(
        "validate",
        help="hold the simulated engine against a real engine's log",
        description="Replay a real request log through the simulated engine, and compare its times with the "
        "measured ones. Columns (CSV, JSON Lines, JSON, Parquet): arrival, prompt and output tokens, and any "
        "of ttft, tpot, e2e, queue in seconds (or ..._ms); or a result of vllm bench serve --save-detailed.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("log", metavar="LOG", help="the request log")
    add_engine_flags(parser)
    parser.add_argument(
        "--count", type=int, default=1, metavar="N", help="engines behind a least-loaded router (default: 1)"
    )
    parser.add_argument(
        "--repeat",
        type=int,
        default=1,
        metavar="N",
        help="simulate this many seeds too, each of which deals the lengths out anew among the arrivals, "
        "and give mean and 95%% confidence: what of a difference may be chance (default: 1, the log alone)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", help="result directory (default: runs/validate-<log>)")
    output.add_argument("--json", action="store_true", help="print summary.json in place of the table")
    output.add_argument("--quiet", action="store_true", help="no notes on stderr")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from qlm_sim.cli.engine_flags import real_engine
    from qlm_sim.errors import InputError
    from qlm_sim.metrics.repeats import combine
    from qlm_sim.report.scatter import scatter_png
    from qlm_sim.report.write import all_or_nothing, check_output, plain
    from qlm_sim.validation.comparison import compare, statistics
    from qlm_sim.validation.request_log import read_request_log
    from qlm_sim.validation.simulated_log import dealt_anew, simulate_log

    if args.count < 1:
        raise InputError(f"--count: found {args.count}, expected a whole number at least 1")
    if args.repeat < 1:
        raise InputError(f"--repeat: found {args.repeat}, expected a whole number at least 1")
    engine = real_engine(args)
    out = Path(args.out or Path("runs") / f"validate-{_stem(args.log)}")
    check_output(out)
    log = read_request_log(args.log)
    placed = engine.placed()
    serve = partial(
        simulate_log,
        placed=placed,
        config=engine.config,
        request_s=engine.version.request_s.value,
        instances=args.count,
    )
    simulated = serve(log)
    compared = {
        name: compare(log.measured[name], times)
        for name, times in simulated.times.items()
        if name in log.measured
    }
    metrics = {name: each for name, each in compared.items() if each is not None}
    summary = engine.described() | {
        "log": Path(args.log).name,
        "requests": len(log),
        "unfinished": simulated.unfinished,
        "count": args.count,
        "kv_capacity_tokens": placed.kv_capacity_tokens,
        "metrics": metrics,
        "real_queue_s": statistics(log.measured["queue_s"]) if "queue_s" in log.measured else None,
        "offered_load": simulated.offered_load,
        "saturated": simulated.saturated,
        "saturation": simulated.saturation,
        "preemptions": simulated.preemptions,
        "notes": list(log.notes),
    }
    if args.repeat > 1:
        dealt = [dealt_anew(log, seed) for seed in range(args.repeat)]
        summary["repeated"] = combine([_figures(each, serve(each), metrics) for each in dealt])
    for note in log.notes:
        say(f"note: {note}", args.quiet)
    text = json.dumps(plain(summary), indent=2, sort_keys=True, allow_nan=False) + "\n"
    title = f"{engine.model.name} on {engine.tp} x {engine.gpu.name}, {engine.version.name}: {summary['log']}"
    with all_or_nothing(out) as folder:
        (folder / "summary.json").write_text(text, encoding="utf-8")
        (folder / "scatter.png").write_bytes(scatter_png(log.measured, simulated.times, title))
        _requests(log, simulated.times).to_parquet(folder / "requests.parquet", index=False)
    if args.json:
        sys.stdout.write(text)
        return 0
    console = Console(file=sys.stdout)
    console.print(f"{title}\n{len(log):,} requests, KV cache of {placed.kv_capacity_tokens:,} tokens")
    console.print(_table(metrics, summary["real_queue_s"], summary.get("repeated")))
    for warning in _warnings(summary, engine.version):
        console.print(f"warning: {warning}")
    print(f"scatter plot: {out / 'scatter.png'}")
    return 0


def _stem(path: str) -> str:
    return Path(path.removesuffix(".gz")).stem or "log"


def _requests(log: Any, times: Any) -> Any:
    """Every request with its measured and simulated times."""
    import pandas as pd

    columns = {"arrival_s": log.arrival_s, "prompt_tokens": log.prompt_tokens}
    columns |= {"output_tokens": log.output_tokens}
    columns |= {f"real_{name}": values for name, values in log.measured.items()}
    return pd.DataFrame(columns | {f"simulated_{name}": values for name, values in times.items()})


def _figures(log: "RequestLog", simulated: "SimulatedLog", metrics: Iterable[str]) -> dict[str, Any]:
    """What is told of one seed: statistics of each metric, over the requests that have a measured one too,
    and whether it was saturated."""
    from qlm_sim.validation.comparison import compare

    told: dict[str, Any] = {"saturated": simulated.saturated, "saturation": simulated.saturation}
    for name in metrics:
        both = compare(log.measured[name], simulated.times[name])
        if both is not None:
            told[name] = both["simulated"]
    return told


def _table(
    metrics: dict[str, Any], real_queue_s: dict[str, float] | None, repeated: dict[str, Any] | None
) -> "Table":
    from qlm_sim.cli.tables import plain_table
    from qlm_sim.report.comparison import NOTHING, seconds

    over_seeds = [f"over {repeated['repeats']} seeds"] if repeated else []
    table = plain_table("metric", "", "real", "simulated", *over_seeds, "error", "MAPE of requests")
    for name, each in metrics.items():
        for place, statistic in enumerate(each["real"]):
            error = each["error"][statistic]
            first = place == 0
            chance = []
            if repeated:
                mean, half_width = repeated[name][statistic], repeated["ci95"][name][statistic]
                chance = [f"{seconds(mean)} ±{seconds(half_width)}"]
            table.add_row(
                _TITLES[name] if first else "",
                statistic,
                seconds(each["real"][statistic]),
                seconds(each["simulated"][statistic]),
                *chance,
                NOTHING if error is None else f"{error:+.1%}",
                f"{each['mape']:.1%}" if first and each["mape"] is not None else "",
                end_section=place == len(each["real"]) - 1,
            )
    for place, (statistic, value) in enumerate((real_queue_s or {}).items()):
        not_simulated = [NOTHING] * (2 + len(over_seeds))
        table.add_row("" if place else "queue", statistic, seconds(value), *not_simulated, "")
    return table


def _warnings(summary: dict[str, Any], engine: "EngineVersion") -> list[str]:
    found = [summary["saturation"]] if summary["saturated"] else []
    if summary["unfinished"]:
        found.append(f"{summary['unfinished']:,} requests did not finish in the simulation and are left out")
    if engine.caveat:
        found.append(engine.caveat)
    if summary["kernels"]["kind"] == "estimate":
        found.append(f"the GPU's figures are estimates: {summary['kernels']['source']}")
    return found
