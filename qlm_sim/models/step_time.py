"""Seconds of one engine iteration, from a model's dimensions and a GPU's efficiencies.

    T = products(tokens) + head/(BW·eh) + KV bytes/(BW·ek) + attention FLOPs/(F·ea)
        + token_s·tokens + seq_s·sequences + layers·layer_s + engine overhead per iteration

    products(n) = max(W/BW, n·FLOPs/F) / ep(n)      at n of TOKEN_GRID, linear between
    token_s     = side bytes/(BW·es) + all-reduce bytes/link           (the latter where tp > 1)

W: bytes of the layers' weights; FLOPs: 2 x their parameters; tokens: all tokens of the iteration, that
is the prefill chunks and one per decoding sequence. All of it per GPU: divided by tp. The efficiency ep
follows measured products over the whole range of tokens, the corner between the bandwidth-bound and the
compute-bound regime included, where closed forms with two efficiencies err most. Context that earlier
chunks of a prompt left in the KV cache is priced by its query-key pairs alone.
"""

from bisect import bisect_right
from dataclasses import dataclass, field, replace

from qlm_sim.models.engines import EngineVersion
from qlm_sim.models.hardware import TOKEN_GRID, GpuProfile
from qlm_sim.models.specs import ModelSpec


@dataclass(frozen=True, slots=True)
class StepModel:
    """The terms of the step time of one model on one instance, in seconds. A ``StepCost``."""

    products_s: tuple[float, ...]
    """Matrix products of all layers at each of ``TOKEN_GRID``."""
    fixed_s: float
    """Per iteration: head, per-layer overhead, engine overhead."""
    token_s: float
    """Per token: memory traffic outside of the products, all-reduce (tp > 1)."""
    seq_s: float
    kv_token_s: float
    prefill_pair_s: float
    _base_s: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def base_s(self, tokens: int) -> float:
        """Seconds of an iteration over ``tokens`` tokens, attention and sequences apart. Memoised."""
        try:
            return self._base_s[tokens]
        except KeyError:
            seconds = self._products(tokens) + self.fixed_s + self.token_s * tokens
            self._base_s[tokens] = seconds
            return seconds

    def _products(self, tokens: int) -> float:
        if tokens >= TOKEN_GRID[-1]:
            return self.products_s[-1] * tokens / TOKEN_GRID[-1]
        right = max(1, bisect_right(TOKEN_GRID, tokens))
        low, high = TOKEN_GRID[right - 1], TOKEN_GRID[right]
        below, above = self.products_s[right - 1], self.products_s[right]
        return below + (above - below) * (tokens - low) / (high - low)

    def iteration_s(self, tokens: int, seqs: int, decode_kv_tokens: int, prefill_pairs: int) -> float:
        """Seconds of one iteration.

        ``decode_kv_tokens``: KV tokens that decoding sequences read, summed; ``prefill_pairs``:
        query-key pairs of the prefill chunks, c·s + c(c+1)/2 for a chunk of c after s tokens.
        """
        return (
            self.base_s(tokens)
            + self.seq_s * seqs
            + self.kv_token_s * decode_kv_tokens
            + self.prefill_pair_s * prefill_pairs
        )

    def scaled(self, factor: float) -> "StepModel":
        """The same engine, ``factor`` times as slow in every term."""
        return replace(
            self,
            products_s=tuple(seconds * factor for seconds in self.products_s),
            fixed_s=self.fixed_s * factor,
            token_s=self.token_s * factor,
            seq_s=self.seq_s * factor,
            kv_token_s=self.kv_token_s * factor,
            prefill_pair_s=self.prefill_pair_s * factor,
        )


def kv_bytes_per_gpu_token(model: ModelSpec, tp: int) -> float:
    """KV bytes of one token on one GPU; KV heads are split over GPUs, or replicated where too few."""
    return model.kv_bytes_per_token / min(tp, model.kv_heads)


def side_bytes_per_token(model: ModelSpec, tp: int) -> float:
    """Bytes that one token moves on one GPU outside of matrix products, in all layers.

    Two norms with residual (read two, write two hidden states, each), the gated activation (read two,
    write one, of the intermediate size), and queries, keys, values read and written once.
    """
    heads = model.heads + 2 * model.kv_heads
    split = 3 * model.intermediate_size + 2 * heads * model.head_dim
    return model.layers * model.dtype_bytes * (8 * model.hidden_size + split / tp)


def step_model(model: ModelSpec, gpu: GpuProfile, tp: int, engine: EngineVersion) -> StepModel:
    """The step times of ``model`` on ``tp`` GPUs under ``engine``."""
    fit = gpu.kernel_fit(model, tp)
    bandwidth, flops = gpu.bandwidth_bytes_per_s.value, gpu.flops.value
    products: list[float] = []
    for tokens, efficiency in zip(TOKEN_GRID, fit.products_efficiency, strict=True):
        roofline = max(model.layer_bytes / bandwidth, tokens * model.flops_per_token / flops) / tp
        products.append(max(roofline / efficiency, products[-1] if products else 0.0))
    layer_s, engine_s = fit.layer_s, engine.iteration_s.value
    token_s = side_bytes_per_token(model, tp) / (bandwidth * fit.side_efficiency)
    if tp > 1:
        link = gpu.link(tp)
        layer_s += 2 * link.latency_s
        engine_s += engine.workers_s.value
        token_s += 2 * model.layers * model.hidden_size * model.dtype_bytes / link.bytes_per_s
    return StepModel(
        products_s=tuple(products),
        fixed_s=model.head_bytes / tp / (bandwidth * fit.head_efficiency) + layer_s * model.layers + engine_s,
        token_s=token_s,
        seq_s=engine.sequence_s.value + fit.sequence_layer_s * model.layers,
        kv_token_s=kv_bytes_per_gpu_token(model, tp) / (bandwidth * fit.kv_efficiency),
        prefill_pair_s=model.flops_per_attention_pair / tp / (flops * fit.attention_efficiency),
    )
