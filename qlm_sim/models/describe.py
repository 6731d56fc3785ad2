"""What a profile promises of a model on a GPU, in the figures that people compare.

Computes; prints nothing.
"""

from typing import Any

from qlm_sim.models.deployment import deploy
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.models.engines import DEFAULT_ENGINE, load_engine
from qlm_sim.models.hardware import GpuProfile
from qlm_sim.models.specs import ModelSpec
from qlm_sim.models.step_time import kv_bytes_per_gpu_token

GIB = 2**30
BATCHES = (1, 8, 32, 128)


def describe(
    model: ModelSpec,
    gpu: GpuProfile,
    tp: int,
    config: EngineConfig,
    *,
    engine: str = DEFAULT_ENGINE,
    storage_bytes_per_s: float = 2e9,
    context_tokens: int = 512,
) -> dict[str, Any]:
    """Sizes, rates and swap times as a JSON-able dict, with the roofline beside each rate.

    Decode: tokens/s of a batch whose sequences hold ``context_tokens`` each; a batch that the KV cache
    cannot hold has None. Prefill: tokens/s of one iteration over max_num_batched_tokens of one prompt.
    Roofline: the same work at the data sheet's bandwidth and FLOPS, whichever is slower, without overhead.
    """
    placed = deploy(model, gpu, tp, config, engine=engine, storage_bytes_per_s=storage_bytes_per_s)
    fit, version = gpu.kernel_fit(model, tp), load_engine(engine)
    bandwidth, flops = gpu.bandwidth_bytes_per_s.value, gpu.flops.value * tp
    weights = (model.layer_bytes + model.head_bytes) / tp

    def decode(batch: int) -> dict[str, float | None]:
        kv_tokens = batch * context_tokens
        if kv_tokens > placed.kv_capacity_tokens:
            return {"tokens_per_s": None, "roofline_tokens_per_s": None}
        step = placed.step
        seconds = step.base_s(batch) + batch * step.seq_s + kv_tokens * step.kv_token_s
        read_s = (weights + kv_tokens * kv_bytes_per_gpu_token(model, tp)) / bandwidth
        compute_s = batch * (model.flops_per_token + 2 * model.head_parameters) / flops
        return {"tokens_per_s": batch / seconds, "roofline_tokens_per_s": batch / max(read_s, compute_s)}

    chunk = min(config.max_num_batched_tokens, placed.max_model_len)
    pairs = chunk * (chunk + 1) // 2
    step = placed.step
    prefill_s = step.base_s(chunk) + step.seq_s + pairs * step.prefill_pair_s
    prefill_flops = chunk * model.flops_per_token + pairs * model.flops_per_attention_pair
    return {
        "model": model.name,
        "model_source": model.source,
        "gpu": gpu.name,
        "tp": tp,
        "engine": version.name,
        "fit": {
            "model": fit.model,
            "tp": fit.tp,
            "kind": fit.kind,
            "source": fit.source,
            "held_out_mape": fit.held_out_mape,
        },
        "weights_gib": model.weight_bytes / GIB,
        "kv_capacity_tokens": placed.kv_capacity_tokens,
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "max_model_len": placed.max_model_len,
        "context_tokens": context_tokens,
        "decode": {str(batch): decode(batch) for batch in BATCHES if batch <= config.max_num_seqs},
        "prefill": {
            "tokens": chunk,
            "tokens_per_s": chunk / prefill_s,
            "roofline_tokens_per_s": chunk / max(prefill_flops / flops, weights / bandwidth),
        },
        "swap_in_s": placed.swap_in_s,
        "load_s": placed.load_s,
    }
