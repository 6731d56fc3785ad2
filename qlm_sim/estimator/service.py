"""What serving costs: engine seconds per request and requests per batch, from a profile.

An instance whose batch is full serves one request every ``prefill_s + decode_s`` seconds, which is
the paper's Σ O_i / Θ taken per request: Θ, the token throughput, is batch / token_s, and one
request's decoding takes O / Θ of the engine.
"""

from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lifecycle import Tracked
from qlm_sim.core.plan import GroupService
from qlm_sim.core.types import ModelOnInstance
from qlm_sim.estimator.lengths import LengthStatistics, OutputLengths

_E = 2.718281828459045


def prefill_s(profile: ModelOnInstance, tokens: float, beside: float = 0.0) -> float:
    """Engine seconds that ``tokens`` of prompt add to iterations which decode ``beside`` sequences."""
    chunk = min(tokens, max(1.0, profile.max_num_batched_tokens - beside))
    step = profile.step
    alone = step.base_s(int(beside)) if beside >= 1 else 0.0
    per_chunk = step.base_s(int(beside + chunk)) - alone + step.seq_s
    return tokens / chunk * per_chunk + step.prefill_pair_s * tokens * tokens / 2


def decode_step_s(profile: ModelOnInstance, sequences: float, kv_tokens: float) -> float:
    """Seconds of an iteration that decodes ``sequences`` sequences of ``kv_tokens`` KV in all."""
    step = profile.step
    return step.base_s(max(1, round(sequences))) + step.seq_s * sequences + step.kv_token_s * kv_tokens


def group_service(
    profile: ModelOnInstance, prompt_tokens: float, lengths: LengthStatistics, done_tokens: float = 0.0
) -> GroupService:
    """What requests of that mean prompt take of an instance, when its batch is full.

    A running request seen at random has generated E[O²] / 2E[O] tokens (renewal theory), so a batch
    holds prompt + that much KV per sequence. ``done_tokens`` were generated in earlier attempts and
    are part of the context now.
    """
    mean = max(1.0, lengths.mean)
    kv_each = prompt_tokens + min(lengths.second_moment / (2 * mean), profile.max_model_len / 2)
    batch = max(1.0, min(profile.max_num_seqs, profile.kv_capacity_tokens / kv_each))
    remaining = max(1.0, mean - done_tokens) if done_tokens else mean
    per_token_s = decode_step_s(profile, batch, batch * kv_each) / batch
    return GroupService(
        prefill_s=prefill_s(profile, prompt_tokens, batch),
        decode_s=remaining * per_token_s,
        decode_sd_s=lengths.variance**0.5 * per_token_s,
        batch=batch,
    )


class ServiceEstimator:
    """Learns output lengths and says what they mean for engines. Implements core's Estimator."""

    def __init__(self) -> None:
        self.lengths = OutputLengths()

    def finished(self, item: Tracked, output_tokens: int) -> None:
        request = item.request
        self.lengths.observe(request.model, request.slo_class, output_tokens)

    def token_s(self, ledger: InstanceLedger) -> float:
        profile = ledger.profile
        assert profile is not None, f"{ledger.id} decodes without a model"
        sequences = max(1, ledger.decoding)
        return decode_step_s(profile, sequences, ledger.context_tokens)

    def peak_tokens(self, model: str) -> float:
        """n exponential outputs of mean μ started together hold at most n·μ/e at a time."""
        return self.lengths.of_model(model).mean / _E
