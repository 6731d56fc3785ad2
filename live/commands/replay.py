"""``qlm-live replay`` and ``qlm-live compare``: a trace on the live cluster, alone or beside a simulation."""

import argparse
import asyncio
import json
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from live.commands.workload_flags import add_workload_flags, make_workload
from qlm_sim.cli.parser import Commands
from qlm_sim.cli.progress import progress, say
from qlm_sim.errors import InputError

if TYPE_CHECKING:
    from live.config import LiveConfig
    from live.measure import LiveRun, SimulatedRun
    from qlm_sim.metrics.run import PolicyRun
    from qlm_sim.workload.workload import Workload


def add_to(commands: Commands) -> None:
    replay = commands.add_parser(
        "replay",
        help="offer a trace to the live cluster, in real time or faster",
        description="Start or attach to the engines of a config, offer them the requests of a trace, and "
        "write the report that qlm-sim replay writes of a simulated run.",
        epilog="examples:\n  qlm-live replay sharegpt.json --config live.toml --rate 2 --requests 200\n"
        "  qlm-live replay --config live.toml --rate 4 --scale-lengths 0.2 --policy vllm --policy qlm\n"
        "  qlm-live replay azure.csv --config live.toml --speedup 3 --out runs/azure\n",
    )
    compare = commands.add_parser(
        "compare",
        help="a trace on the live cluster and in simulation, side by side",
        description="As qlm-live replay, and then the same requests at the same times on simulated instances "
        "of the same profiles: attainment, latencies, swaps and evictions of both, and how well the waits of "
        "the live run were forecast. After a warm-up, simulated engines are as fast as the live ones were in "
        "it; the errors by the profiles alone are told too.",
        epilog="examples:\n  qlm-live compare --config live.toml --rate 2 --requests 200 --json\n",
    )
    for parser, run in ((replay, run_replay), (compare, run_compare)):
        add_workload_flags(parser)
        output = parser.add_argument_group("output")
        output.add_argument("--out", metavar="DIR", help="result directory (default: runs/live)")
        output.add_argument("--json", action="store_true", help="print JSON in place of tables")
        output.add_argument("--quiet", action="store_true", help="no progress and no notes on stderr")
        output.add_argument(
            "--record",
            metavar="FILE",
            help="write the event log, for qlm-sim replay FILE (one policy; not with several)",
        )
        parser.set_defaults(run=run)


def run_replay(args: argparse.Namespace) -> int:
    from rich.console import Console

    from qlm_sim.report.table import print_comparison
    from qlm_sim.report.write import summary_json

    live, table = _run_live(args)
    runs = [each.run for each in live]
    _write(args, runs, table)
    if args.json:
        sys.stdout.write(summary_json(runs, table))
    else:
        print_comparison(runs, Console(file=sys.stdout))
        for each in live:
            _tell_failures(each)
        print(f"report: {_out(args) / 'report.html'}")
    return 0


def run_compare(args: argparse.Namespace) -> int:
    from live.side_by_side import forecast_accuracy
    from qlm_sim.report.write import plain

    live, table = _run_live(args)
    simulated = _simulated(args, live)
    pairs = [
        (
            replace(each.run, name=f"{each.run.name}, live"),
            replace(as_fast.run, name=f"{each.run.name}, simulated"),
        )
        for each, (_, as_fast) in zip(live, simulated, strict=True)
    ]
    _write(args, [run for pair in pairs for run in pair], table)
    document: dict[str, Any] = {}
    for each, (profiled, as_fast) in zip(live, simulated, strict=True):
        document[each.run.name] = {
            "figures": _figures(each.run, as_fast.run),
            "figures_by_profile": _figures(each.run, profiled.run),
            "times_as_slow": as_fast.perturb,
            "forecast": forecast_accuracy(each.run.requests, each.offered.told),
            "failed": dict(each.offered.failed),
            "cpu_s": each.cpu_s,
        }
    document = plain(document)
    if args.json:
        print(json.dumps(document, indent=2, sort_keys=True))
    else:
        for name, figures in document.items():
            _print(name, figures, args.warm_up > 0)
        for each in live:
            _tell_failures(each)
        print(f"report: {_out(args) / 'report.html'}")
    return 0


def _out(args: argparse.Namespace) -> Path:
    return Path(args.out or "runs/live")


def _run_live(args: argparse.Namespace) -> "tuple[list[LiveRun], dict[str, Any]]":
    """Every policy's run, one after the other, and what would repeat them."""
    from live.config import load_config
    from live.measure import run_live, with_policy
    from qlm_sim.policies import POLICIES
    from qlm_sim.report.write import check_output

    config = load_config(args.config)
    policies = args.policy or [config.scheduler.policy]
    for name in policies:
        if name not in POLICIES:
            raise InputError(f"--policy: found {name!r}; known: {', '.join(POLICIES)}")
    if args.record is not None and len(policies) > 1:
        raise InputError("--record: one event log holds one policy's run; give one --policy")
    check_output(_out(args))
    workload, vocabulary, notes = _workload(args, config)
    for note in notes:
        say(f"note: {note}", args.quiet)
    runs = []
    for name in policies:
        with progress(args.quiet) as update:
            run = run_live(
                with_policy(config, name),
                workload,
                vocabulary,
                seed=args.seed,
                warm_up_s=args.warm_up,
                record=Path(args.record) if args.record else None,
                progress=lambda done, total, name=name: update(name, done, total),  # type: ignore[misc]
            )
            runs.append(asyncio.run(run))
    flags = {
        name: getattr(args, name)
        for name in (
            "trace",
            "requests",
            "rate",
            "arrivals",
            "speedup",
            "scale_lengths",
            "mix",
            "seed",
            "warm_up",
        )
        if getattr(args, name) is not None
    }
    return runs, {"live": {"config": Path(args.config).name, "policies": policies} | flags}


def _workload(args: argparse.Namespace, config: "LiveConfig") -> "tuple[Workload, dict[str, int], list[str]]":
    from live.build import make_service
    from qlm_sim.models.specs import load_model

    models = make_service(config).models
    workload, notes = make_workload(args, config, {name: info.max_model_len for name, info in models.items()})
    vocabulary = {
        each.name: load_model(each.config or each.path or each.name).vocab_size for each in config.model
    }
    return workload, vocabulary, notes


def _simulated(args: argparse.Namespace, live: "list[LiveRun]") -> "list[tuple[SimulatedRun, SimulatedRun]]":
    from live.config import load_config
    from live.measure import run_as_fast, with_policy

    config = load_config(args.config)
    workload, _, _ = _workload(args, config)
    return [run_as_fast(with_policy(config, each.run.name), workload, each, args.warm_up) for each in live]


def _figures(live: "PolicyRun", simulated: "PolicyRun") -> dict[str, Any]:
    """Both, and the error of the simulated one, by name."""
    from live.side_by_side import rows

    return {row.name: asdict(row) | {"error": row.error} for row in rows(live.summary, simulated.summary)}


def _write(args: argparse.Namespace, runs: "list[PolicyRun]", table: dict[str, Any]) -> None:
    from qlm_sim.config.toml import toml_text
    from qlm_sim.report.write import write_results

    command = "qlm-live " + shlex.join(sys.argv[1:])
    write_results(_out(args), runs, table, title="QLM live", command=command, scenario_toml=toml_text(table))


def _print(policy: str, document: dict[str, Any], warmed_up: bool) -> None:
    from rich.console import Console

    from qlm_sim.cli.tables import plain_table
    from qlm_sim.report.comparison import number, percent

    console = Console(file=sys.stdout)
    table = plain_table(policy, "live", "simulated", "error", *(["by profiles alone"] if warmed_up else []))
    for name, row in document["figures"].items():
        share = name.startswith("slo_attainment")
        cells = [
            "" if row[k] is None else percent(row[k]) if share else number(row[k])
            for k in ("live", "simulated")
        ]
        found = [row, document["figures_by_profile"][name]][: 1 + warmed_up]
        errors = ["" if each["error"] is None else f"{100 * each['error']:+.1f}%" for each in found]
        table.add_row(name, *cells, *errors)
    console.print(table)
    if warmed_up:
        slow = ", ".join(f"{name} {factor:.2f}" for name, factor in document["times_as_slow"].items())
        print(f"simulated with engines as slow as in the warm-up, in times of their profiles: {slow}")
    waits = plain_table("waits as told at arrival", "requests", "mean s", "R²", "bias", "within 90% bound")
    for name, each in document["forecast"].items():
        if each["requests"]:
            shown = [f"{each['requests']:,}", number(each["mean_wait_s"])]
            shown.append("" if each["r2"] is None else f"{each['r2']:.3f}")
            shown += ["" if each[k] is None else percent(each[k]) for k in ("bias", "within_90_bound")]
            waits.add_row(name, *shown)
    console.print(waits)


def _tell_failures(each: "LiveRun") -> None:
    failed = each.offered.failed
    if failed:
        name, reason = next(iter(failed.items()))
        print(f"{each.run.name}: {len(failed)} requests failed, the first of them {name}: {reason}")
