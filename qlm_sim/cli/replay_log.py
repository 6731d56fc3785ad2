"""``qlm-sim replay EVENTS``: an event log through a fresh core, and the report of its run."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlm_sim.cli.flags import overrides
from qlm_sim.cli.interrupts import deferred
from qlm_sim.cli.progress import progress, say
from qlm_sim.errors import InputError

if TYPE_CHECKING:
    from qlm_sim.event_log import Verdict


def run(args: argparse.Namespace) -> int:
    """Exit status 1 where the core decides otherwise than the log says."""
    with deferred():
        from rich.console import Console

        from qlm_sim.config import DEFAULT_SCENARIO, load_scenario
        from qlm_sim.config.toml import toml_text
        from qlm_sim.event_log import replay_event_log
        from qlm_sim.metrics.recorder import RunRecorder
        from qlm_sim.metrics.run import conclude
        from qlm_sim.plan_log import PlanLog
        from qlm_sim.policies import POLICIES
        from qlm_sim.report.table import print_comparison
        from qlm_sim.report.why import explained
        from qlm_sim.report.write import check_output, plain, summary_json, write_results

    changes = overrides(args, load_scenario(DEFAULT_SCENARIO)).values()
    flags = [flag for flag, _ in changes if flag.startswith("--")]
    flags += ["--scenario"] if args.scenario else []
    flags += ["--repeat"] if args.repeat != 1 else []
    if flags:
        raise InputError(
            f"{flags[0]}: does not apply to {args.trace}, an event log, which has all that it was run with"
        )
    out = Path(args.out or Path("runs") / Path(args.trace).name.split(".")[0])
    check_output(out)
    recorder = RunRecorder()
    log = PlanLog(recorder)
    with progress(args.quiet) as update:
        verdict = replay_event_log(
            args.trace, log, lambda done, size: update("replaying the event log", done, size)
        )
    header = verdict.header
    if verdict.cut is not None:
        say(f"note: {args.trace}: {verdict.cut}; the writer was stopped there", args.quiet)
    run = conclude(
        header.policy,
        recorder,
        header.slo_classes,
        verdict.ended_at,
        log.plans,
        upper_bound=POLICIES[header.policy].told,
    )
    table: dict[str, Any] = {
        "event_log": {
            "policy": header.policy,
            "instances": [spec.id for spec in header.instances],
            "qlm_version": header.qlm_version,
        }
    }
    with deferred():
        write_results(
            out,
            [run],
            table,
            title=f"QLM replay: {Path(args.trace).name}",
            command=f"qlm-sim replay {Path(args.trace).name}",
            scenario_toml=toml_text(table),
            notes=[_said(verdict)],
            report=not args.no_report,
        )
    if args.explain:
        for line in explained([run]):
            print(line, file=sys.stderr if args.json else sys.stdout)
    if args.json:
        document = json.loads(summary_json([run], table))
        document["decisions"] = plain(asdict(verdict) | {"header": None})
        del document["decisions"]["header"]
        print(json.dumps(document, indent=2, sort_keys=True))
    else:
        print_comparison([run], Console(file=sys.stdout))
        print(_said(verdict))
        print(f"results: {out}" if args.no_report else f"report: {out / 'report.html'}")
    return 0 if verdict.difference is None else 1


def _said(verdict: "Verdict") -> str:
    what = f"{verdict.settles:,} settles, {verdict.events:,} events, {verdict.orders:,} orders"
    difference = verdict.difference
    if difference is None:
        return f"{what}: every decision came out the same."
    return (
        f"{what} came out the same; then, at {difference.at_s:.6g} s (line {difference.line}), the log has "
        f"{difference.logged}, and a fresh core decides {difference.decided}."
    )
