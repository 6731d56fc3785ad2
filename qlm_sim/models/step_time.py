"""Seconds of one engine iteration, from a model's dimensions and a GPU's efficiencies.

    T = ((W/(BW·eb))^8 + (FLOPs/(F·ef))^8)^(1/8) + head/(BW·eb) + KV bytes/(BW·ek)
        + attention prefill/(share·F·ef) + layer_s·layers + t1·tokens (tp > 1 only)
        + engine overhead per iteration and per sequence

W: bytes of the layers' weights; FLOPs: 2 x their parameters x tokens, where tokens are all tokens of the
iteration (the prefill chunks, and one per decoding sequence); all of it per GPU, divided by tp. The 8th
power rounds the corner between the bandwidth-bound and the compute-bound regime, which a maximum would
leave sharp. KV heads that tp exceeds are replicated, as engines do.
"""

from dataclasses import dataclass, field, replace

from qlm_sim.models.engines import EngineVersion
from qlm_sim.models.hardware import GpuProfile
from qlm_sim.models.specs import ModelSpec

CORNER = 8.0


@dataclass(frozen=True, slots=True)
class StepModel:
    """The terms of the step time of one model on one instance, in seconds. A ``StepCost``."""

    weights_s: float
    """Reading the layers' weights once."""
    token_flops_s: float
    """Computing one token's matrix products."""
    fixed_s: float
    """Per iteration: head, per-layer overhead, engine overhead."""
    token_s: float
    """Per token: all-reduce (tp > 1)."""
    seq_s: float
    kv_token_s: float
    prefill_pair_s: float
    _base_s: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def base_s(self, tokens: int) -> float:
        """Seconds of an iteration over ``tokens`` tokens, attention and sequences apart. Memoised."""
        known = self._base_s.get(tokens)
        if known is not None:
            return known
        larger = max(self.weights_s, self.token_flops_s * tokens)
        smaller = min(self.weights_s, self.token_flops_s * tokens)
        products = larger * (1 + (smaller / larger) ** CORNER) ** (1 / CORNER)
        seconds = products + self.fixed_s + self.token_s * tokens
        self._base_s[tokens] = seconds
        return seconds

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
            weights_s=self.weights_s * factor,
            token_flops_s=self.token_flops_s * factor,
            fixed_s=self.fixed_s * factor,
            token_s=self.token_s * factor,
            seq_s=self.seq_s * factor,
            kv_token_s=self.kv_token_s * factor,
            prefill_pair_s=self.prefill_pair_s * factor,
        )


def kv_bytes_per_gpu_token(model: ModelSpec, tp: int) -> float:
    """KV bytes of one token on one GPU; KV heads are split over GPUs, or replicated where too few."""
    return model.kv_bytes_per_token / min(tp, model.kv_heads)


def step_model(model: ModelSpec, gpu: GpuProfile, tp: int, engine: EngineVersion) -> StepModel:
    """The step times of ``model`` on ``tp`` GPUs under ``engine``."""
    fit = gpu.kernel_fit(model, tp)
    weights_rate = gpu.bandwidth_bytes_per_s.value * fit.weights_efficiency * tp
    flops = gpu.flops.value * fit.flops_efficiency * tp
    kv_rate = gpu.bandwidth_bytes_per_s.value * fit.kv_efficiency
    return StepModel(
        weights_s=model.layer_bytes / weights_rate,
        token_flops_s=model.flops_per_token / flops,
        fixed_s=model.head_bytes / weights_rate + fit.layer_s * model.layers + engine.iteration_s.value,
        token_s=fit.tp_token_s if tp > 1 else 0.0,
        seq_s=engine.sequence_s.value,
        kv_token_s=kv_bytes_per_gpu_token(model, tp) / kv_rate,
        prefill_pair_s=model.flops_per_attention_pair / (flops * gpu.attention_flops_share.value),
    )
