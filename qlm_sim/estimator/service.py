"""What serving costs: engine seconds per request and requests per batch, from a profile.

An instance whose batch is full serves one request every ``prefill_s + decode_s`` seconds, which is
the paper's Σ O_i / Θ taken per request: Θ, the token throughput, is batch / token_s, and one
request's decoding takes O / Θ of the engine.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from math import inf

from qlm_sim.core.groups import RequestGroup
from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lifecycle import Tracked
from qlm_sim.core.plan import GroupService
from qlm_sim.core.types import ModelOnInstance, Request
from qlm_sim.estimator.arrivals import Arrivals
from qlm_sim.estimator.lengths import LengthStatistics, OutputLengths
from qlm_sim.estimator.pace import Pace
from qlm_sim.estimator.record import TrackRecord
from qlm_sim.estimator.speed import EngineClock, SpeedRatio
from qlm_sim.estimator.steps import decode_step_s, prefill_s

_E = 2.718281828459045
RESERVE_EXCESSES = 2.0
"""KV memory kept free, in mean excesses over what is filled. Of 0 to 4, 2 took the least engine time for
ShareGPT on engines with little memory (7 % to 25 % less than 0)."""
BLOCK_WASTE_TOKENS = 8.0
"""KV tokens that a sequence's last block leaves unused on average: half of vLLM's block of 16."""
_PRIOR_PROMPTS = (16.0, 16 * 256.0, 16 * 2 * 256.0**2)
"""Prior of prompt lengths: count, sum, sum of squares."""


@dataclass(frozen=True, slots=True)
class RoomRule:
    """What is kept free beside running requests, in KV tokens."""

    most_tokens: float
    """Reserve for a batch that is kept full."""
    mean_tokens: float
    """Mean output length."""
    waste_tokens: float = BLOCK_WASTE_TOKENS
    """Per request."""
    believed_until: float = inf
    """So many requests of the model have begun."""

    @property
    def peak_tokens(self) -> float:
        """n exponential outputs of mean μ that started together hold n·μ/e at their peak."""
        return self.mean_tokens / _E

    def reserve_tokens(self, running: float) -> float:
        """Kept free for so many running requests to grow; they are not expected to need a mean each."""
        mean_each = running * self.mean_tokens
        return mean_each if mean_each < self.most_tokens else self.most_tokens

    def growth_tokens(self, running: float, generated: float) -> float:
        """What so many running requests are to have beyond what they brought; now it is ``generated``."""
        mean_each = running * self.mean_tokens
        reserve = mean_each if mean_each < self.most_tokens else self.most_tokens
        peak = mean_each / _E
        return (generated if generated > peak else peak) + running * self.waste_tokens + reserve


def group_service(
    profile: ModelOnInstance,
    prompt_tokens: float,
    lengths: LengthStatistics,
    slowness: float = 1.0,
) -> GroupService:
    """What requests of that mean prompt take of an instance, when its batch is full.

    A running request seen at random has generated E[O²] / 2E[O] tokens (renewal theory), so a batch
    holds prompt + that much KV per sequence. ``slowness``: the engine's seconds per second of its profile.
    """
    mean = max(1.0, lengths.mean)
    kv_each = prompt_tokens + min(lengths.second_moment / (2 * mean), profile.max_model_len / 2)
    batch = max(1.0, min(profile.max_num_seqs, profile.kv_capacity_tokens / kv_each))
    per_token_s = slowness * decode_step_s(profile, batch, batch * kv_each) / batch
    return GroupService(
        prefill_s=slowness * (prefill_s(profile, prompt_tokens, batch) + profile.intake_s),
        decode_s=mean * per_token_s,
        decode_sd_s=lengths.variance**0.5 * per_token_s,
        batch=batch,
    )


class _Learnt:
    """Of one model, on all instances."""

    __slots__ = ("believed_until", "count", "pace", "rules", "speed", "total", "total_squared")

    def __init__(self) -> None:
        self.speed: SpeedRatio | None = None
        """Of the instance that last told."""
        self.pace: tuple[ModelOnInstance, Pace] | None = None
        """What an instance got done, and its profile: the one that saw most."""
        self.count, self.total, self.total_squared = _PRIOR_PROMPTS
        """Of what requests bring along."""
        self.rules: dict[int, RoomRule] = {}
        """By KV capacity: those that are believed."""
        self.believed_until = inf
        """All of them, until so many requests have begun."""

    def believe(self, capacity_tokens: int, rule: RoomRule) -> None:
        self.rules[capacity_tokens] = rule
        self.believed_until = min(self.believed_until, rule.believed_until)

    def doubt(self) -> None:
        """Drop the rules that are believed no longer."""
        self.rules = {tokens: rule for tokens, rule in self.rules.items() if self.count < rule.believed_until}
        self.believed_until = min([rule.believed_until for rule in self.rules.values()], default=inf)


class ServiceEstimator:
    """Learns output lengths and engine speeds, and says what they mean: core's Estimator and Learner."""

    def __init__(self, paces: bool = True) -> None:
        """``paces``: watch what comes, and what engines get done under a waiting line, which only forecasts
        ask for."""
        self.lengths = OutputLengths()
        self._clocks: defaultdict[str, EngineClock] = defaultdict(partial(EngineClock, paces))
        self._learnt: defaultdict[str, _Learnt] = defaultdict(_Learnt)
        self.record = TrackRecord()
        self.arrivals = Arrivals() if paces else None

    def arrived(self, item: Tracked, now: float) -> None:
        if self.arrivals is not None:
            self.arrivals.came(item, now)

    def clock(self, ledger: InstanceLedger) -> EngineClock:
        return self._clocks[ledger.id]

    def first_token(self, ledger: InstanceLedger, item: Tracked, now: float) -> None:
        clock = self._clocks[ledger.id]
        request = item.request
        if self.record.awaited:
            self.record.first_token(request.id, now)
        if request.id not in clock.decoding:
            learnt = self._learnt[request.model]
            waited_since = inf if self.arrivals is None else self.arrivals.waited_since(request.model)
            entry = clock.began(ledger, item, now, learnt.speed, waited_since)
            self.lengths.began(request.id, entry.kind, entry, entry.began)
            tokens = item.pulled_context
            learnt.count += 1.0
            learnt.total += tokens
            learnt.total_squared += tokens * tokens
            if learnt.count >= learnt.believed_until:
                learnt.doubt()

    def finished(self, ledger: InstanceLedger, item: Tracked, now: float, output_tokens: int) -> None:
        self._ended(ledger, item, now, output_tokens, True)

    def left(self, ledger: InstanceLedger, item: Tracked, now: float, output_tokens: int | None) -> None:
        self._ended(ledger, item, now, output_tokens, False)

    def _ended(
        self, ledger: InstanceLedger, item: Tracked, now: float, output_tokens: int | None, finished: bool
    ) -> None:
        request = item.request
        clock = self._clocks[ledger.id]
        entry = clock.ended(item, now, output_tokens)
        if entry is None and finished:
            # Its first token and its last came in the same instant.
            self.first_token(ledger, item, now)
            entry = clock.ended(item, now, output_tokens)
        if entry is not None:
            learnt = self._learnt[request.model]
            learnt.speed = clock.ratio
            pace = clock.pace
            if pace is not None and (learnt.pace is None or pace.steps > learnt.pace[1].steps):
                learnt.pace = ledger.spec.models[request.model], pace
            tokens = entry.tokens() if output_tokens is None else output_tokens
            self.lengths.ended(request.id, entry.kind, tokens, finished)

    def reported(self, ledger: InstanceLedger, now: float) -> None:
        if ledger.model is not None and ledger.reported is not None:
            self._clocks[ledger.id].reported(ledger, ledger.reported, now)

    def slowness(self, ledger: InstanceLedger, model: str) -> float:
        """Seconds that the instance takes of ``model`` per second of its profile."""
        speed = self._clocks[ledger.id].speed_of(model) or self._learnt[model].speed
        return speed.value if speed is not None else 1.0

    def pace(self, ledger: InstanceLedger, model: str) -> Pace | None:
        """What the instance was seen to get done of ``model``, or one with the same profile that saw more."""
        own = self._clocks[ledger.id].pace_of(model)
        best = self._learnt[model].pace
        if best is None or best[0] != ledger.spec.models[model]:
            return own
        return own if own is not None and own.steps >= best[1].steps else best[1]

    def request(self, ledger: InstanceLedger, model: str, prompt_tokens: float) -> GroupService:
        """What requests of that mean prompt take of the instance, when its batch is full."""
        profile, lengths = ledger.spec.models[model], self.lengths.of_model(model)
        return group_service(profile, prompt_tokens, lengths, self.slowness(ledger, model))

    def generated_tokens(self, ledger: InstanceLedger, now: float) -> float:
        return self._clocks[ledger.id].generated(now)

    def token_s(self, ledger: InstanceLedger) -> float:
        """Seconds between two tokens of a request that decodes there now."""
        profile = ledger.profile
        assert profile is not None, f"{ledger.id} decodes without a model"
        assert ledger.model is not None
        step_s = decode_step_s(profile, max(1, ledger.decoding), ledger.context_tokens)
        return self.slowness(ledger, ledger.model) * step_s

    def growth_tokens(self, ledger: InstanceLedger, item: Tracked, now: float) -> float:
        """KV tokens to keep for what runs there beyond what it brought along: generated and to come."""
        model = item.request.model
        capacity_tokens = ledger.spec.models[model].kv_capacity_tokens
        try:
            rule = self._learnt[model].rules[capacity_tokens]
        except KeyError:
            rule = self.room_rule(model, capacity_tokens)
        return rule.growth_tokens(len(ledger.running), self._clocks[ledger.id].generated(now))

    def band(self, request: Request) -> int:
        """Requests of different bands are in different groups, so that mega-prompts are apart: 0 for prompts
        below 4096 tokens, then one band per factor of four."""
        tokens = request.prompt_tokens
        return ((tokens >> 12).bit_length() + 1) // 2 if tokens >= 4096 else 0

    def of_waiting(self, group: RequestGroup) -> LengthStatistics | None:
        """What is known of its own requests' outputs to come, beyond those of their class: nothing."""
        return None

    def remaining_tokens(self, ledger: InstanceLedger, item: Tracked) -> float:
        """Tokens that ``item``, which runs there, is still to generate; alike for all that are not told."""
        return 0.0

    def room_rule(self, model: str, capacity_tokens: int) -> RoomRule:
        """What to keep free beside running requests.

        A batch that is kept full changes like a random walk: in one step each of n requests grows by a
        token, and n / E[O] of them end and free p + O. What it holds drifts down by n·p / E[O], which new
        requests of p make up for, and has the variance n·E[(p + O)²] / E[O]; so in the long run it exceeds
        the level up to which it is filled by an exponential with mean E[(p + O)²] / 2p (heavy-traffic
        limit of a reflected walk). Twice that is kept free.
        """
        learnt = self._learnt[model]
        known = learnt.rules.get(capacity_tokens)
        if known is not None:
            return known
        lengths = self.lengths.of_model(model)
        mean, prompt = lengths.mean, learnt.total / learnt.count
        squared = learnt.total_squared / learnt.count
        exceeds = (squared + 2 * prompt * mean + lengths.second_moment) / (2 * prompt)
        # Believed until a twentieth more requests have begun.
        rule = RoomRule(
            min(RESERVE_EXCESSES * exceeds, capacity_tokens / 4), mean, believed_until=learnt.count * 1.05
        )
        learnt.believe(capacity_tokens, rule)
        return rule
