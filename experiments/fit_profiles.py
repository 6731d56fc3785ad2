"""Fits the kernel part of every GPU profile to measured kernel tables, and writes it into the profile.

    python experiments/fit_profiles.py --data ../shared > experiments/results/profile_fits.md

An iteration's time is the sum of its measured kernels: four matrix products and one attention per layer,
the head, and the small kernels between. Matrix products enter the profile as an efficiency curve over
TOKEN_GRID; head, decode and prefill attention as efficiencies fitted to the training shapes, each residual
relative to its whole iteration. Shapes of the HELD_OUT lists take no part in the fit: their error is what a
profile quotes. Table of errors on stdout.
"""

import argparse
import os
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import kernel_tables as tables
import numpy as np
from measured_kernels import (
    MOST_OF_BANDWIDTH,
    SIDE_EFFICIENCY,
    Gpu,
    Kernels,
    Shape,
    aiconfigurator,
    llmservingsim,
    sustained,
)
from numpy.typing import NDArray
from scipy.optimize import nnls

from qlm_sim.models.hardware import TOKEN_GRID
from qlm_sim.models.specs import ModelSpec, load_model, model_names
from qlm_sim.models.step_time import kv_bytes_per_gpu_token, side_bytes_per_token

PROFILES = Path(__file__).parents[1] / "qlm_sim" / "hardware_profiles"
MARK = "# ---- Below: made by experiments/fit_profiles.py. Edits are lost. ----"
DEGREES = (1, 2, 4, 8)
BATCHES, HELD_OUT_BATCHES = (1, 4, 16, 64, 128, 256), (2, 8, 32, 48, 80, 160)
CONTEXTS, HELD_OUT_CONTEXTS = (64, 256, 1024, 4096, 16384), (128, 512, 2048, 8192)
PROMPTS, HELD_OUT_PROMPTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192), (384, 768, 1536, 3072, 6144)
MOST_KV_BYTES = 0.9
"""Largest KV cache of a shape, as a share of the GPU's memory beside the weights."""


@dataclass(frozen=True)
class Fit:
    """The figures of one ``KernelFit``, and the mean absolute relative errors that they leave."""

    products_efficiency: list[float]
    head_efficiency: float
    kv_efficiency: float
    attention_efficiency: float
    side_efficiency: float
    layer_s: float
    sequence_layer_s: float
    train_mape: float
    held_out_mape: float
    held_out_worst: float


def shapes(held_out: bool, most_kv_tokens: float) -> Iterator[Shape]:
    for batch in HELD_OUT_BATCHES if held_out else BATCHES:
        for context in HELD_OUT_CONTEXTS if held_out else CONTEXTS:
            if batch * context <= most_kv_tokens:
                yield Shape(batch, context, prefill=False)
    for prompt in HELD_OUT_PROMPTS if held_out else PROMPTS:
        yield Shape(1, prompt, prefill=True)


def fit(kernels: Kernels, gpu: Gpu, model: ModelSpec, tp: int) -> Fit:
    """The profile's figures for these kernels."""
    layer_bytes, flops_per_token = model.layer_bytes / tp, model.flops_per_token / tp
    kv_bytes = kv_bytes_per_gpu_token(model, tp)
    side_bytes = side_bytes_per_token(model, tp)
    most = MOST_KV_BYTES * (gpu.memory - model.weight_bytes / tp) / kv_bytes

    def measured(held_out: bool) -> list[tuple[Shape, float]]:
        pairs = [(shape, kernels.iteration(shape)) for shape in shapes(held_out, most)]
        return [(shape, seconds) for shape, seconds in pairs if np.isfinite(seconds)]

    train = measured(held_out=False)
    decode = [(shape, seconds) for shape, seconds in train if not shape.prefill]
    prefill = [(shape, seconds) for shape, seconds in train if shape.prefill]
    roofline = [max(layer_bytes / gpu.bandwidth, n * flops_per_token / gpu.flops) for n in TOKEN_GRID]
    curve = [least / kernels.products(n) for n, least in zip(TOKEN_GRID, roofline, strict=True)]
    # Decode attention: layers·(floor + c·sequences) + KV bytes/rate;
    # prefill attention: layers·floor + d·tokens + pairs/rate.
    floor, per_sequence, per_byte = relative_nnls(
        [[model.layers, model.layers * s.sequences, s.sequences * s.length * kv_bytes] for s, _ in decode],
        [kernels.attention(shape) for shape, _ in decode],
        [seconds for _, seconds in decode],
    )
    per_token, per_pair = relative_nnls(
        [[s.length, s.length * (s.length + 1) / 2] for s, _ in prefill],
        [kernels.attention(shape) - model.layers * floor for shape, _ in prefill],
        [seconds for _, seconds in prefill],
    )
    small, small_per_token = relative_nnls(
        [[model.layers, n] for n in TOKEN_GRID],
        [kernels.side(n) for n in TOKEN_GRID],
        [kernels.products(n) for n in TOKEN_GRID],
    )
    pair_flops = model.flops_per_attention_pair / tp
    found = Fit(
        products_efficiency=[round(min(1.0, share), 4) for share in curve],
        head_efficiency=share(model.head_bytes / tp / gpu.bandwidth / kernels.head),
        kv_efficiency=share(1 / (gpu.bandwidth * per_byte)),
        attention_efficiency=share(pair_flops / (gpu.flops * per_pair)),
        side_efficiency=share(side_bytes / (gpu.bandwidth * (small_per_token + per_token))),
        layer_s=floor + small,
        sequence_layer_s=max(per_sequence, 1e-9),
        train_mape=0.0,
        held_out_mape=0.0,
        held_out_worst=0.0,
    )

    def predicted(shape: Shape) -> float:
        products = [least / ep for least, ep in zip(roofline, found.products_efficiency, strict=True)]
        seconds = float(np.interp(shape.tokens, TOKEN_GRID, np.maximum.accumulate(products)))
        seconds += (
            model.head_bytes / tp / (gpu.bandwidth * found.head_efficiency) + model.layers * found.layer_s
        )
        seconds += shape.tokens * side_bytes / (gpu.bandwidth * found.side_efficiency)
        seconds += shape.sequences * model.layers * found.sequence_layer_s
        if shape.prefill:
            pairs = shape.length * (shape.length + 1) / 2
            return seconds + pairs * pair_flops / (gpu.flops * found.attention_efficiency)
        return seconds + shape.sequences * shape.length * kv_bytes / (gpu.bandwidth * found.kv_efficiency)

    def errors(held_out: bool) -> NDArray[np.float64]:
        return np.array([abs(predicted(shape) / seconds - 1) for shape, seconds in measured(held_out)])

    held_out = errors(held_out=True)
    return replace(
        found,
        train_mape=float(errors(held_out=False).mean()),
        held_out_mape=float(held_out.mean()),
        held_out_worst=float(held_out.max()),
    )


def share(value: float) -> float:
    """A share of a peak: what is above 1 is a cache's help, and is not promised."""
    return round(min(1.0, value), 4)


def relative_nnls(terms: list[list[float]], seconds: list[float], whole: list[float]) -> NDArray[np.float64]:
    """Non-negative coefficients of least absolute error relative to ``whole`` (reweighted least squares)."""
    matrix = np.array(terms) / np.array(whole)[:, None]
    target = np.array(seconds) / np.array(whole)
    scale = np.abs(matrix).max(axis=0)
    weights = np.ones(len(target))
    for _ in range(30):
        root = np.sqrt(weights)
        found = nnls(matrix / scale * root[:, None], target * root)[0]
        weights = 1 / np.maximum(np.abs(matrix / scale @ found - target), 1e-3)
    return np.asarray(found / scale)


def fit_link(folder: Path, name: str, tp: int) -> tuple[float, float]:
    """Latency in seconds and bytes per second of an all-reduce, over messages of 8 KiB to 64 MiB."""
    message, seconds = tables.read_all_reduce(folder, name, tp)
    used = (message >= 2**13) & (message <= 2**26)
    latency, per_byte = relative_nnls(
        [[1.0, size] for size in message[used]], list(seconds[used]), list(seconds[used])
    )
    return float(latency), float(1 / per_byte)


def estimated_fit(weights: float, flops: float, kv: float, gpu: Gpu, model: ModelSpec) -> Fit:
    """A profile without kernel tables: three efficiencies, the corner between them rounded by an 8-norm."""
    curve = []
    for tokens in TOKEN_GRID:
        bytes_s, flops_s = model.layer_bytes / gpu.bandwidth, tokens * model.flops_per_token / gpu.flops
        seconds = ((bytes_s / weights) ** 8 + (flops_s / flops) ** 8) ** (1 / 8)
        curve.append(round(max(bytes_s, flops_s) / seconds, 4))
    return Fit(curve, weights, kv, 0.5 * flops, SIDE_EFFICIENCY, 15e-6, 0.2e-6, 0.0, 0.0, 0.0)


def kernel_text(model: ModelSpec, tp: int, found: Fit, kind: str, source: str) -> str:
    lines = [
        "[[kernels]]",
        f'model = "{model.name}"',
        f"tp = {tp}",
        f"weight_bytes_per_gpu = {model.weight_bytes // tp}",
        f"products_efficiency = {found.products_efficiency}",
        f"head_efficiency = {found.head_efficiency:.4g}",
        f"kv_efficiency = {found.kv_efficiency:.4g}",
        f"attention_efficiency = {found.attention_efficiency:.4g}",
        f"side_efficiency = {found.side_efficiency:.4g}",
        f"layer_s = {found.layer_s:.4g}",
        f"sequence_layer_s = {found.sequence_layer_s:.4g}",
    ]
    if found.held_out_mape:
        lines.append(f"held_out_mape = {found.held_out_mape:.4f}")
    return "\n".join([*lines, f'kind = "{kind}"', f'source = "{source}"', ""])


LEAST_LINK = 10e9
"""Bytes/s of an all-reduce: GPUs that reach each other over PCIe do more."""


def link_text(tp: int, latency_s: float, bytes_per_s: float, kind: str, source: str) -> str:
    return (
        f"[[links]]\ntp = {tp}\nlatency_s = {latency_s:.4g}\nbytes_per_s = {bytes_per_s:.4g}\n"
        f'kind = "{kind}"\nsource = "{source}"\n'
    )


def slow_link(link: tuple[float, float]) -> str:
    """A warning, where GPUs were joined by less than a PCIe slot."""
    return f": {link[1] / 1e9:.1f} GB/s, through the host as it seems" if link[1] < LEAST_LINK else ""


def pcie_links(source: str) -> list[str]:
    """All-reduce over PCIe without tables: a ring, 2(tp-1)/tp of the message at 15 GB/s."""
    return [link_text(tp, 20e-6, 15e9 / (2 * (tp - 1) / tp), "estimate", source) for tp in DEGREES[1:]]


def read_gpu(file: str) -> Gpu:
    facts = tomllib.loads((PROFILES / f"{file}.toml").read_text("utf-8").split(MARK)[0])
    return Gpu(
        file,
        bandwidth=facts["bandwidth_bytes_per_s"]["value"],
        flops=facts["flops"]["value"],
        memory=facts["memory_bytes"]["value"],
    )


def write(gpu: Gpu, parts: list[str]) -> None:
    path = PROFILES / f"{gpu.file}.toml"
    facts = path.read_text("utf-8").split(MARK)[0].rstrip()
    path.write_text("\n".join([facts, "", MARK, "", *parts]).rstrip() + "\n", "utf-8")


def report(gpu: Gpu, model: ModelSpec, tp: int, found: Fit) -> None:
    print(
        f"| {gpu.file} | {model.name} | {tp} | {found.train_mape:.1%} | {found.held_out_mape:.1%} "
        f"| {found.held_out_worst:.1%} | {found.products_efficiency[0]:.2f} "
        f"| {found.products_efficiency[TOKEN_GRID.index(2048)]:.2f} "
        f"| {found.kv_efficiency:.2f} | {found.attention_efficiency:.2f} | {found.layer_s * 1e6:.1f} |"
    )


def fit_aiconfigurator(data: Path, file: str, name: str, also: str | None = None) -> None:
    """Fits ``file``'s profile to the tables ``name``; ``also`` is a cousin that takes the same figures."""
    folder, gpu = data / "aiconfigurator", read_gpu(file)
    products = tables.read_products(folder, name, gpu.bandwidth, gpu.flops)
    print(f"{name}: {products.rejected} rows of matrix products rejected", file=sys.stderr)
    slower = sustained(data, name, gpu, products)
    print(f"{name}: products take {slower:.3f} times as long where compute binds", file=sys.stderr)
    source = f"aiconfigurator {name}, kernels of vLLM 0.14"
    if slower != 1.0:
        source += f"; compute-bound products x {slower:.3f}, half way to Vidur's table"
    link_source = f"aiconfigurator {name}, the faster of vLLM's all-reduce and NCCL"
    links = {tp: fit_link(folder, name, tp) for tp in DEGREES[1:]}
    fits = []
    for model in map(load_model, model_names()):
        for tp in DEGREES:
            if model.heads % tp or model.weight_bytes / tp > MOST_KV_BYTES * gpu.memory:
                continue
            kernels = aiconfigurator(folder, name, gpu, products, slower, model, tp)
            found = fit(kernels, gpu, model, tp)
            fits.append((model, tp, found))
            report(gpu, model, tp, found)
    write(
        gpu,
        [
            link_text(tp, *link, "fitted", f"aiconfigurator {name}, vLLM and NCCL{slow_link(link)}")
            for tp, link in links.items()
        ]
        + [kernel_text(*entry, "fitted", source) for entry in fits],
    )
    if also:
        cousin = read_gpu(also)
        held = [entry for entry in fits if entry[0].weight_bytes / entry[1] <= MOST_KV_BYTES * cousin.memory]
        note = f"rates of {file} ({source}), at most {MOST_OF_BANDWIDTH} of the bandwidth"
        write(
            cousin,
            [link_text(tp, *link, "fitted", link_source) for tp, link in links.items()]
            + [
                kernel_text(model, tp, transferred(found, gpu, cousin, model), "estimate", note)
                for model, tp, found in held
            ],
        )


def transferred(found: Fit, gpu: Gpu, cousin: Gpu, model: ModelSpec) -> Fit:
    """The fit of a GPU, for the same chip with slower memory: the same bytes/s as far as that has them."""
    faster = gpu.bandwidth / cousin.bandwidth
    curve = []
    for tokens, efficiency in zip(TOKEN_GRID, found.products_efficiency, strict=True):
        flops_s = tokens * model.flops_per_token / gpu.flops
        seconds = max(
            max(model.layer_bytes / gpu.bandwidth, flops_s) / efficiency,
            model.layer_bytes / cousin.bandwidth / MOST_OF_BANDWIDTH,
        )
        curve.append(round(max(model.layer_bytes / cousin.bandwidth, flops_s) / seconds, 4))
    return replace(
        found,
        products_efficiency=curve,
        head_efficiency=min(MOST_OF_BANDWIDTH, found.head_efficiency * faster),
        kv_efficiency=min(MOST_OF_BANDWIDTH, found.kv_efficiency * faster),
        held_out_mape=0.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QLM_DATA", "../shared")))
    data = parser.parse_args().data / "profiles"
    print("# Fits of the profiles to kernel tables\n")
    print("Made by `python experiments/fit_profiles.py > experiments/results/profile_fits.md`. Errors are of")
    print("whole iterations; held-out shapes took no part in the fit.\n")
    print(
        "| GPU | model | tp | train MAPE | held-out MAPE | held-out worst "
        "| ep(1) | ep(2048) | ek | ea | layer µs |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    fit_aiconfigurator(data, "a100-80", "a100_sxm", also="a100-40")
    fit_aiconfigurator(data, "h100", "h100_sxm")
    fit_aiconfigurator(data, "h200", "h200_sxm")
    fit_aiconfigurator(data, "l40s", "l40s")

    gpu, model = read_gpu("rtx-4090"), load_model("llama-3.1-8b")
    found = fit(llmservingsim(data / "llmservingsim", "RTX4090_Llama-3.1-8B_tp1", model), gpu, model, 1)
    report(gpu, model, 1, found)
    write(
        gpu,
        [
            *pcie_links("PCIe gen4 without peer access, as A10"),
            kernel_text(model, 1, found, "fitted", "LLMServingSim RTX4090 layer tables, Llama-3.1-8B"),
        ],
    )
    links = pcie_links("ring over PCIe gen4; Llumnix takes 15 GB/s between A10s")
    model = load_model("llama-2-7b")
    for file, weights, flops, source in (
        ("a10", 0.85, 0.56, "27 ms per token of Llama-2-7B (LMDeploy issue 210); prefill 70 +- 10 TFLOPS"),
        ("a10g", 0.85, 0.857, "30.65 ms per token of Llama-3-8B (vLLM 0.4.3); prefill 60 TFLOPS measured"),
    ):
        gpu = read_gpu(file)
        found = estimated_fit(weights, flops, 0.78, gpu, model)
        write(gpu, [*links, kernel_text(model, 1, found, "estimate", f"{source}; KV as published for GA102")])


if __name__ == "__main__":
    main()
