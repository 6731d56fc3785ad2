"""The ledger of one instance: what we sent there, and what it last told us.

``running``, ``model`` and ``swapping_to`` are synchronous: they change with our own orders and the
engine's answers. ``reported`` is the engine's last periodic report, as old as the reporting interval.
Between the two, the KV cache in use is estimated from the orders, so it is never stale.
"""

import math
from collections.abc import Mapping

from qlm_sim.core.events import EngineReported
from qlm_sim.core.host import HostModels
from qlm_sim.core.lifecycle import Tracked
from qlm_sim.core.types import InstanceSpec, ModelOnInstance

SWAP_WEIGHT = 0.5
"""What the last swap counts for among those measured before."""


class InstanceLedger:
    """Belief about one engine. Changed by QueueManager alone."""

    def __init__(self, spec: InstanceSpec) -> None:
        self.spec = spec
        self.id = spec.id
        self.model: str | None = spec.resident
        """The model that is loaded and serves; None before the first load."""
        self.leaving_for: str | None = None
        """The model to swap to once what was evicted for it is off the engine."""
        self.swapping_to: str | None = None
        self.ready_at = 0.0
        """When the swap under way should be over."""
        self.running: dict[str, Tracked] = {}
        self.evicting = 0
        """How many of ``running`` have been ordered back."""
        self.context_tokens = 0
        """Sum over running of the tokens they brought along (prompt + generated before)."""
        self.prefilling_tokens = 0
        """Of those, the ones whose prefill has not been reported done."""
        self.decoding = 0
        self.loaded_at = -math.inf
        """When the loaded model began to serve."""
        self._measured_swap_s: dict[tuple[str, bool], float] = {}
        """By model and whether its weights lay in host memory."""
        self.host = HostModels(spec.host_bytes, [(m, spec.models[m].weight_bytes) for m in spec.host_models])
        self.reported: EngineReported | None = None

    def next_model(self) -> str | None:
        """The model that will be loaded once the orders under way are carried out."""
        return self.leaving_for or self.swapping_to or self.model

    @property
    def profile(self) -> ModelOnInstance | None:
        """The profile of the loaded model."""
        return self.spec.models[self.model] if self.model is not None else None

    def swap_s(self, model: str) -> float:
        """Seconds that loading ``model`` would take from where its weights lie now.

        As measured, once it has been loaded from there; as the profile says, before.
        """
        in_host = self.host.holds(model)
        measured = self._measured_swap_s.get((model, in_host))
        if measured is not None:
            return measured
        profile = self.spec.models[model]
        return profile.swap_in_s if in_host else profile.load_s

    def swapped(self, model: str, swap_s: float) -> None:
        """``model`` is loaded; it took ``swap_s`` seconds from where its weights lay."""
        place = model, self.host.holds(model)
        before = self._measured_swap_s.get(place, swap_s)
        self._measured_swap_s[place] = before + SWAP_WEIGHT * (swap_s - before)

    def prefill_is_full(self, model: str) -> bool:
        """Whether prompts under way fill an iteration, so that one more would only wait in the engine."""
        return self.prefilling_tokens >= self.spec.models[model].max_num_batched_tokens

    def pulled(self, item: Tracked, now: float) -> None:
        item.pulled_at = now
        self.running[item.request.id] = item
        context = item.pulled_context = item.request.prompt_tokens + item.output_tokens
        self.context_tokens += context
        self.prefilling_tokens += context

    def began_decoding(self, item: Tracked, now: float) -> None:
        """The item's prefill is done."""
        if item.first_token_at is None:
            item.first_token_at = now
            self.prefilling_tokens -= item.pulled_context
            self.decoding += 1

    def left(self, item: Tracked) -> None:
        """The item is no longer on the engine."""
        del self.running[item.request.id]
        self.context_tokens -= item.pulled_context
        if item.first_token_at is None:
            self.prefilling_tokens -= item.pulled_context
        else:
            self.decoding -= 1
            item.first_token_at = None


def by_model(ledgers: Mapping[str, InstanceLedger]) -> dict[str, list[InstanceLedger]]:
    """The instances that may serve each model, in their order."""
    capable: dict[str, list[InstanceLedger]] = {}
    for ledger in ledgers.values():
        for model in ledger.spec.models:
            capable.setdefault(model, []).append(ledger)
    return capable
