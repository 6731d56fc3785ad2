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


TOKEN_GRID = (1, 4, 16, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
"""Tokens of an iteration at which ``KernelFit.products_efficiency`` is given."""


@dataclass(frozen=True, slots=True)
class KernelFit:
    """How well the kernels of one model use one GPU, at one tensor-parallel degree.

    Efficiencies are shares of the GPU's peak, so they carry over to models of similar size.
    """

    model: str
    tp: int
    weight_bytes_per_gpu: float
    """Weights that one GPU holds: the size by which a model that was not fitted finds its nearest."""
    products_efficiency: tuple[float, ...]
    """Share of the roofline, max(bytes/bandwidth, FLOPs/peak), that the layers' matrix products reach
    together, at each of ``TOKEN_GRID``."""
    head_efficiency: float
    """Share of the memory bandwidth reached when reading the language-model head."""
    kv_efficiency: float
    """Share of the memory bandwidth reached when decoding reads the KV cache."""
    attention_efficiency: float
    """Share of the peak FLOPS reached by prefill attention on its query-key pairs."""
    side_efficiency: float
    """Share of the memory bandwidth reached by what each token moves outside of products and pairs."""
    layer_s: float
    """Seconds per layer that no bandwidth removes: launches, and attention's least time."""
    sequence_layer_s: float
    """Seconds per layer and sequence in attention, however short the sequence."""
    held_out_mape: float | None
    """Mean absolute relative error of iterations that were kept out of the fit; None for estimates."""
    kind: str
    source: str


@dataclass(frozen=True, slots=True)
class Link:
    """One all-reduce over ``tp`` GPUs: latency_s + message bytes / bytes_per_s."""

    tp: int
    latency_s: float
    bytes_per_s: float
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
    host_bytes_per_s: Coefficient
    """Host to GPU copy from pinned memory, one GPU alone."""
    host_total_bytes_per_s: Coefficient
    """The same, summed over GPUs that copy together."""
    wake_s: Coefficient
    """Fixed seconds of a model swap from host memory: allocation and first step."""
    links: tuple[Link, ...]
    kernels: tuple[KernelFit, ...]
    intake_s: Coefficient | None = None
    """Seconds that each request holds the engine up as it comes; None where its server has other cores."""

    def coefficients(self) -> Mapping[str, Coefficient]:
        """Every scalar figure of the profile, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Coefficient)}

    def link(self, tp: int) -> Link:
        """The all-reduce over ``tp`` GPUs. Raises InputError where the profile has none."""
        for link in self.links:
            if link.tp == tp:
                return link
        known = ", ".join(str(link.tp) for link in self.links)
        raise InputError(f"tp = {tp} is not known of {self.name}; known: 1, {known}")

    def kernel_fit(self, model: ModelSpec, tp: int) -> KernelFit:
        """The fit of this model at this degree, or else the one whose weights per GPU are nearest in
        ratio."""
        size = model.weight_bytes / tp
        return min(
            self.kernels,
            key=lambda fit: (
                (fit.model, fit.tp) != (model.name, tp),
                abs(math.log(fit.weight_bytes_per_gpu / size)),
                fit.tp,
                fit.model,
            ),
        )


@cache
def _file_names() -> tuple[str, ...]:
    """Names of the shipped files: a profile's name in lower case, and .toml."""
    entries = files("qlm_sim.hardware_profiles").iterdir()
    return tuple(sorted(entry.name for entry in entries if entry.name.endswith(".toml")))


@cache
def _shipped(file_name: str) -> tuple[GpuProfile, tuple[str, ...]]:
    """A shipped profile, and its aliases in lower case."""
    table = tomllib.loads(files("qlm_sim.hardware_profiles").joinpath(file_name).read_text("utf-8"))
    return _parse(table, file_name), tuple(alias.lower() for alias in table["aliases"])


def gpu_names() -> tuple[str, ...]:
    """Names of the shipped GPU profiles."""
    return tuple(_shipped(file_name)[0].name for file_name in _file_names())


def load_gpu(name_or_path: str | Path) -> GpuProfile:
    """The shipped profile of that name or alias (case and blanks do not matter), or that of a TOML file."""
    name = str(name_or_path)
    if name.endswith(".toml"):
        return _read(Path(name_or_path))
    wanted = "-".join(name.lower().replace("_", " ").replace("-", " ").split())
    if f"{wanted}.toml" in _file_names():  # reads this one alone
        return _shipped(f"{wanted}.toml")[0]
    found = [gpu for gpu, aliases in map(_shipped, _file_names()) if wanted in aliases]
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
    scalars = {}
    names = [*_SCALARS, "intake_s"] if "intake_s" in table else _SCALARS
    _keys(table, {"name", "title", "aliases", "links", "kernels", *names}, where)
    for name in names:
        entry = table[name]
        if not isinstance(entry, dict):
            raise InputError(
                f'{where}: {name} = {entry!r}; wanted {{ value = ..., kind = "...", source = "..." }}'
            )
        _keys(entry, {"value", "kind", "source"}, f"{where}: {name}")
        scalars[name] = Coefficient(_positive(entry, "value", f"{where}: {name}"), **_origin(entry, where))
    return GpuProfile(
        name=table["name"],
        title=table["title"],
        links=tuple(_link(entry, f"{where}: links[{i}]") for i, entry in enumerate(table["links"])),
        kernels=tuple(
            _kernel_fit(entry, f"{where}: kernels[{i}]") for i, entry in enumerate(table["kernels"])
        ),
        **scalars,
    )


def _link(table: Mapping[str, Any], where: str) -> Link:
    _keys(table, set(Link.__annotations__), where)
    return Link(
        tp=int(_positive(table, "tp", where)),
        latency_s=_positive(table, "latency_s", where),
        bytes_per_s=_positive(table, "bytes_per_s", where),
        **_origin(table, where),
    )


def _kernel_fit(table: Mapping[str, Any], where: str) -> KernelFit:
    table = {"held_out_mape": None, **table}
    _keys(table, set(KernelFit.__annotations__), where)
    curve = table["products_efficiency"]
    if not isinstance(curve, list) or len(curve) != len(TOKEN_GRID):
        raise InputError(
            f"{where}: products_efficiency = {curve!r}; wanted {len(TOKEN_GRID)} shares, "
            f"at {TOKEN_GRID} tokens"
        )
    shares = {f"products_efficiency[{i}]": share for i, share in enumerate(curve)}
    shares |= {
        key: value for key, value in table.items() if key.endswith("_efficiency") and value is not curve
    }
    for key in shares:
        if _positive(shares, key, where) > 1:
            raise InputError(f"{where}: {key} = {shares[key]}; a share of the GPU's peak is at most 1")
    return KernelFit(
        model=table["model"],
        tp=int(_positive(table, "tp", where)),
        weight_bytes_per_gpu=_positive(table, "weight_bytes_per_gpu", where),
        products_efficiency=tuple(curve),
        head_efficiency=table["head_efficiency"],
        kv_efficiency=table["kv_efficiency"],
        attention_efficiency=table["attention_efficiency"],
        side_efficiency=table["side_efficiency"],
        layer_s=_positive(table, "layer_s", where),
        sequence_layer_s=_positive(table, "sequence_layer_s", where),
        held_out_mape=table["held_out_mape"],
        **_origin(table, where),
    )


def _keys(table: Mapping[str, Any], wanted: set[str], where: str) -> None:
    for key in table:
        if key not in wanted:
            raise InputError(f"{where}: key {key!r} is not known; known: {', '.join(sorted(wanted))}")
    if missing := wanted - set(table):
        raise InputError(f"{where}: missing: {', '.join(sorted(missing))}")


def _positive(table: Mapping[str, Any], key: str, where: str) -> float:
    value = table[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{where}: {key} = {value!r}; a number above 0 is wanted")
    return float(value)


def _origin(table: Mapping[str, Any], where: str) -> dict[str, str]:
    kind, source = table["kind"], table["source"]
    if kind not in KINDS:
        raise InputError(f"{where}: kind = {kind!r}; one of {', '.join(KINDS)} is wanted")
    if not isinstance(source, str) or not source.strip():
        raise InputError(f"{where}: source is empty; say where the figure comes from")
    return {"kind": kind, "source": source}
