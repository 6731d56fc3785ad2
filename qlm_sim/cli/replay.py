"""``qlm-sim replay``: a scenario's requests under each policy, compared and written down."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlm_sim.cli import replay_log
from qlm_sim.cli.flags import add_scenario_flags, overrides
from qlm_sim.cli.interrupts import deferred
from qlm_sim.cli.parser import Commands
from qlm_sim.cli.progress import Update, progress, say
from qlm_sim.errors import InputError

if TYPE_CHECKING:
    from qlm_sim.config import Scenario
    from qlm_sim.workload.workload import Trace

_EXAMPLES = """examples:
  qlm-sim replay                                       the default scenario, every policy
  qlm-sim replay --scenario paper-wc --policy qlm      a shipped scenario, one policy
  qlm-sim replay sharegpt.json --requests 500 --rate 6 your own trace, arriving at 6 requests/s
  qlm-sim replay azure.csv --out runs/azure            a trace that has times keeps them
  qlm-sim replay --gpu A10 --count 8 --model mistral-7b --max-num-seqs 128
  qlm-sim replay --policy qlm --without swapping       what an operation is worth
  qlm-sim replay --scenario runs/azure/summary.json    an earlier run again
  qlm-sim replay events.jsonl.gz                       does a fresh core decide as the log of a run says?
"""


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "replay",
        help="run a trace on a simulated cluster under each policy",
        description="Run the same requests on a simulated cluster under each policy. The comparison goes to "
        "stdout; summary.json, requests.parquet, figures and report.html to --out.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "trace",
        nargs="?",
        metavar="TRACE",
        help="a trace file, taken whole and at its own times if it has any; a built-in trace: sharegpt "
        "(default: the scenario's); or an event log, whose decisions are then made anew and compared",
    )
    parser.add_argument(
        "--scenario", metavar="NAME|FILE", help="see qlm-sim scenario list (default: multi-model)"
    )
    add_scenario_flags(parser)
    parser.add_argument(
        "--repeat",
        type=int,
        default=1,
        metavar="N",
        help="run with this many seeds, and give every figure's mean and 95%% confidence (default: 1)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", help="result directory (default: runs/<scenario name>)")
    output.add_argument(
        "--no-report", action="store_true", help="no figures and no report.html: short runs end much sooner"
    )
    output.add_argument("--json", action="store_true", help="print summary.json in place of the table")
    output.add_argument(
        "--explain",
        action="store_true",
        help="say of each global plan which groups it moved, what it expected, and what leaving them would "
        "have cost (plans.jsonl and the report have it too)",
    )
    output.add_argument("--quiet", action="store_true", help="no progress and no notes on stderr")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with deferred():
        from rich.console import Console

        from qlm_sim.config import table_of
        from qlm_sim.config.toml import toml_text
        from qlm_sim.event_log import is_event_log
        from qlm_sim.replay import engine_versions, policies_of, replay_repeatedly
        from qlm_sim.report.table import print_comparison
        from qlm_sim.report.why import explained
        from qlm_sim.report.write import check_output, summary_json, write_results

    if args.trace is not None and is_event_log(args.trace):
        return replay_log.run(args)
    if args.repeat < 1:
        raise InputError(f"--repeat: found {args.repeat}, expected a whole number at least 1")
    scenario = resolve(args)
    out = Path(args.out or Path("runs") / scenario.name)
    check_output(out)
    notes: list[str] = []
    with progress(args.quiet) as update:
        trace, scenario = read(args, scenario, notes, update)
        runs = replay_repeatedly(
            scenario,
            args.repeat,
            trace=trace,
            warn=notes.append,
            progress=update,
            processes=min(_cpus(), len(policies_of(scenario))),
        )
    for note in notes:
        say(f"note: {note}", args.quiet)
    table = table_of(scenario)
    with deferred():
        write_results(
            out,
            runs,
            table,
            title=f"QLM replay: {scenario.name}",
            command="qlm-sim replay --scenario summary.json"
            + (f" --repeat {args.repeat}" if args.repeat > 1 else ""),
            scenario_toml=toml_text(table),
            notes=notes,
            report=not args.no_report,
        )
    if args.explain:
        for line in explained(runs):
            print(line, file=sys.stderr if args.json else sys.stdout)
    if args.json:
        sys.stdout.write(summary_json(runs, table))
    else:
        print_comparison(runs, Console(file=sys.stdout))
        print(f"engine: {', '.join(each.name for each in engine_versions(scenario))}")
        print(f"results: {out}" if args.no_report else f"report: {out / 'report.html'}")
    return 0


def resolve(args: argparse.Namespace) -> "Scenario":
    """The scenario, and what flags change in it."""
    from qlm_sim.config import DEFAULT_SCENARIO, load_scenario

    source = args.scenario or DEFAULT_SCENARIO
    changes = overrides(args, load_scenario(source))
    return load_scenario(
        source,
        {key: value for key, (_, value) in changes.items()},
        {key: flag for key, (flag, _) in changes.items()},
    )


def read(
    args: argparse.Namespace, scenario: "Scenario", notes: list[str], update: Update
) -> "tuple[Trace, Scenario]":
    """The trace, and the scenario with the times of a trace that was given on the command line."""
    from qlm_sim.replay import scenario_trace

    trace = scenario_trace(scenario, notes.append, lambda done, size: update("reading the trace", done, size))
    if args.trace is not None and args.arrivals is None and trace.arrival_s is not None:
        own_times = replace(scenario.workload, arrivals="trace", rate_rps=args.rate)
        scenario = replace(scenario, workload=own_times)
    return trace, scenario


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
