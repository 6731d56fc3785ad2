"""Ledgers and groups, seen as the solver's problem: relative times, expected service, free room."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp

from qlm_sim.core.groups import RequestGroup
from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lso import keeps_kv
from qlm_sim.core.plan import GroupService, InstanceState, WaitingGroup
from qlm_sim.core.types import InstanceSpec, ModelOnInstance
from qlm_sim.estimator.service import ServiceEstimator, decode_step_s, group_service

_PROMPT_STEP = 1.25
"""Services are computed once per prompt length, to this factor."""


class SnapshotTaker:
    """Turns the scheduler's state into plain data, with what the estimator expects filled in."""

    def __init__(
        self,
        ledgers: Mapping[str, InstanceLedger],
        estimator: ServiceEstimator,
        weights: Mapping[str, float],
    ) -> None:
        self._ledgers = ledgers
        self._estimator = estimator
        self._weights = weights
        self._kinds: dict[str, InstanceSpec] = {}
        self._kind_of: dict[str, str] = {}
        for ledger in ledgers.values():
            for kind, spec in self._kinds.items():
                if spec.models == ledger.spec.models:
                    self._kind_of[ledger.id] = kind
                    break
            else:
                self._kinds[ledger.id] = ledger.spec
                self._kind_of[ledger.id] = ledger.id
        self._cache: dict[tuple[str, str, str, bool, int], tuple[float, GroupService]] = {}

    def service(self, kind: str, group: RequestGroup) -> GroupService:
        """What one request of the group takes of an instance of that kind."""
        key = group.key
        context = group.context_tokens / len(group)
        size = round_up(context)
        lengths = self._estimator.lengths.of_class(key.model, key.slo_class)
        cache_key = (kind, key.model, key.slo_class, key.served, size)
        cached = self._cache.get(cache_key)
        if cached is not None and lengths.count < cached[0]:
            return cached[1]
        profile = self._kinds[kind].models[key.model]
        service = group_service(profile, context, lengths)
        if key.served and keeps_kv(profile):
            service = GroupService(
                prefill_s=context * profile.kv_restore_token_s,
                decode_s=service.decode_s,
                decode_sd_s=service.decode_sd_s,
                batch=service.batch,
            )
        # Believed until a tenth more requests have finished.
        self._cache[cache_key] = (lengths.count * 1.1, service)
        return service

    def service_on(self, ledger: InstanceLedger, group: RequestGroup) -> GroupService:
        return self.service(self._kind_of[ledger.id], group)

    def group(self, group: RequestGroup, now: float) -> WaitingGroup:
        key = group.key
        return WaitingGroup(
            id=group.id,
            model=key.model,
            requests=len(group),
            weight=self._weights.get(key.slo_class, 1.0),
            decided=key.decided,
            first_deadline_s=group.first_deadline - now,
            last_deadline_s=group.last_deadline - now,
            service={
                kind: self.service(kind, group)
                for kind, spec in self._kinds.items()
                if key.model in spec.models
            },
        )

    def instance(self, ledger: InstanceLedger, now: float) -> InstanceState:
        target = ledger.next_model
        running = len(ledger.running)
        ready_s = 0.0
        if ledger.swapping_to is not None:
            ready_s = max(0.0, ledger.ready_at - now)
        elif ledger.leaving_for is not None:
            ready_s = self.leave_s(ledger, now) + ledger.swap_s(ledger.leaving_for)
        return InstanceState(
            id=ledger.id,
            kind=self._kind_of[ledger.id],
            model=target,
            ready_s=ready_s,
            free=self._free(ledger, target, now),
            running=running,
            leave_s=self.leave_s(ledger, now),
            swap_s={model: ledger.swap_s(model) for model in ledger.spec.models},
        )

    def instances(self, now: float) -> Sequence[InstanceState]:
        return [self.instance(ledger, now) for ledger in self._ledgers.values()]

    def _free(self, ledger: InstanceLedger, model: str | None, now: float) -> float:
        """Requests like those running that the instance could take at once."""
        if model is None:
            return 0.0
        profile = ledger.spec.models[model]
        lengths = self._estimator.lengths.of_model(model)
        generated_each = lengths.second_moment / (2 * lengths.mean)
        running = len(ledger.running) if model == ledger.model else 0
        prompt_each = ledger.context_tokens / running if running else 512.0
        by_memory = profile.kv_capacity_tokens / (prompt_each + generated_each)
        return max(0.0, min(profile.max_num_seqs, by_memory) - running)

    def leave_s(self, ledger: InstanceLedger, now: float) -> float:
        """Seconds to evict all that runs: the iteration under way and the moves of KV to the host."""
        profile = ledger.profile
        if profile is None or not ledger.running:
            return 0.0
        token_s = self._estimator.token_s(ledger)
        tokens = ledger.context_tokens + ledger.generated_tokens(now, token_s)
        moves_s = tokens * profile.kv_restore_token_s if keeps_kv(profile) else 0.0
        return token_s + moves_s

    def batch_use(self, ledger: InstanceLedger) -> float:
        """Token throughput of what runs now, as a share of the full batch's."""
        profile = ledger.profile
        running = len(ledger.running)
        if profile is None or not running:
            return 0.0
        each = max(1.0, ledger.context_tokens / running)
        full = max(1.0, min(profile.max_num_seqs, profile.kv_capacity_tokens / each))
        return _throughput(profile, min(running, full), each) / _throughput(profile, full, each)


@dataclass(frozen=True, slots=True)
class Visit:
    """What a visit to a model would be: how long to stay, and what it gets done."""

    stay_s: float
    """Seconds from the end of the swap."""
    rate: float
    """Work done per second, the swap's time included, as a share of a full batch's."""


def best_visit(service: GroupService, requests: int, overhead_s: float) -> Visit:
    """The visit that gets most done per second.

    A visit costs ``overhead_s``, then prefills what waits, runs a full batch as long as there is one,
    and after that the batch decays as requests finish, with time constant batch · decode_s. Like a
    forager, an instance should leave its model when its rate falls below what the next one offers on
    the whole (marginal value theorem, Charnov 1976).
    """
    batch = service.batch
    full_s = requests * service.prefill_s + max(0.0, requests - batch) * service.decode_s
    decay_s = batch * service.decode_s
    share = min(1.0, requests / batch)
    best = Visit(0.0, 0.0)
    for decays in (0.0, 0.1, 0.25, 0.5, 1.0, 2.0):
        stay_s = full_s + decays * decay_s
        rate = (full_s + share * decay_s * (1 - exp(-decays))) / (overhead_s + stay_s)
        if rate > best.rate:
            best = Visit(stay_s, rate)
    return best


def _throughput(profile: ModelOnInstance, sequences: float, kv_each: float) -> float:
    """Tokens per second of that many decoding sequences."""
    return sequences / decode_step_s(profile, sequences, sequences * kv_each)


def round_up(tokens: float) -> int:
    """Index of the prompt length bucket that holds ``tokens``."""
    index = 0
    limit = 16.0
    while tokens > limit:
        limit *= _PROMPT_STEP
        index += 1
    return index
