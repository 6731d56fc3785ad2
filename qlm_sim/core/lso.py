"""The LSO agent: makes an instance do what its queue wants, by pulling, evicting and swapping.

Level-triggered: it compares what is with what should be each time it is called, so a lost or late
event only delays it. What an engine gets is only what fits now (unless the policy does not hold
back), because what waits inside an engine has left our control.
"""

from qlm_sim.core.actions import Action, Evict, Pull, SwapModel
from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lifecycle import EVICTING, RUNNING, Tracked
from qlm_sim.core.policy import Estimator, Policy
from qlm_sim.core.types import Lso, ModelOnInstance


class LsoAgent:
    """One agent serves all instances: it keeps nothing between two calls."""

    def __init__(self, policy: Policy, estimator: Estimator, allowed: frozenset[Lso]) -> None:
        self._policy = policy
        self._estimator = estimator
        self._holds_back = policy.holds_back and Lso.PULLING in allowed
        self._may_evict = Lso.EVICTION in allowed
        self._may_swap = Lso.SWAPPING in allowed

    def reconcile(self, ledger: InstanceLedger, now: float, actions: list[Action]) -> None:
        """Append the orders that bring the instance in line with its queue."""
        if ledger.swapping_to is not None:
            return
        if ledger.leaving_for is not None:
            # Committed: what was evicted must not be pulled again before the swap.
            self._switch(ledger, ledger.leaving_for, now, actions)
            return
        policy = self._policy
        while (item := policy.next_for(ledger, now)) is not None:
            model = item.request.model
            if model != ledger.model:
                if self._may_swap:
                    self._switch(ledger, model, now, actions)
                return
            if self._holds_back and not fits(ledger, item, self._estimator, now):
                if self._may_evict and not ledger.evicting:
                    for victim in policy.victims(ledger, item, now):
                        self._evict(ledger, victim, actions)
                return
            policy.discard(item)
            item.state = RUNNING
            item.attempt += 1
            item.instance = ledger.id
            item.kv_home = None
            ledger.pulled(item, now)
            policy.changed(ledger)
            actions.append(Pull(item.request.id, item.attempt, ledger.id))
            if policy.at_rest:
                return

    def _evict(self, ledger: InstanceLedger, item: Tracked, actions: list[Action]) -> None:
        if item.state is not RUNNING:
            return
        item.state = EVICTING
        item.evictions += 1
        ledger.evicting += 1
        profile = ledger.spec.models[item.request.model]
        keep_kv = item.first_token_at is not None and keeps_kv(profile, item.context_tokens)
        actions.append(Evict(item.request.id, item.attempt, ledger.id, keep_kv))

    def _switch(self, ledger: InstanceLedger, model: str, now: float, actions: list[Action]) -> None:
        """Swap now if the instance is empty; otherwise clear it, by eviction or by waiting."""
        if not ledger.running:
            ledger.leaving_for = None
            ledger.swapping_to = model
            ledger.ready_at = now + ledger.swap_s(model)
            actions.append(SwapModel(ledger.id, model))
        elif self._may_evict and self._policy.evicts_to_swap:
            ledger.leaving_for = model
            for item in list(ledger.running.values()):
                self._evict(ledger, item, actions)


def keeps_kv(profile: ModelOnInstance, tokens: float) -> bool:
    """Whether moving the KV cache of so many tokens to the host and back beats computing it again.

    By the profile: two moves against a prefill in iterations of its own, of full chunks as far as it reaches.
    """
    chunk = min(tokens, profile.max_num_batched_tokens)
    step = profile.step
    again_s = tokens / chunk * step.base_s(int(chunk)) + step.prefill_pair_s * tokens * tokens / 2
    return 2 * tokens * profile.kv_restore_token_s < again_s


def fits(ledger: InstanceLedger, item: Tracked, estimator: Estimator, now: float) -> bool:
    """Whether the engine can start ``item`` now, by the ledger.

    It can when a sequence slot is free, the prompts ahead of it fill less than one iteration, and its
    KV cache fits beside that of the running requests and what these are expected to grow by.
    """
    request = item.request
    profile = ledger.spec.models[request.model]
    running = len(ledger.running)
    if running >= profile.max_num_seqs or ledger.prefilling_tokens >= profile.max_num_batched_tokens:
        return False
    if not running:
        return True
    held = ledger.context_tokens + estimator.growth_tokens(ledger, item, now)
    # ``context_tokens`` of the item, without the time that a property takes.
    return held + (request.prompt_tokens + item.output_tokens) <= profile.kv_capacity_tokens
