"""The flags that say which requests are offered to a live cluster, and the workload that they make."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from qlm_sim.errors import InputError

if TYPE_CHECKING:
    from live.config import LiveConfig
    from qlm_sim.workload.mix import MixEntry
    from qlm_sim.workload.workload import Workload


def add_workload_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace", nargs="?", default="sharegpt", metavar="TRACE", help="a trace file, or sharegpt (default)"
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the cluster, as for qlm-live serve")
    requests = parser.add_argument_group("requests")
    requests.add_argument("--requests", type=int, metavar="N", help="how many (default: the whole trace)")
    requests.add_argument("--rate", type=float, metavar="R", help="mean arrivals per second")
    requests.add_argument(
        "--arrivals",
        metavar="A",
        help="trace, poisson, gamma:CV or uniform (default: trace, if it has times)",
    )
    requests.add_argument(
        "--speedup", type=float, default=1.0, metavar="X", help="arrivals X times as fast (default: 1)"
    )
    requests.add_argument(
        "--scale-lengths",
        type=float,
        default=1.0,
        metavar="F",
        help="prompts and outputs F times as long, for small machines (default: 1)",
    )
    requests.add_argument(
        "--mix",
        action="append",
        metavar="MODEL,CLASS,SHARE",
        help="share of requests of this model and SLO class; repeatable (default: all alike)",
    )
    requests.add_argument("--seed", type=int, default=0, metavar="S", help="seed of mix, lengths, arrivals")
    requests.add_argument(
        "--warm-up",
        type=float,
        default=0.0,
        metavar="S",
        help="leave the requests of the first S seconds out of the report (default: 0)",
    )
    requests.add_argument("--format", metavar="F", help="the trace's format, where it is not recognised")
    parser.add_argument(
        "--policy", action="append", metavar="NAME", help="run under it; repeatable (default: the config's)"
    )


def make_workload(
    args: argparse.Namespace, config: "LiveConfig", max_model_len: Mapping[str, int]
) -> "tuple[Workload, list[str]]":
    """The workload and notes on what was left out. Raises InputError."""
    import numpy as np

    from qlm_sim.workload.mix import build_workload
    from qlm_sim.workload.readers import read_trace

    for flag, value in (("--speedup", args.speedup), ("--scale-lengths", args.scale_lengths)):
        if not 0 < value < float("inf"):
            raise InputError(f"{flag}: found {value}, expected a number above 0")
    if not 0 <= args.warm_up < float("inf"):
        raise InputError(f"--warm-up: found {args.warm_up}, expected seconds, 0 or more")
    notes: list[str] = []
    trace = read_trace(args.trace, format=args.format, warn=notes.append)
    if args.scale_lengths != 1.0:
        scaled = [
            np.maximum(1, np.rint(tokens * args.scale_lengths)).astype(np.int64)
            for tokens in (trace.prompt_tokens, trace.output_tokens)
        ]
        trace = replace(trace, prompt_tokens=scaled[0], output_tokens=scaled[1], max_tokens=None)
    arrivals = args.arrivals or ("poisson" if trace.arrival_s is None else "trace")
    if arrivals != "trace" and args.rate is None:
        raise InputError(f"--rate: missing, expected arrivals per second for {arrivals} arrivals")
    workload, more = build_workload(
        trace,
        mix=_mix(args, config),
        slo_classes=config.slo,
        arrivals=arrivals,
        rate_rps=args.rate,
        requests=args.requests,
        seed=args.seed,
        max_model_len=max_model_len,
    )
    return replace(workload, arrival_s=workload.arrival_s / args.speedup), notes + more


def _mix(args: argparse.Namespace, config: "LiveConfig") -> "list[MixEntry]":
    from qlm_sim.workload.mix import MixEntry

    models, classes = [each.name for each in config.model], [each.name for each in config.slo]
    if not args.mix:
        return [MixEntry(model, slo, 1.0) for model in models for slo in classes]
    entries = []
    for text in args.mix:
        parts = text.split(",")
        try:
            model, slo, share = parts[0], parts[1], float(parts[2])
        except (IndexError, ValueError):
            raise InputError(
                f"--mix: found {text!r}, expected MODEL,CLASS,SHARE such as m,interactive,2"
            ) from None
        for name, known, what in ((model, models, "model"), (slo, classes, "SLO class")):
            if name not in known:
                raise InputError(f"--mix: {what} {name!r} is not in the config; known: {', '.join(known)}")
        if not 0 < share < float("inf"):
            raise InputError(f"--mix: found share {parts[2]}, expected a number above 0")
        entries.append(MixEntry(model, slo, share))
    return entries
