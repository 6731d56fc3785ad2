"""Measured kernel times of one GPU at any shape, by interpolation in tables.

Reads aiconfigurator's tables (A100, H100, H200, L40S; kernels of vLLM 0.14), Vidur's (A100, H100; products
alone) and LLMServingSim's (RTX 4090).

Knows shapes and seconds; nothing of models or fits. Rows that cannot be true are dropped: faster than
the GPU's memory or arithmetic allows, or much slower than a larger shape.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.interpolate import LinearNDInterpolator, RegularGridInterpolator

OUTLIER = 1.25
"""A row this many times slower than a row that does more work is a glitch of the measurement."""


@dataclass(frozen=True)
class Products:
    """Seconds of 16-bit matrix products (m x k) times (k x n)."""

    inefficiency: RegularGridInterpolator
    """Seconds over the roofline's, over (log m, n, k): smooth where seconds themselves are not."""
    bandwidth: float
    flops: float
    rejected: int

    def __call__(self, m: float, n: float, k: float) -> float:
        roofline = max(2 * n * k / self.bandwidth, 2 * m * n * k / self.flops)
        return float(self.inefficiency((np.log(m), n, k))) * roofline


@dataclass(frozen=True)
class Attention:
    """Rows of one attention table at a head geometry: work and seconds, one layer."""

    batch: NDArray[np.float64]
    tokens: NDArray[np.float64]
    """Prefill: prompt length of each sequence. Decode: KV length of each sequence."""
    seconds: NDArray[np.float64]

    def interpolated(self) -> Callable[[float, float], float]:
        """Seconds by (batch, tokens), linear between the logarithms of all three."""
        if np.ptp(self.batch) == 0:  # prompts one by one
            order = np.argsort(self.tokens)
            tokens, seconds = np.log(self.tokens[order]), np.log(self.seconds[order])
            return lambda _, length: float(np.exp(np.interp(np.log(length), tokens, seconds, right=np.nan)))
        points = np.log(np.column_stack([self.batch, self.tokens]))
        table = LinearNDInterpolator(points, np.log(self.seconds))
        return lambda batch, tokens: float(np.exp(table(np.log(batch), np.log(tokens))))


def read_products(folder: Path, gpu: str, bandwidth: float, flops: float) -> Products:
    rows = _table(folder, f"{gpu}_gemm_*.parquet")
    rows = rows[rows.gemm_dtype == "bfloat16"].groupby(["m", "n", "k"]).latency.median()
    grid = rows.unstack("k").sort_index()
    n, k = grid.index.get_level_values("n").unique().sort_values(), grid.columns.sort_values()
    m = grid.index.get_level_values("m").value_counts()
    m = m[m == m.max()].index.sort_values()
    seconds = 1e-3 * np.stack([grid.loc[size].reindex(index=n, columns=k).to_numpy(float) for size in m])
    mm, nn, kk = np.meshgrid(m, n, k, indexing="ij")
    possible = np.maximum(2.0 * nn * kk / bandwidth, 2.0 * mm * nn * kk / flops)
    bad = seconds < possible
    seconds[bad] = np.nan
    rejected = int(bad.sum())
    for axis in range(3):
        larger = np.flip(np.fmin.accumulate(np.flip(seconds, axis), axis), axis)
        bad = seconds > OUTLIER * larger
        seconds[bad] = np.nan
        rejected += int(bad.sum())
    # What was dropped or never measured is interpolated along m, then taken from the next smaller shape.
    ratio = np.log(seconds / possible)
    for i, j in np.ndindex(len(n), len(k)):
        column = pd.Series(ratio[:, i, j], index=np.log(m.to_numpy(float)))
        ratio[:, i, j] = column.interpolate("index", limit_direction="both")
    for plane in ratio:
        plane[:] = pd.DataFrame(plane).ffill(axis=0).ffill(axis=1).to_numpy()
    axes = (np.log(m.to_numpy(float)), n.to_numpy(float), k.to_numpy(float))
    return Products(RegularGridInterpolator(axes, np.exp(ratio)), bandwidth, flops, rejected)


def read_prefill_attention(folder: Path, gpu: str, heads: int, kv_heads: int) -> Attention:
    """Causal self-attention over whole prompts, nearest head geometry in the table."""
    rows = _attention(folder, f"{gpu}_attention_vllm_0.14.0_context_*.parquet")
    rows = _nearest(rows, heads, kv_heads)
    return _without_outliers(rows.batch_size, rows.isl, rows.latency)


def read_decode_attention(folder: Path, gpu: str, heads: int, kv_heads: int) -> Attention:
    """One query per sequence. KV heads beyond the table's most count as so many more sequences."""
    rows = _attention(folder, f"{gpu}_attention_vllm_0.14.0_generation_*.parquet")
    most = int(rows.num_key_value_heads.max())
    copies = max(1.0, kv_heads / most)
    rows = _nearest(rows, round(heads / copies), min(kv_heads, most))
    table = _without_outliers(rows.batch_size, rows.isl + rows.step, rows.latency)
    return Attention(table.batch / copies, table.tokens, table.seconds)


def read_all_reduce(folder: Path, gpu: str, gpus: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Message bytes and seconds of one all-reduce: the faster of vLLM's own kernel and NCCL.

    The tables count messages in 16-bit numbers: taken as bytes, NCCL on 8 A100 would come to half of the
    230 GB/s of bus bandwidth that it is known for.
    """
    own = _table(folder, f"{gpu}_comm_vllm_*_custom_allreduce_perf.parquet")
    own = own[(own.num_gpus == gpus) & (own.kernel_source == "vLLM_custom_graph")]
    nccl = _table(folder, f"{gpu}_comm_nccl_*.parquet")
    nccl = nccl[(nccl.num_gpus == gpus) & (nccl.op_name == "all_reduce") & (nccl.nccl_dtype == "half")]
    both = pd.concat([own[["message_size", "latency"]], nccl[["message_size", "latency"]]])
    fastest = both.groupby("message_size").latency.min()
    return 2 * fastest.index.to_numpy(float), fastest.to_numpy(float) * 1e-3


@cache
def _table(folder: Path, pattern: str) -> pd.DataFrame:
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{folder}: no file {pattern}")
    return pd.read_parquet(found[0])


def _attention(folder: Path, pattern: str) -> pd.DataFrame:
    rows = _table(folder, pattern)
    return rows[
        (rows.attn_dtype == "bfloat16") & (rows.kv_cache_dtype == "bfloat16") & (rows.head_dim == 128)
    ]


def _nearest(rows: pd.DataFrame, heads: int, kv_heads: int) -> pd.DataFrame:
    pairs = rows[["num_heads", "num_key_value_heads"]].drop_duplicates().to_numpy()
    distance = np.abs(np.log(pairs[:, 0] / heads)) + np.abs(np.log(pairs[:, 1] / kv_heads))
    best = pairs[int(np.argmin(distance))]
    return rows[(rows.num_heads == best[0]) & (rows.num_key_value_heads == best[1])]


def _without_outliers(batch: pd.Series, tokens: pd.Series, latency_ms: pd.Series) -> Attention:
    grid = pd.DataFrame({"batch": batch, "tokens": tokens, "s": latency_ms * 1e-3})
    square = grid.pivot_table(index="batch", columns="tokens", values="s").to_numpy()
    larger = square
    for axis in range(2):
        larger = np.flip(np.fmin.accumulate(np.flip(larger, axis), axis), axis)
    kept = grid.pivot_table(index="batch", columns="tokens", values="s").where(square <= OUTLIER * larger)
    long = kept.stack().dropna().reset_index()
    long.columns = ["batch", "tokens", "s"]
    return Attention(long.batch.to_numpy(float), long.tokens.to_numpy(float), long.s.to_numpy(float))


def read_vidur_products(path: Path) -> tuple[int, "pd.Series[float]"]:
    """The least tensor-parallel degree of one of Vidur's tables, and seconds of one layer's four products by
    tokens."""
    rows = pd.read_csv(path)
    rows = rows[rows.num_tensor_parallel_workers == rows.num_tensor_parallel_workers.min()]
    names = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
    seconds = 1e-3 * sum(rows[f"time_stats.{name}.median"] for name in names)
    return int(rows.num_tensor_parallel_workers.iloc[0]), seconds.groupby(rows.num_tokens).mean()


@dataclass(frozen=True)
class LayerTable:
    """LLMServingSim's layer times of one model on one GPU, seconds by tokens."""

    dense: pd.DataFrame
    head: pd.Series
    prefill: Attention
    decode: Attention

    def layer(self, name: str, tokens: float) -> float:
        """Seconds of one operation of one layer."""
        return float(np.interp(tokens, self.dense.index, self.dense[name]))


def read_layer_table(folder: Path, name: str) -> LayerTable:
    dense = pd.read_csv(folder / f"{name}_dense.csv.gz")
    sequences = pd.read_csv(folder / f"{name}_per_sequence.csv.gz")
    attention = pd.read_csv(folder / f"{name}_attention.csv.gz")
    decode = attention[(attention.prefill_chunk == 0) & (attention.n_decode > 0)]
    prefill = attention[
        (attention.prefill_chunk > 0) & (attention.kv_prefill == 0) & (attention.n_decode == 0)
    ]
    ones = pd.Series(1.0, index=prefill.index)
    return LayerTable(
        dense=dense.pivot_table(index="tokens", columns="layer", values="time_us") * 1e-6,
        head=sequences[sequences.layer == "lm_head"].set_index("sequences").time_us * 1e-6,
        prefill=_without_outliers(ones, prefill.prefill_chunk, prefill.time_us * 1e-3),
        decode=_without_outliers(decode.n_decode, decode.kv_decode, decode.time_us * 1e-3),
    )
