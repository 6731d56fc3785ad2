"""What the kernels of one iteration of a model take on a GPU, by the measured tables.

Four matrix products and one attention per layer, the head, and the small kernels between. Knows no fit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import kernel_tables as tables
import numpy as np

from qlm_sim.models.hardware import TOKEN_GRID
from qlm_sim.models.specs import ModelSpec, load_model
from qlm_sim.models.step_time import side_bytes_per_token

SMALL_KERNELS_S = 8.8e-6
"""Per layer: norms, rotary embedding and activation at one token, on RTX 4090 (LLMServingSim's layer
tables: 2 x 1.9 + 2.2 + 2.6 us)."""
SIDE_EFFICIENCY = 0.8
"""Share of the bandwidth that the small kernels reach on large inputs (aiconfigurator's own factor)."""
MOST_OF_BANDWIDTH = 0.85
"""Most of the memory bandwidth that an engine's products reach one after another. Tables measure each
product back to back with itself, which hides its start and end, and show up to 0.90 on H100; real runs are
6 % slower there: CodeLlama-34B (26 ms a token, vLLM 0.11), Qwen3-32B at tp 2 (15.9 ms, vLLM 0.12)."""
VIDUR_MODELS = {
    "llama-2-7b": "Llama-2-7b-hf",
    "llama-3.1-8b": "Meta-Llama-3-8B",
    "llama-2-70b": "Llama-2-70b-hf",
}
"""Models that Vidur measured too, with the names of its tables."""


@dataclass(frozen=True)
class Gpu:
    """The hand-written part of a profile, as far as fits need it."""

    file: str
    bandwidth: float
    flops: float
    memory: float


@dataclass(frozen=True)
class Shape:
    """One iteration: a decode batch over contexts of one length, or the prefill of one prompt."""

    sequences: int
    length: int
    prefill: bool

    @property
    def tokens(self) -> int:
        return self.length if self.prefill else self.sequences


@dataclass(frozen=True)
class Kernels:
    """Measured seconds of one model's kernels on one of tp GPUs, all layers together."""

    products: Callable[[int], float]
    head: float
    attention: Callable[[Shape], float]
    side: Callable[[int], float]

    def iteration(self, shape: Shape) -> float:
        return self.products(shape.tokens) + self.head + self.attention(shape) + self.side(shape.tokens)


def aiconfigurator(
    folder: Path, name: str, gpu: Gpu, products: tables.Products, slower: float, model: ModelSpec, tp: int
) -> Kernels:
    """Kernels from aiconfigurator's tables ``name``, its products ``slower`` where compute binds."""
    heads, kv_heads = model.heads // tp, max(1, model.kv_heads // tp)
    hidden, vocabulary = model.hidden_size, model.vocab_size / tp
    layer = layer_products(model, tp)
    read_s = model.layer_bytes / tp / gpu.bandwidth / MOST_OF_BANDWIDTH

    def layers(tokens: int) -> float:
        seconds = model.layers * sum(products(tokens, n, k) for n, k in layer)
        return max(read_s, seconds, slower * seconds if tokens >= gpu.flops / gpu.bandwidth else 0.0)

    decode = tables.read_decode_attention(folder, name, heads, kv_heads).interpolated()
    prefill = tables.read_prefill_attention(folder, name, heads, kv_heads).interpolated()
    widest = min(vocabulary, 65536)
    head = sum(products(m, widest, hidden) for m in (1, 16, 64)) / 3 * vocabulary / widest
    side_rate = gpu.bandwidth * SIDE_EFFICIENCY
    return Kernels(
        products=layers,
        head=head,
        attention=lambda shape: (
            model.layers * (prefill if shape.prefill else decode)(shape.sequences, shape.length)
        ),
        side=lambda tokens: (
            model.layers * SMALL_KERNELS_S + side_bytes_per_token(model, tp) * tokens / side_rate
        ),
    )


def sustained(data: Path, name: str, gpu: Gpu, products: tables.Products) -> float:
    """How much longer products take than ``products`` says where compute binds: the middle of two tables.

    aiconfigurator measures one product at a time in short bursts; Vidur's tables of the same GPU take 1.2
    times as long, and its shapes are not all multiples of 128. Their geometric middle, over all tokens of
    Vidur's tables from the roofline's corner on. 1 where Vidur has no table of the GPU.

    On H100 that is 0.76 of the peak: aiconfigurator's table of the H200, the same chip, says 0.77, and runs
    of Qwen3-32B (vLLM 0.12, tp 2 and 4, prompts of 4,096) ask for as much.
    """
    ratios = []
    for model_name, table in VIDUR_MODELS.items():
        path = data / "vidur" / f"{name.split('_')[0]}_{table}_mlp.csv.gz"
        if not path.exists():
            continue
        model = load_model(model_name)
        tp, measured = tables.read_vidur_products(path)
        layer = layer_products(model, tp)
        corner = 1.5 * gpu.flops / gpu.bandwidth
        measured = measured[(measured.index >= corner) & (measured.index <= TOKEN_GRID[-1])]
        ratios += [
            seconds / sum(products(tokens, n, k) for n, k in layer) for tokens, seconds in measured.items()
        ]
    return float(np.sqrt(np.exp(np.mean(np.log(ratios))))) if ratios else 1.0


def layer_products(model: ModelSpec, tp: int) -> tuple[tuple[float, float], ...]:
    """Columns and rows of one layer's matrices on one of tp GPUs: QKV, O, gate with up, down."""
    hidden, inner = model.hidden_size, model.intermediate_size / tp
    query = model.heads // tp * model.head_dim
    key = max(1, model.kv_heads // tp) * model.head_dim
    return (query + 2 * key, hidden), (hidden, query), (2 * inner, hidden), (hidden, inner)


def llmservingsim(folder: Path, name: str, model: ModelSpec) -> Kernels:
    """Kernels from LLMServingSim's layer tables, which reach to 2,048 tokens."""
    table = tables.read_layer_table(folder, name)
    products = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    small = ("layernorm", "layernorm", "rotary_emb", "act_fn")
    last = float(table.dense.index.max())
    decode, prefill = table.decode.interpolated(), table.prefill.interpolated()

    def dense(names: tuple[str, ...], tokens: int) -> float:
        seconds = sum(table.layer(name, min(tokens, last)) for name in names)
        return model.layers * seconds * max(1.0, tokens / last)

    return Kernels(
        products=lambda tokens: dense(products, tokens),
        head=float(table.head[1]),
        attention=lambda shape: (
            model.layers * (prefill if shape.prefill else decode)(shape.sequences, shape.length)
        ),
        side=lambda tokens: dense(small, tokens),
    )
