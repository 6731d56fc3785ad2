"""A GPU profile as a TOML file that ``--gpu FILE`` takes."""

from dataclasses import asdict, replace
from typing import Any

from qlm_sim.config.toml import toml_text
from qlm_sim.models.hardware import GpuProfile


def profile_toml(gpu: GpuProfile, *, held_out_mape: float | None, comment: str) -> str:
    """The text of the file; ``comment`` stands above it."""
    kernels = [replace(each, held_out_mape=held_out_mape) for each in gpu.kernels]
    table: dict[str, Any] = {"name": gpu.name, "title": gpu.title, "aliases": []}
    table |= {name: asdict(each) for name, each in gpu.coefficients().items()}
    table["links"] = [asdict(each) for each in gpu.links]
    table["kernels"] = [_plain(asdict(each)) for each in kernels]
    above = "".join(f"# {line}\n" for line in comment.splitlines())
    return above + toml_text(table)


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in table.items()
        if value is not None
    }
