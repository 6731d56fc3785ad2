"""GPU profiles: what each GPU is, how well its kernels use it, and where every figure comes from.

Reads the files of ``qlm_sim/hardware_profiles`` (or a user's own). Knows models by name and size
only; what a step costs is ``step_time``'s business.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from qlm_sim.errors import InputError
from qlm_sim.models.specs import ModelSpec

KINDS = ("datasheet", "measured", "fitted", "estimate")
"""How a figure was come by, the weakest last."""


@dataclass(frozen=True, slots=True)
class Coefficient:
    """One figure, how it was come by (one of ``KINDS``), and its source."""

    value: float
    kind: str
    source: str


@dataclass(frozen=True, slots=True)
class KernelFit:
    """Efficiencies of one model's kernels on one GPU at one tensor-parallel degree."""

    model: str
    tp: int
    weight_bytes_per_gpu: float
    """Weights that one GPU holds: the size by which a model that was not fitted finds its nearest."""
    weights_efficiency: float
    """Share of the memory bandwidth reached when reading weights (eb)."""
    flops_efficiency: float
    """Share of the peak FLOPS reached by matrix products (ef)."""
    kv_efficiency: float
    """Share of the memory bandwidth reached when reading the KV cache (ek)."""
    layer_s: float
    """Seconds per layer that no amount of bandwidth removes: launches, norms, all-reduce latency."""
    tp_token_s: float
    """Seconds per token and iteration spent in all-reduces (t1); 0 without tensor parallelism."""
    held_out_mape: float | None
    """Mean absolute relative error on shapes that were kept out of the fit; None for estimates."""
    kind: str
    source: str


@dataclass(frozen=True)
class GpuProfile:
    """One GPU. Sizes in bytes, rates in bytes/s or FLOP/s, times in seconds."""

    name: str
    title: str
    memory_bytes: Coefficient
    """Memory that CUDA reports as total."""
    runtime_bytes: Coefficient
    """Memory that CUDA's context and libraries take beside weights, activations and KV cache."""
    tp_runtime_bytes: Coefficient
    """Further memory for communication buffers where tp > 1."""
    bandwidth_bytes_per_s: Coefficient
    flops: Coefficient
    """Peak dense 16-bit matrix FLOP/s with 32-bit accumulation."""
    attention_flops_share: Coefficient
    """Prefill attention's FLOP/s relative to that of matrix products."""
    link_bytes_per_s: Coefficient
    """All-reduce bandwidth between GPUs of one instance."""
    host_bytes_per_s: Coefficient
    """Host to GPU copy from pinned memory, one GPU alone."""
    host_total_bytes_per_s: Coefficient
    """The same, summed over GPUs that copy together."""
    wake_s: Coefficient
    """Fixed seconds of a model swap from host memory: allocation and first step."""
    kernels: tuple[KernelFit, ...]

    def coefficients(self) -> Mapping[str, Coefficient]:
        """Every scalar figure of the profile, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Coefficient)}

    def kernel_fit(self, model: ModelSpec, tp: int) -> KernelFit:
        """The fit of this model at this degree, or the nearest there is.

        Nearest: of the same degree, the fitted model whose weights per GPU are closest in ratio. A
        GPU without fits of this degree takes its tp = 1 fits, with the all-reduce priced by
        ``link_bytes_per_s``: 2 all-reduces per layer, each moving 2(tp-1)/tp of a token's
        activations.
        """
        size = model.weight_bytes / tp
        same = [fit for fit in self.kernels if fit.tp == tp]
        for fit in same:
            if fit.model == model.name:
                return fit
        candidates = same or [fit for fit in self.kernels if fit.tp == 1]
        nearest = min(candidates, key=lambda fit: (abs(math.log(fit.weight_bytes_per_gpu / size)), fit.model))
        if same:
            return nearest
        moved = 2 * model.layers * 2 * (tp - 1) / tp * model.hidden_size * model.dtype_bytes
        return KernelFit(
            model=nearest.model,
            tp=tp,
            weight_bytes_per_gpu=size,
            weights_efficiency=nearest.weights_efficiency,
            flops_efficiency=nearest.flops_efficiency,
            kv_efficiency=nearest.kv_efficiency,
            layer_s=nearest.layer_s,
            tp_token_s=moved / self.link_bytes_per_s.value,
            held_out_mape=None,
            kind="estimate",
            source=f"tp 1 fit of {nearest.model}; all-reduce at link_bytes_per_s "
            f"({self.link_bytes_per_s.source})",
        )


@cache
def _shipped() -> dict[str, tuple[GpuProfile, tuple[str, ...]]]:
    """Profiles by name, each with its aliases in lower case."""
    profiles = {}
    for entry in sorted(files("qlm_sim.hardware_profiles").iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".toml"):
            table = tomllib.loads(entry.read_text("utf-8"))
            profile = _parse(table, entry.name)
            aliases = tuple(alias.lower() for alias in (profile.name, *table["aliases"]))
            profiles[profile.name] = (profile, aliases)
    return profiles


def gpu_names() -> tuple[str, ...]:
    """Names of the shipped GPU profiles."""
    return tuple(_shipped())


def load_gpu(name_or_path: str | Path) -> GpuProfile:
    """The shipped profile of that name or alias (case does not matter), or that of a TOML file."""
    name = str(name_or_path)
    if name.endswith(".toml"):
        return _read(Path(name_or_path))
    wanted = name.lower()
    found = [profile for profile, aliases in _shipped().values() if wanted in aliases]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"GPU {name!r} is ambiguous; one of: {', '.join(gpu.name for gpu in found)}")
    raise InputError(
        f"GPU {name!r} is not known; one of: {', '.join(gpu_names())}, or the path of a profile (.toml)"
    )


def _read(path: Path) -> GpuProfile:
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as TOML: {error}") from error
    return _parse(table, str(path))


_SCALARS = tuple(name for name, kind in GpuProfile.__annotations__.items() if kind is Coefficient)


def _parse(table: Mapping[str, Any], where: str) -> GpuProfile:
    known = {"name", "title", "aliases", "kernels", *_SCALARS}
    for key in table:
        if key not in known:
            raise InputError(f"{where}: key {key!r} is not known; known: {', '.join(sorted(known))}")
    for key in ("name", "title", "kernels", *_SCALARS):
        if key not in table:
            raise InputError(f"{where}: key {key!r} is missing")
    scalars = {key: _coefficient(table[key], f"{where}: {key}") for key in _SCALARS}
    kernels = tuple(
        _kernel_fit(entry, f"{where}: kernels[{index}]") for index, entry in enumerate(table["kernels"])
    )
    if not any(fit.tp == 1 for fit in kernels):
        raise InputError(f"{where}: kernels: none has tp = 1; at least one must")
    return GpuProfile(name=table["name"], title=table["title"], kernels=kernels, **scalars)


def _coefficient(table: Any, where: str) -> Coefficient:
    if not isinstance(table, dict) or set(table) != {"value", "kind", "source"}:
        raise InputError(f'{where}: found {table!r}; wanted {{ value = ..., kind = "...", source = "..." }}')
    return Coefficient(_positive(table["value"], where), _kind(table, where), _source(table, where))


def _kernel_fit(table: Mapping[str, Any], where: str) -> KernelFit:
    optional = {"held_out_mape", "tp_token_s"}
    wanted = set(KernelFit.__annotations__)
    if (missing := wanted - optional - set(table)) or (set(table) - wanted):
        raise InputError(
            f"{where}: keys missing: {', '.join(sorted(missing)) or 'none'}; "
            f"not known: {', '.join(sorted(set(table) - wanted)) or 'none'}"
        )
    _kind(table, where)
    _source(table, where)
    for key in ("weights_efficiency", "flops_efficiency", "kv_efficiency"):
        if not 0 < _positive(table[key], f"{where}.{key}") <= 1:
            raise InputError(f"{where}: {key} = {table[key]}; a share above 0 and at most 1 is wanted")
    for key in ("tp", "weight_bytes_per_gpu", "layer_s"):
        _positive(table[key], f"{where}.{key}")
    return KernelFit(**{"held_out_mape": None, "tp_token_s": 0.0, **table})


def _positive(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InputError(f"{where}: {value!r}; a number above 0 is wanted")
    return float(value)


def _kind(table: Mapping[str, Any], where: str) -> str:
    if table["kind"] not in KINDS:
        raise InputError(f"{where}: kind = {table['kind']!r}; one of {', '.join(KINDS)} is wanted")
    return str(table["kind"])


def _source(table: Mapping[str, Any], where: str) -> str:
    if not isinstance(table["source"], str) or not table["source"].strip():
        raise InputError(f"{where}: source is empty; say where the figure comes from")
    return table["source"]
