"""The flags that override a scenario: which key each one sets. Their values are checked as the file's are."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlm_sim.config import Scenario

Overrides = dict[str, tuple[str, Any]]
"""Dotted key of a scenario to (flag, value); the value None takes the key away."""

_ENGINE_HELP = {
    "--max-num-seqs": (int, "most requests that an engine runs at once (256)"),
    "--max-num-batched-tokens": (int, "most tokens that an engine computes in one step (2048)"),
    "--block-size": (int, "tokens per KV cache block (16)"),
    "--gpu-memory-utilization": (float, "share of the GPU's memory that the engine may use (0.9)"),
    "--max-model-len": (int, "longest prompt + output in tokens"),
    "--scheduling-policy": (str, "order inside the engine: fcfs, or priority (lower value first)"),
    "--watermark": (
        float,
        "share of the KV cache blocks to keep free when a waiting request is admitted (0)",
    ),
    "--num-gpu-blocks": (int, "KV cache blocks, as an engine's log told them"),
}

_METAVARS = {int: "N", float: "SHARE", str: "NAME"}

_KEYS = {
    "--requests": "workload.requests",
    "--rate": "workload.rate_rps",
    "--arrivals": "workload.arrivals",
    "--format": "workload.format",
    "--tokenizer": "workload.tokenizer",
    "--seed": "seed",
    "--policy": "scheduler.policies",
    "--without": "scheduler.without",
    "--solver": "scheduler.solver",
    "--admission": "scheduler.admission",
    "--engine": "simulation.engine",
    "--horizon": "simulation.horizon_s",
    "--scheduler-reserve-full-isl": "engine.scheduler_reserve_full_isl",
    "--enable-prefix-caching": "engine.enable_prefix_caching",
} | {flag: f"engine.{flag[2:].replace('-', '_')}" for flag in _ENGINE_HELP}


def add_scenario_flags(parser: argparse.ArgumentParser) -> None:
    """Every flag that changes a scenario, in groups."""
    requests = parser.add_argument_group("requests (default: the scenario's)")
    requests.add_argument("--requests", type=int, metavar="N", help="how many requests to run")
    requests.add_argument("--rate", type=float, metavar="R", help="mean arrivals per second")
    requests.add_argument("--arrivals", metavar="A", help="trace, poisson, gamma:CV or uniform")
    requests.add_argument("--seed", type=int, metavar="S", help="seed of mix, lengths and arrivals")
    requests.add_argument("--format", metavar="F", help="the trace's format, where it is not recognised")
    requests.add_argument(
        "--tokenizer",
        metavar="T",
        help="what counts a text's tokens: a tokenizer.json, a SentencePiece model or a Hugging Face name "
        "(default: Mistral-7B's, which needs no network)",
    )
    scheduler = parser.add_argument_group("scheduler")
    scheduler.add_argument(
        "--policy", action="append", metavar="NAME", help="run this policy; repeatable (default: all)"
    )
    scheduler.add_argument(
        "--without",
        action="append",
        metavar="LSO",
        help="take a serving operation away: pulling, eviction, swapping or balancing; repeatable",
    )
    scheduler.add_argument(
        "--solver",
        metavar="NAME",
        help="what makes qlm's global plans: search (default), or the paper's integer program where it is "
        "small enough, by HiGHS (milp) or CBC (milp-cbc)",
    )
    scheduler.add_argument(
        "--admission",
        type=float,
        metavar="P",
        help="refuse a request at once where the probability that it meets its SLO is below this "
        "(default: let all in)",
    )
    cluster = parser.add_argument_group("cluster: any of these makes it one group of like instances")
    cluster.add_argument("--gpu", metavar="G", help="GPU of every instance (see qlm-sim profile list)")
    cluster.add_argument("--count", type=int, metavar="N", help="instances")
    cluster.add_argument("--tp", type=int, metavar="N", help="GPUs of one instance (tensor parallel)")
    cluster.add_argument(
        "--model",
        action="append",
        metavar="M",
        help="serve this model in place of the scenario's; repeatable, requests are spread evenly",
    )
    cluster.add_argument(
        "--model-config",
        action="append",
        metavar="PATH",
        help="like --model, for a model that is not built in: its Hugging Face config.json",
    )
    engine = parser.add_argument_group(
        "engine, with vLLM's names (defaults: the scenario's, or else those told)"
    )
    for flag, (kind, words) in _ENGINE_HELP.items():
        engine.add_argument(flag, type=kind, metavar=_METAVARS[kind], help=words)
    engine.add_argument(
        "--scheduler-reserve-full-isl",
        action=argparse.BooleanOptionalAction,
        help="admit a request only where its whole prompt fits the free KV blocks (off; vLLM 0.19: on)",
    )
    engine.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="find the KV blocks of requests that began alike, if the trace tells which do (off; vLLM: on)",
    )
    simulation = parser.add_argument_group("simulation")
    simulation.add_argument(
        "--engine", metavar="MODE", help="leap (default), or stepping: the same times, step by step, slow"
    )
    simulation.add_argument(
        "--horizon", type=float, metavar="SECONDS", help="stop here; what is unfinished has missed its SLO"
    )


def overrides(args: argparse.Namespace, base: "Scenario") -> Overrides:
    """What the flags and the TRACE argument change in ``base``."""
    changes: Overrides = {}
    if args.trace is not None and args.trace != base.workload.trace:
        changes["workload.trace"] = ("TRACE", args.trace)
        for key in ("requests", "format", "tokenizer"):
            changes[f"workload.{key}"] = ("TRACE", None)
    if args.arrivals == "trace" and args.rate is None:
        changes["workload.rate_rps"] = ("--arrivals", None)
    for flag, key in _KEYS.items():
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is not None:
            changes[key] = (flag, value)
    return changes | _cluster(args, base)


def _cluster(args: argparse.Namespace, base: "Scenario") -> Overrides:
    """One group of like instances, where a flag speaks of the cluster; --model changes the mix as well."""
    from qlm_sim.config import table_of

    given = {flag: getattr(args, flag[2:].replace("-", "_")) for flag in ("--gpu", "--count", "--tp")}
    models, configs = _models(args)
    named = [flag for flag, value in given.items() if value is not None] + (["--model"] if models else [])
    if not named:
        return {}
    group = table_of(base.cluster[0])
    group["count"] = sum(each.count for each in base.cluster)
    group["models"] = models or list(dict.fromkeys(m for each in base.cluster for m in each.models))
    group.pop("resident", None)
    group |= {flag[2:]: value for flag, value in given.items() if value is not None}
    changes: Overrides = {"cluster": (", ".join(named), [group])}
    if models:
        changes["mix"] = ("--model", _spread(base, models))
    if configs:
        changes["models"] = ("--model-config", table_of(base.models) | configs)
    return changes


def _models(args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Names of --model and --model-config, and the table [models] of the latter."""
    from qlm_sim.models.specs import load_model

    paths = [Path(path) for path in args.model_config or ()]
    configs = {load_model(path).name: {"config": str(path.resolve())} for path in paths}
    return [*(args.model or ()), *configs], configs


def _spread(base: "Scenario", models: list[str]) -> list[dict[str, Any]]:
    """The mix as it is, each entry over other models evenly."""
    from qlm_sim.config import table_of

    parts = len(models)
    return [
        table_of(
            replace(
                entry,
                model=model,
                share=entry.share / parts,
                rate_rps=None if entry.rate_rps is None else entry.rate_rps / parts,
            )
        )
        for entry in base.mix
        for model in models
    ]
