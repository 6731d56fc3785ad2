"""The nouns that every part of QLM shares: requests, SLO classes, instances, and what they cost.

Knows no clock, no engine and no file. Times are seconds since the run's start.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

from msgspec import Struct


@dataclass(frozen=True, slots=True)
class SloClass:
    """A service level: the latency targets that requests of one class share.

    A target of None is not promised. A request attains its SLO when it finishes and meets every
    target that is set. ``weight`` is what one missed request of the class costs the scheduler,
    relative to the others.
    """

    name: str
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    weight: float = 1.0

    @property
    def first_token_only(self) -> bool:
        """Nothing is promised beyond the first token."""
        return self.tpot_s is None and self.e2e_s is None


class Request(Struct, frozen=True, gc=False):
    """What a scheduler may know of a request. Its true output length is not among that."""

    id: str
    model: str
    slo_class: str
    slo_s: float
    """Seconds from arrival within which the first token is due."""
    arrived_at: float
    prompt_tokens: int
    max_tokens: int
    """Most tokens that may be generated (OpenAI's ``max_tokens``), not the true length."""

    @property
    def deadline(self) -> float:
        """Absolute time at which the first token is due."""
        return self.arrived_at + self.slo_s


class Lso(StrEnum):
    """The LLM serving operations (Patke et al., section 4) that a run may use."""

    PULLING = "pulling"
    EVICTION = "eviction"
    SWAPPING = "swapping"
    BALANCING = "balancing"


@runtime_checkable
class StepCost(Protocol):
    """Seconds of one engine iteration: what a profile promises of a model on an instance.

    step = base_s(tokens) + seq_s * sequences + kv_token_s * (KV tokens read by decoding)
           + prefill_pair_s * (query-key pairs computed by prefill)
    """

    @property
    def seq_s(self) -> float: ...

    @property
    def kv_token_s(self) -> float: ...

    @property
    def prefill_pair_s(self) -> float: ...

    def base_s(self, tokens: int) -> float:
        """Seconds of an iteration that computes ``tokens`` tokens, attention and sequences apart."""
        ...


@dataclass(frozen=True, slots=True)
class ModelOnInstance:
    """What the scheduler believes of one model on one instance, as the profile tells it."""

    step: StepCost
    kv_capacity_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    weight_bytes: int
    kv_bytes_per_token: int
    swap_in_s: float
    """Seconds to load the weights from host memory onto the GPU."""
    load_s: float
    """Seconds to load the weights from storage, where host memory does not hold them."""
    kv_restore_token_s: float
    """Seconds to move one token's KV between GPU and host memory, either way."""
    intake_s: float = 0.0
    """Seconds for which each request that the engine is given holds it up, beside the steps for its tokens: 0
    unless its server runs on its own cores."""


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """One engine that can hold one model at a time."""

    id: str
    models: Mapping[str, ModelOnInstance]
    """Every model that the instance may serve, by name."""
    resident: str | None
    """The model that is loaded at the start."""
    host_bytes: int
    """Host memory for model weights and evicted KV, in bytes."""
    host_models: tuple[str, ...]
    """Models whose weights lie in host memory at the start, least recently used first."""
