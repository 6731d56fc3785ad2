"""The few factors by which a user's engine differs from a shipped profile, and the profile that has them.

Knows profiles and step times; nothing of measurements.
"""

import math
from dataclasses import dataclass, fields, replace

import numpy as np

from qlm_sim.models.engines import EngineVersion
from qlm_sim.models.hardware import TOKEN_GRID, Coefficient, GpuProfile
from qlm_sim.models.specs import ModelSpec

SEQUENCE_S = 5e-6
"""Seconds per sequence that ``Factors.sequence`` scales beside the profile's own, which may be nearly 0."""

LEAST_WAKE_S = 1e-3


@dataclass(frozen=True, slots=True)
class Factors:
    """How many times as long each part takes as the shipped profile says."""

    compute: float = 1.0
    """What the GPU's peak FLOPS bound: large matrix products, prefill attention."""
    memory: float = 1.0
    """What its memory bandwidth bounds: weights, KV cache, norms and activations."""
    iteration: float = 1.0
    """Fixed time per iteration, the engine's own excepted: launches, layer by layer."""
    sequence: float = 1.0
    """Time per sequence of an iteration, beside the engine's own."""
    request: float = 1.0
    """Time per request in the server outside of its engine. No part of a GPU profile."""
    intake: float = 0.0
    """Milliseconds that each request holds the engine up as it comes; 0 where its server has other cores."""


FACTOR_NAMES = tuple(each.name for each in fields(Factors))


def with_factors(
    gpu: GpuProfile, model: ModelSpec, tp: int, factors: Factors, *, name: str, source: str
) -> GpuProfile:
    """The profile that is slower by ``factors``, with kernels for this model and degree alone.

    Efficiencies stay; the peaks that they are shares of change, so that no share exceeds 1. Where bandwidth
    and peak FLOPS change in unlike measure, an iteration is bound by the latter from another number of tokens
    on, and the efficiency's course over tokens, which is worst about there, moves with it.
    """
    kernels = gpu.kernel_fit(model, tp)
    moved = factors.memory / factors.compute
    products = np.interp(
        np.log(TOKEN_GRID) - math.log(moved), np.log(TOKEN_GRID), kernels.products_efficiency
    )
    sequence_s = factors.sequence * (model.layers * kernels.sequence_layer_s + SEQUENCE_S) - SEQUENCE_S

    def slower(peak: Coefficient, factor: float) -> Coefficient:
        return Coefficient(peak.value / factor, "fitted", source)

    return replace(
        gpu,
        name=name,
        title=f"{gpu.title}, fitted to measurements",
        bandwidth_bytes_per_s=slower(gpu.bandwidth_bytes_per_s, factors.memory),
        flops=slower(gpu.flops, factors.compute),
        intake_s=Coefficient(factors.intake * 1e-3, "fitted", source) if factors.intake else None,
        kernels=(
            replace(
                kernels,
                model=model.name,
                tp=tp,
                weight_bytes_per_gpu=model.weight_bytes / tp,
                products_efficiency=tuple(products.tolist()),
                layer_s=kernels.layer_s * factors.iteration,
                sequence_layer_s=max(1e-12, sequence_s / model.layers),
                held_out_mape=None,
                kind="fitted",
                source=source,
            ),
        ),
    )


def with_swaps(gpu: GpuProfile, later_s: float, source: str) -> GpuProfile:
    """The profile whose swaps take so many seconds more, or fewer where negative: in their fixed part."""
    return replace(gpu, wake_s=Coefficient(max(LEAST_WAKE_S, gpu.wake_s.value + later_s), "measured", source))


def request_s(engine: EngineVersion, factors: Factors) -> float:
    """Seconds of one request in the server outside of its engine."""
    return engine.request_s.value * factors.request
