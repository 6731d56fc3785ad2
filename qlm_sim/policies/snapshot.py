"""Ledgers and groups, seen as the solver's problem: relative times, expected service, free room."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from qlm_sim.core.groups import GroupKey, RequestGroup
from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lso import keeps_kv
from qlm_sim.core.plan import GroupService, InstanceState, WaitingGroup
from qlm_sim.core.types import InstanceSpec, ModelOnInstance
from qlm_sim.estimator.lengths import LengthStatistics
from qlm_sim.estimator.service import ServiceEstimator, group_service
from qlm_sim.estimator.steps import decode_step_s, prefill_s

_PROMPT_EDGES = [16.0 * 1.25**step for step in range(64)]
"""Services are computed once per prompt length, to the factor between two of these."""


class SnapshotTaker:
    """Turns the scheduler's state into plain data, with what the estimator expects filled in."""

    def __init__(
        self,
        ledgers: Mapping[str, InstanceLedger],
        estimator: ServiceEstimator,
        weights: Mapping[str, float],
    ) -> None:
        self._ledgers = ledgers
        self.estimator = estimator
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
        self._lengths: dict[tuple[str, str | None], LengthStatistics] = {}
        self._asked_until = 0.0
        self._cache: dict[tuple[str, str, bool, int], tuple[float, dict[str, GroupService]]] = {}

    def services(self, group: RequestGroup) -> Mapping[str, GroupService]:
        """By kind of instance that can serve it: what one request of the group takes there.

        Groups that are alike share the mapping.
        """
        key = group.key
        context = group.context_tokens / len(group.items)
        told = self.estimator.of_waiting(group)
        if told is not None:
            return self._make_services(key, context, told)
        lengths = self.lengths_of(key.model, key.slo_class)
        cache_key = (key.model, key.slo_class, key.served, bisect_left(_PROMPT_EDGES, context))
        cached = self._cache.get(cache_key)
        if cached is not None and lengths.count < cached[0]:
            return cached[1]
        services = self._make_services(key, context, lengths)
        # Believed until a tenth more requests have finished.
        self._cache[cache_key] = (lengths.count * 1.1, services)
        return services

    def _make_services(
        self, key: GroupKey, context: float, lengths: LengthStatistics
    ) -> dict[str, GroupService]:
        services = {}
        for kind, spec in self._kinds.items():
            profile = spec.models.get(key.model)
            if profile is None:
                continue
            slowness = self.estimator.slowness(self._ledgers[kind], key.model)
            service = group_service(profile, context, lengths, slowness=slowness)
            if key.served and keeps_kv(profile, context):
                service = replace(service, prefill_s=context * profile.kv_restore_token_s)
            services[kind] = service
        return services

    def lengths_of(self, model: str, slo_class: str | None = None) -> LengthStatistics:
        """Of the model's outputs, or a class of it, as the estimator says; asked again when a hundredth more
        requests have ended."""
        learnt = self.estimator.lengths
        if learnt.ended_requests > self._asked_until:
            self._asked_until = learnt.ended_requests * 1.01
            self._lengths.clear()
        lengths = self._lengths.get((model, slo_class))
        if lengths is None:
            lengths = learnt.of_model(model) if slo_class is None else learnt.of_class(model, slo_class)
            self._lengths[model, slo_class] = lengths
        return lengths

    def service_on(self, ledger: InstanceLedger, group: RequestGroup) -> GroupService:
        return self.services(group)[self._kind_of[ledger.id]]

    def group(self, group: RequestGroup, now: float) -> WaitingGroup:
        key, items = group.key, group.items
        # By position: names take half as long again, and every plan and place asks for all groups.
        return WaitingGroup(
            group.id,
            group.model,
            key.slo_class,
            len(items),
            self._weights.get(key.slo_class, 1.0),
            group.decided,
            items[0].deadline - now,
            items[-1].deadline - now,
            self.services(group),
        )

    def instance(self, ledger: InstanceLedger, now: float) -> InstanceState:
        target = ledger.next_model()
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
            free=self._free(ledger, target),
            running=running,
            # One that has a single model never leaves it.
            leave_s=self.leave_s(ledger, now) if len(ledger.spec.models) > 1 else 0.0,
            swap_s={model: ledger.swap_s(model) for model in ledger.spec.models},
            running_s=self._running_s(ledger) if len(ledger.spec.models) > 1 else 0.0,
        )

    def instances(self, now: float) -> Sequence[InstanceState]:
        return [self.instance(ledger, now) for ledger in self._ledgers.values()]

    def _free(self, ledger: InstanceLedger, model: str | None) -> float:
        """Share of a batch that nothing runs in: of the sequences or of the KV cache, the lesser."""
        running = len(ledger.running)
        if model is None or model != ledger.model or not running:
            return 1.0
        profile = ledger.spec.models[model]
        lengths = self.lengths_of(model)
        kv_tokens = ledger.context_tokens + running * lengths.second_moment / (2 * lengths.mean)
        used = max(running / profile.max_num_seqs, kv_tokens / profile.kv_capacity_tokens)
        return max(0.0, 1.0 - used)

    def _running_s(self, ledger: InstanceLedger) -> float:
        """Seconds of a full engine that what runs will still take: as if it had just come, since lengths have
        next to no memory."""
        running = len(ledger.running)
        if not running or ledger.model is None:
            return 0.0
        return running * self.request_s(ledger, ledger.model, ledger.context_tokens / running)

    def leave_s(self, ledger: InstanceLedger, now: float) -> float:
        """Seconds to evict all that runs: the iteration under way and the moves of KV to the host."""
        profile = ledger.profile
        if profile is None or not ledger.running:
            return 0.0
        token_s = self.estimator.token_s(ledger)
        tokens = ledger.context_tokens + self.estimator.generated_tokens(ledger, now)
        kept = keeps_kv(profile, max(1.0, tokens / len(ledger.running)))
        moves_s = tokens * profile.kv_restore_token_s if kept else 0.0
        return token_s + moves_s

    def again_s(self, ledger: InstanceLedger, now: float) -> float:
        """Seconds of prefill that evicting all that runs would cost later, where no KV is kept."""
        profile = ledger.profile
        if profile is None or not ledger.running:
            return 0.0
        assert ledger.model is not None
        running = len(ledger.running)
        tokens = ledger.context_tokens + self.estimator.generated_tokens(ledger, now)
        if keeps_kv(profile, max(1.0, tokens / running)):
            return 0.0
        each_s = prefill_s(profile, tokens / running, running, tokens)
        return running * self.estimator.slowness(ledger, ledger.model) * each_s

    def keeps(self, ledger: InstanceLedger, group: RequestGroup) -> bool:
        """Whether the instance keeps the KV of such requests when it evicts them."""
        return keeps_kv(ledger.spec.models[group.model], group.context_tokens / len(group))

    def request_s(self, ledger: InstanceLedger, model: str, prompt_tokens: float) -> float:
        """Seconds of the instance that one request of the model takes when its batch is full."""
        lengths = self.lengths_of(model)
        slowness = self.estimator.slowness(ledger, model)
        service = group_service(ledger.spec.models[model], prompt_tokens, lengths, slowness)
        return service.prefill_s + service.decode_s

    def batch_use(self, ledger: InstanceLedger, joining: int = 0) -> float:
        """Token throughput of what runs now, and so many more like it, as a share of the full batch's."""
        profile = ledger.profile
        running = len(ledger.running) + joining
        if profile is None or not running:
            return 0.0
        each = max(1.0, ledger.context_tokens / len(ledger.running)) if ledger.running else 256.0
        full = max(1.0, min(profile.max_num_seqs, profile.kv_capacity_tokens / each))
        return _throughput(profile, min(running, full), each) / _throughput(profile, full, each)


def _throughput(profile: ModelOnInstance, sequences: float, kv_each: float) -> float:
    """Tokens per second of that many decoding sequences."""
    return sequences / decode_step_s(profile, sequences, sequences * kv_each)


def prompt_bucket(tokens: float) -> int:
    """Index of the bucket of prompt lengths that holds ``tokens``."""
    return bisect_left(_PROMPT_EDGES, tokens)
