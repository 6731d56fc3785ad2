"""``qlm-sim profile fit`` and ``profile measure``: a GPU profile from a user's own measurements."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qlm_sim.cli.engine_flags import add_engine_flags, real_engine
from qlm_sim.cli.parser import Commands
from qlm_sim.cli.progress import progress, say
from qlm_sim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlm_sim.calibration.fit import FitResult, Target
    from qlm_sim.calibration.observations import Observation

_MEANINGS = {
    "compute": "large matrix products, prefill attention",
    "memory": "weights, KV cache, small kernels",
    "iteration": "launches, per iteration",
    "sequence": "per sequence of an iteration",
    "request": "server, per request; not in the profile",
}


def add_to(actions: Commands) -> None:
    fit = actions.add_parser(
        "fit",
        help="a profile from your own benchmark results or request logs",
        description="Scale a shipped profile to your own measurements: request logs (see qlm-sim validate), "
        "results of vllm bench serve --save-detailed, latency or throughput.",
        epilog="examples:\n  qlm-sim profile fit requests.csv --gpu A100-80 --model llama-3.1-8b\n"
        "  qlm-sim profile fit latency.json --input-len 1024 --output-len 128 --batch-size 8 \\\n"
        "      --gpu L40S --model mistral-7b --out my-l40s.toml",
    )
    fit.add_argument("files", nargs="+", metavar="FILE", help="a request log or a benchmark's JSON")
    add_engine_flags(fit, gpu_required=False)
    shape = fit.add_argument_group("what a latency or throughput result does not say")
    shape.add_argument("--input-len", type=int, metavar="N", help="prompt tokens of each request")
    shape.add_argument("--output-len", type=int, metavar="N", help="output tokens of each request")
    shape.add_argument("--batch-size", type=int, metavar="N", help="requests of a latency result")
    _add_output(fit)
    fit.set_defaults(run=run_fit)

    measure = actions.add_parser(
        "measure",
        help="a profile from a running vLLM server",
        description="Measure a running, otherwise idle vLLM server over HTTP (some minutes), and scale a "
        "shipped profile to it.",
        epilog="examples:\n  qlm-sim profile measure --url http://127.0.0.1:8000 --model llama-3.1-8b\n"
        "  qlm-sim profile measure --url http://gpu1:8000 --model path/to/config.json --gpu H100",
    )
    measure.add_argument("--url", required=True, metavar="URL", help="the server, as http://host:port")
    measure.add_argument("--served-model-name", metavar="NAME", help="default: the first that it serves")
    add_engine_flags(measure, gpu_required=False)
    measure.add_argument("--log", metavar="FILE", help="keep the measured requests (CSV)")
    measure.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the prompts (default: 0)")
    _add_output(measure)
    measure.set_defaults(run=run_measure)


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FILE", help="profile to write (default: <gpu>-fitted.toml)")
    output.add_argument("--quiet", action="store_true", help="no progress and no notes on stderr")


def run_fit(args: argparse.Namespace) -> int:
    from qlm_sim.calibration.observations import BatchShape, read_observation

    shape = BatchShape(args.input_len, args.output_len, args.batch_size)
    observations = [read_observation(path, shape) for path in args.files]
    for each in observations:
        for note in each.log.notes:
            say(f"note: {note}", args.quiet)
    return _fit_and_write(args, observations, ", ".join(Path(path).name for path in args.files))


def run_measure(args: argparse.Namespace) -> int:
    import pandas as pd

    from qlm_sim.calibration.observations import Observation
    from qlm_sim.calibration.server import Server, log_rows, sweep
    from qlm_sim.models.engines import load_engine
    from qlm_sim.models.specs import load_model

    _check_output(args)
    server, model = Server(args.url), load_model(args.model)
    facts = server.facts(args.served_model_name)
    if args.engine is None and facts.version is not None:
        args.engine = "vllm-" + ".".join(facts.version.split("+")[0].split(".")[:2])
        load_engine(args.engine)
    for flag in ("num_gpu_blocks", "block_size", "max_model_len"):
        if getattr(args, flag) is None and not (flag == "num_gpu_blocks" and args.engine_log is not None):
            setattr(args, flag, getattr(facts, flag))
    _targets(args)  # so that what is wrong with the flags is told before the server is measured
    with progress(args.quiet) as update:
        log = sweep(
            server,
            facts,
            vocabulary=model.vocab_size,
            seed=args.seed,
            progress=lambda done, total: update("measuring the server", done, total),
        )
    if args.log is not None:
        try:
            pd.DataFrame(log_rows(log)).to_csv(args.log, index=False)
        except OSError as error:
            raise InputError(f"{args.log}: cannot be written: {error.strerror or error}") from None
    return _fit_and_write(args, [Observation(log)], f"{facts.served_model} at {args.url}")


def _fit_and_write(args: argparse.Namespace, observations: "Sequence[Observation]", what: str) -> int:
    from rich.console import Console

    from qlm_sim.calibration.factors import with_factors
    from qlm_sim.calibration.fit import fit_factors
    from qlm_sim.calibration.profile_file import profile_toml

    _check_output(args)
    target = _target(args, observations)
    out = Path(args.out or f"{target.gpu.name.lower()}-fitted.toml")
    say(f"fitting {target.gpu.name} to {what}", args.quiet)
    result = fit_factors(target, observations)
    source = f"{target.gpu.name} scaled to {what} under {target.version.name} by qlm-sim profile fit"
    fitted = with_factors(target.gpu, target.model, target.tp, result.factors, name=out.stem, source=source)
    text = profile_toml(fitted, held_out_mape=result.held_out_mape, comment=source)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from None
    _print(result, target, what, Console(file=sys.stdout))
    print(f"profile: {out}, for --gpu {out}")
    return 0


def _check_output(args: argparse.Namespace) -> None:
    if args.out is not None and not args.out.endswith(".toml"):
        raise InputError(f"--out: found {args.out}, expected a file name that ends in .toml")
    for flag in ("out", "log"):
        path = getattr(args, flag, None)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise InputError(f"--{flag}: found {path}, expected a file in a directory that is there")


def _target(args: argparse.Namespace, observations: "Sequence[Observation]") -> "Target":
    """The engine to start from: the GPU that is named, or the shipped one that errs least."""
    from qlm_sim.calibration.fit import shipped_error

    targets, refusal = _targets(args), None
    if len(targets) == 1:
        return targets[0]
    errors = {}
    for number, each in enumerate(targets):
        try:
            errors[number] = shipped_error(each, observations)
        except InputError as error:  # its memory is too small for some request
            refusal = error
    if not errors:
        raise refusal or InputError("no GPU profile ships")
    return targets[min(errors, key=lambda number: errors[number])]


def _targets(args: argparse.Namespace) -> "list[Target]":
    """The engine on the GPU that is named, or on each shipped one that it fits."""
    from qlm_sim.calibration.fit import Target
    from qlm_sim.models.hardware import gpu_names

    found, refusal = [], None
    for name in gpu_names() if args.gpu is None else [args.gpu]:
        try:
            engine = real_engine(argparse.Namespace(**{**vars(args), "gpu": name}))
            placed = engine.placed()
        except InputError as error:
            refusal = error
            continue
        found.append(Target(engine.model, engine.gpu, engine.tp, engine.version, engine.config, placed))
    if not found:
        raise refusal or InputError("no GPU profile ships")
    return found


def _print(result: "FitResult", target: "Target", what: str, console: "object") -> None:
    from rich.console import Console

    from qlm_sim.cli.tables import plain_table

    assert isinstance(console, Console)
    console.print(f"{target.model.name} on {target.tp} x {target.gpu.name}, {target.version.name}: {what}")
    table = plain_table("slower than the shipped profile by", "factor", "95 %", "")
    for name, (low, high) in result.bounds.items():
        known = name in result.determined
        table.add_row(
            f"{name} ({_MEANINGS[name]})",
            f"{getattr(result.factors, name):.3f}",
            f"{low:.3f} to {high:.3f}",
            "" if known else "not determined by these measurements",
        )
    console.print(table)
    held_out = "" if result.held_out_mape is None else f", {result.held_out_mape:.1%} on held-out requests"
    console.print(
        f"mean error of {result.times:,} times: {result.shipped_mape:.1%} as shipped, "
        f"{result.mape:.1%} fitted{held_out}",
        soft_wrap=True,
    )
