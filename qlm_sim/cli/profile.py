"""``qlm-sim profile``: the GPUs and models that are known, and what follows from them."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from qlm_sim.cli import profile_fit
from qlm_sim.cli.parser import Commands

if TYPE_CHECKING:
    from rich.table import Table


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "profile",
        help="show what is known of GPUs and models, or fit a profile of your own",
        description="GPU profiles, with the source of every figure, and what a model costs on them.",
        epilog="examples:\n  qlm-sim profile list\n  qlm-sim profile show A10\n"
        "  qlm-sim profile show A100-80 --model llama-2-70b --tp 4\n"
        "  qlm-sim profile fit requests.csv --gpu H100 --model llama-3.1-8b\n"
        "  qlm-sim profile measure --url http://127.0.0.1:8000 --model llama-3.1-8b",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser(
        "list",
        help="the GPUs and models that are known",
        description="List the GPUs and models that are known.",
        epilog="examples:\n  qlm-sim profile list\n  qlm-sim profile list --json",
    )
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=run_list)
    show = actions.add_parser(
        "show",
        help="one GPU's figures and their sources, or a model's on it",
        description="Without --model: a GPU's figures and where each comes from. With it: memory, speed "
        "beside the roofline, and swap times of the model on that GPU.",
        epilog="examples:\n  qlm-sim profile show A10\n  qlm-sim profile show A10 --model mistral-7b\n"
        "  qlm-sim profile show H100 --model path/to/config.json --tp 2 --json",
    )
    show.add_argument("gpu", metavar="GPU", help="a name of qlm-sim profile list, or a profile file (.toml)")
    show.add_argument("--model", metavar="M", help="a model's name, or the path of its config.json")
    show.add_argument("--tp", type=int, metavar="N", help="GPUs of one instance (default: 1); needs --model")
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(run=run_show)
    profile_fit.add_to(actions)


def run_list(args: argparse.Namespace) -> int:
    from rich.console import Console

    from qlm_sim.cli.tables import plain_table
    from qlm_sim.config.instances import GIB
    from qlm_sim.models.hardware import gpu_names, load_gpu
    from qlm_sim.models.specs import load_model, model_names

    gpus = [load_gpu(name) for name in gpu_names()]
    models = [load_model(name) for name in model_names()]
    if args.json:
        known = {
            "gpus": {
                each.name: {
                    "memory_bytes": each.memory_bytes.value,
                    "bandwidth_bytes_per_s": each.bandwidth_bytes_per_s.value,
                    "flops": each.flops.value,
                    "host_bytes_per_s": each.host_bytes_per_s.value,
                }
                for each in gpus
            },
            "models": {
                each.name: {
                    "parameters": each.parameters,
                    "weight_bytes": each.weight_bytes,
                    "kv_bytes_per_token": each.kv_bytes_per_token,
                    "max_model_len": each.max_model_len,
                }
                for each in models
            },
        }
        print(json.dumps(known, indent=2))
        return 0
    gpu_table = plain_table("GPU", "memory", "bandwidth", "16-bit peak", "host link")
    for gpu in gpus:
        gpu_table.add_row(
            gpu.name,
            f"{gpu.memory_bytes.value / GIB:.1f} GiB",
            f"{gpu.bandwidth_bytes_per_s.value / 1e9:,.0f} GB/s",
            f"{gpu.flops.value / 1e12:,.0f} TFLOPS",
            f"{gpu.host_bytes_per_s.value / 1e9:.0f} GB/s",
        )
    model_table = plain_table("model", "parameters", "weights", "KV per token", "longest request")
    for model in models:
        model_table.add_row(
            model.name,
            f"{model.parameters / 1e9:.2f} B",
            f"{model.weight_bytes / GIB:.1f} GiB",
            f"{model.kv_bytes_per_token / 1024:.0f} KiB",
            f"{model.max_model_len:,}",
        )
    console = Console(file=sys.stdout)
    console.print(gpu_table)
    console.print(model_table)
    return 0


def run_show(args: argparse.Namespace) -> int:
    from rich.console import Console

    from qlm_sim.errors import InputError
    from qlm_sim.models.describe import describe
    from qlm_sim.models.engine_config import EngineConfig
    from qlm_sim.models.hardware import load_gpu
    from qlm_sim.models.specs import load_model

    gpu = load_gpu(args.gpu)
    if args.model is None:
        if args.tp is not None:
            raise InputError("--tp: found without --model, expected both: a GPU's own figures are of one GPU")
        figures = {
            name: {"value": each.value, "kind": each.kind, "source": each.source}
            for name, each in gpu.coefficients().items()
        }
        title = gpu.title
    else:
        figures = describe(load_model(args.model), gpu, args.tp or 1, EngineConfig())
        title = f"{figures['model']} on {figures['tp']} x {figures['gpu']}, {figures['engine']}"
    if args.json:
        json.dump(figures, sys.stdout, indent=2)
        print()
        return 0
    console = Console(file=sys.stdout)
    console.print(title)
    console.print(_sources(figures) if args.model is None else _on_gpu(figures))
    return 0


def _sources(figures: dict[str, Any]) -> "Table":
    """A GPU's figures in SI units: bytes, bytes/s, FLOP/s, seconds."""
    from qlm_sim.cli.tables import plain_table

    table = plain_table("figure", "value", "kind")
    table.add_column("source", overflow="fold")
    for name, each in figures.items():
        table.add_row(name, f"{each['value']:.4g}", each["kind"], each["source"])
    return table


def _on_gpu(figures: dict[str, Any]) -> "Table":
    """A model's figures on a GPU, the roofline beside each rate."""
    from qlm_sim.cli.tables import plain_table
    from qlm_sim.report.comparison import NOTHING, number, seconds

    table = plain_table("", "expected", "roofline")
    table.add_row("weights", f"{figures['weights_gib']:.2f} GiB")
    table.add_row("KV cache", f"{figures['kv_capacity_tokens']:,} tokens")
    table.add_row("longest request", f"{figures['max_model_len']:,} tokens")
    context = figures["context_tokens"]
    rates = {f"decode, {batch} x {context} tokens": rate for batch, rate in figures["decode"].items()}
    rates[f"prefill, {figures['prefill']['tokens']} tokens"] = figures["prefill"]
    for name, rate in rates.items():
        shown = (rate["tokens_per_s"], rate["roofline_tokens_per_s"])
        table.add_row(name, *(NOTHING if each is None else f"{number(each)} tokens/s" for each in shown))
    table.add_row("swap in from host memory", seconds(figures["swap_in_s"]))
    table.add_row("load from storage at 2 GB/s", seconds(figures["load_s"]))
    fit = figures["fit"]
    error = "" if fit["held_out_mape"] is None else f", error on held-out shapes {fit['held_out_mape']:.1%}"
    table.caption = (
        f"Kernels as fitted for {fit['model']}, tp {fit['tp']} ({fit['kind']}{error}): {fit['source']}"
    )
    table.caption_justify, table.caption_style = "left", ""
    return table
