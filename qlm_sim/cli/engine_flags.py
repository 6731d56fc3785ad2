"""The flags that describe one real engine: its GPU, model, version and settings, named as vLLM names them."""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlm_sim.errors import InputError

if TYPE_CHECKING:
    from qlm_sim.core.types import ModelOnInstance
    from qlm_sim.models.engine_config import EngineConfig
    from qlm_sim.models.engines import EngineVersion
    from qlm_sim.models.hardware import GpuProfile
    from qlm_sim.models.specs import ModelSpec

_COUNTS = {
    "--max-num-seqs": "most requests at once (default: vLLM's for the GPU)",
    "--max-num-batched-tokens": "most tokens in one step (default: vLLM's for the GPU)",
    "--block-size": "tokens per KV cache block (default: 16)",
    "--max-model-len": "longest prompt + output in tokens",
    "--num-gpu-blocks": "KV cache blocks (default: what the GPU's memory leaves)",
}


@dataclass(frozen=True, slots=True)
class RealEngine:
    """An engine as the flags describe it."""

    model: "ModelSpec"
    gpu: "GpuProfile"
    tp: int
    version: "EngineVersion"
    config: "EngineConfig"

    def placed(self) -> "ModelOnInstance":
        """The model on its GPUs. Raises InputError where it does not fit."""
        from qlm_sim.models.deployment import deploy

        return deploy(
            self.model, self.gpu, self.tp, self.config, engine=self.version.name, storage_bytes_per_s=2e9
        )

    def described(self) -> dict[str, Any]:
        """What a result says of the engine, as a JSON-able dict."""
        fit = self.gpu.kernel_fit(self.model, self.tp)
        return {
            "gpu": self.gpu.name,
            "model": self.model.name,
            "tp": self.tp,
            "engine": self.version.name,
            "engine_scheduler": self.version.scheduler,
            "max_num_seqs": self.config.max_num_seqs,
            "max_num_batched_tokens": self.config.max_num_batched_tokens,
            "block_size": self.config.block_size,
            "kernels": {"model": fit.model, "tp": fit.tp, "kind": fit.kind, "source": fit.source},
        }


def add_engine_flags(parser: argparse.ArgumentParser, *, gpu_required: bool = True) -> None:
    """Flags of one engine. ``real_engine`` reads them."""
    engine = parser.add_argument_group("the engine, with vLLM's names")
    engine.add_argument(
        "--gpu",
        required=gpu_required,
        metavar="G",
        help="see qlm-sim profile list, or a profile file (.toml)"
        + ("" if gpu_required else " (default: the shipped one that errs least)"),
    )
    engine.add_argument(
        "--model", required=True, metavar="M", help="a model's name, or the path of its config.json"
    )
    engine.add_argument("--tp", type=int, default=1, metavar="N", help="GPUs (default: 1)")
    engine.add_argument("--engine", metavar="V", help="engine version, as vllm-0.11 (which is the default)")
    for flag, words in _COUNTS.items():
        engine.add_argument(flag, type=int, metavar="N", help=words)
    engine.add_argument(
        "--gpu-memory-utilization", type=float, metavar="SHARE", help="share of memory used (default: 0.9)"
    )
    engine.add_argument(
        "--engine-log", metavar="FILE", help="take the KV cache blocks from the engine's log or metrics"
    )


def real_engine(args: argparse.Namespace) -> RealEngine:
    """The engine that the flags describe. Raises InputError."""
    from qlm_sim.models.engine_config import EngineConfig, default_limits
    from qlm_sim.models.engines import DEFAULT_ENGINE, load_engine
    from qlm_sim.models.hardware import load_gpu
    from qlm_sim.models.specs import load_model
    from qlm_sim.validation.engine_log import num_gpu_blocks

    settings = {}
    for flag in ("--tp", *_COUNTS):
        name = flag[2:].replace("-", "_")
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"{flag}: found {value}, expected a whole number at least 1")
        if value is not None and flag != "--tp":
            settings[name] = value
    share = args.gpu_memory_utilization
    if share is not None:
        if not 0 < share <= 1:
            raise InputError(f"--gpu-memory-utilization: found {share}, expected a share above 0, at most 1")
        settings["gpu_memory_utilization"] = share
    if args.engine_log is not None:
        if args.num_gpu_blocks is not None:
            raise InputError("--engine-log: found with --num-gpu-blocks, expected one of the two")
        blocks = num_gpu_blocks(args.engine_log, settings.get("block_size", EngineConfig().block_size))
        settings["num_gpu_blocks"] = blocks
    gpu, version = load_gpu(args.gpu), load_engine(args.engine or DEFAULT_ENGINE)
    limits = default_limits(gpu.title, gpu.memory_bytes.value)
    if (budget := settings.get("max_num_batched_tokens")) is not None:  # a default gives way, as in vLLM
        limits["max_num_seqs"] = min(limits["max_num_seqs"], budget)
    settings["scheduler_reserve_full_isl"] = version.reserves_whole_prompt
    config = EngineConfig(**(limits | settings))
    if config.max_num_batched_tokens < config.max_num_seqs:
        raise InputError(
            f"--max-num-batched-tokens: found {config.max_num_batched_tokens}, expected at least "
            f"max_num_seqs ({config.max_num_seqs}), as vLLM demands"
        )
    return RealEngine(load_model(args.model), gpu, args.tp, version, config)
