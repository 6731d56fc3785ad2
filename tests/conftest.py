"""Small instances with made-up costs, for tests of the scheduler that need no profile."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from qlm_sim.core.types import InstanceSpec, ModelOnInstance, Request


@dataclass(frozen=True)
class LinearStep:
    """An iteration takes 10 ms and 0.1 ms per token."""

    seq_s: float = 0.0
    kv_token_s: float = 1e-8
    prefill_pair_s: float = 1e-9

    def base_s(self, tokens: int) -> float:
        return 0.01 + 1e-4 * tokens


@pytest.fixture
def make_instance() -> Callable[..., InstanceSpec]:
    def make(
        name: str = "i0",
        models: tuple[str, ...] = ("a",),
        *,
        resident: str | None = "a",
        kv_capacity_tokens: int = 10_000,
        max_num_seqs: int = 4,
        swap_in_s: float = 1.0,
        intake_s: float = 0.0,
    ) -> InstanceSpec:
        profile = ModelOnInstance(
            step=LinearStep(),
            kv_capacity_tokens=kv_capacity_tokens,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=2048,
            max_model_len=8192,
            weight_bytes=10**9,
            kv_bytes_per_token=10**5,
            swap_in_s=swap_in_s,
            load_s=10 * swap_in_s,
            kv_restore_token_s=1e-6,
            intake_s=intake_s,
        )
        return InstanceSpec(
            id=name,
            models=dict.fromkeys(models, profile),
            resident=resident,
            host_bytes=10**11,
            host_models=models,
        )

    return make


@pytest.fixture
def make_request() -> Callable[..., Request]:
    def make(
        name: str,
        *,
        model: str = "a",
        slo_class: str = "interactive",
        slo_s: float = 20.0,
        at: float = 0.0,
        prompt: int = 100,
    ) -> Request:
        return Request(name, model, slo_class, slo_s, at, prompt, max_tokens=4096)

    return make
