"""Models as architectures: what a dense decoder weighs, caches and computes, from its dimensions.

Knows nothing of GPUs or engines. A model is shipped by name (llms.toml) or read from a Hugging Face
``config.json``.
"""

import json
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from qlm_sim.errors import InputError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Hugging Face architectures that ``ModelSpec`` describes to the last matrix."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder of Llama's shape: grouped-query attention and a gated MLP in every layer."""

    name: str
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_model_len: int
    """Longest prompt + output in tokens that the model was made for."""
    tied_embeddings: bool = False
    dtype_bytes: int = 2
    """Bytes of one weight and of one number in the KV cache."""
    sliding_window: int | None = None
    """Tokens that attention looks back. Costs and memory count full attention, an upper bound."""
    qkv_bias: bool = False
    source: str = ""

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: Q, O (hidden x heads*head_dim), K, V (hidden x kv_heads*head_dim),
        gate, up, down (hidden x intermediate), two norms, and the biases of Q, K, V where they exist."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.hidden_size * (query + key)
        bias = query + 2 * key if self.qkv_bias else 0
        return attention + bias + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Parameters of the language-model head: vocabulary x hidden, whether tied or not."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters: layers, embedding, head (unless tied to the embedding) and final norm."""
        embeddings = self.head_parameters * (1 if self.tied_embeddings else 2)
        return self.layers * self.layer_parameters + embeddings + self.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights: parameters x dtype_bytes."""
        return self.parameters * self.dtype_bytes

    @property
    def layer_bytes(self) -> int:
        """Bytes of the weights of all layers, which every iteration reads once."""
        return self.layers * self.layer_parameters * self.dtype_bytes

    @property
    def head_bytes(self) -> int:
        """Bytes of the head, which every iteration that samples a token reads once."""
        return self.head_parameters * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the KV cache of one token: K and V x layers x kv_heads x head_dim x dtype_bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of one token through the layers: 2 x their parameters.

        Attention over the context comes on top (``flops_per_attention_pair``), and the head is
        computed for sampled tokens only (2 x ``head_parameters``).
        """
        return 2 * self.layers * self.layer_parameters

    @property
    def flops_per_attention_pair(self) -> int:
        """Operations of one query-key pair in all layers: QK and AV, 2 x head_dim each, per head."""
        return 4 * self.layers * self.heads * self.head_dim


@cache
def _shipped() -> dict[str, ModelSpec]:
    return {
        name: ModelSpec(
            name=name,
            source=f"Hugging Face config of {table['repository']}",
            **{key: value for key, value in table.items() if key not in ("repository", "alike")},
        )
        for name, table in _tables().items()
    }


@cache
def _repositories() -> dict[str, str]:
    """The shipped model of each Hugging Face repository, in lower case."""
    return {
        repository.lower(): name
        for name, table in _tables().items()
        for repository in (table["repository"], *table.get("alike", ()))
    }


@cache
def _tables() -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("qlm_sim.models").joinpath("llms.toml").read_text("utf-8"))


def model_names() -> tuple[str, ...]:
    """Names of the shipped models."""
    return tuple(_shipped())


def load_model(name_or_path: str | Path) -> ModelSpec:
    """The shipped model of that name or Hugging Face repository, or that of a config.json of Hugging Face.

    In names case does not matter.
    A path is a config.json or the directory that holds one. Raises InputError.
    """
    name = str(name_or_path)
    if spec := _shipped().get(_repositories().get(name.lower(), name.lower())):
        return spec
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return _read_hugging_face(path)
    if path.suffix == ".json":
        raise InputError(f"{path}: no such file; a model's config.json is wanted")
    raise InputError(
        f"model {name!r} is not known; shipped: {', '.join(model_names())}; "
        "any other needs the path of its Hugging Face config.json"
    )


def _read_hugging_face(path: Path) -> ModelSpec:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds no JSON object; a Hugging Face config.json is wanted")
    found = config.get("architectures") or ["none"]
    architecture = next((name for name in found if name in ARCHITECTURES), None)
    if architecture is None:
        raise InputError(
            f"{path}: architecture {', '.join(map(str, found))} is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    if config.get("quantization_config"):
        raise InputError(f"{path}: quantization_config: quantised weights are not supported, 16-bit are")

    def size(key: str, default: int | None = None) -> int:
        value: Any = config.get(key)
        if value is None:
            value = default
        if value is None:
            raise InputError(f"{path}: key {key!r} is missing; {architecture} needs it")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{path}: {key} = {value!r}; a whole number above 0 is wanted")
        return value

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    window = config.get("sliding_window")
    if config.get("use_sliding_window") is False:
        window = None
    named = str(config.get("_name_or_path") or "").rstrip("/").split("/")[-1]
    return ModelSpec(
        name=named or (path.resolve().parent.name if path.name == "config.json" else path.stem),
        layers=size("num_hidden_layers"),
        hidden_size=hidden,
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        intermediate_size=size("intermediate_size"),
        vocab_size=size("vocab_size"),
        max_model_len=size("max_position_embeddings"),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        sliding_window=window,
        qkv_bias=architecture == "Qwen2ForCausalLM" or bool(config.get("attention_bias", False)),
        source=f"Hugging Face config {path.name}",
    )
