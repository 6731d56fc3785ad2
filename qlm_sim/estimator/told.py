"""The estimator that is told every output length in advance: for the clairvoyant policy, an upper bound.

Engine speeds it learns as any other does.
"""

from collections.abc import Mapping

import numpy as np

from qlm_sim.core.groups import RequestGroup
from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lifecycle import Tracked
from qlm_sim.core.types import Request
from qlm_sim.estimator.lengths import PRIOR_MEAN_TOKENS, Floats, LengthStatistics
from qlm_sim.estimator.service import BLOCK_WASTE_TOKENS, ServiceEstimator

SLACK = 0.03
"""Share of the KV cache kept free: between reports, how far running requests are is known only about."""


class ToldEstimator(ServiceEstimator):
    """A ServiceEstimator with true output lengths in place of learnt ones."""

    def __init__(self, output_tokens: Mapping[str, int], paces: bool = True) -> None:
        """``output_tokens``: true output length by request id, of every request that will arrive."""
        super().__init__(paces)
        self._output_tokens = output_tokens

    def band(self, request: Request) -> int:
        """Long outputs are in groups of their own, so that they can step behind the short ones."""
        return 2 * super().band(request) + (self._output_tokens[request.id] > PRIOR_MEAN_TOKENS)

    def of_waiting(self, group: RequestGroup) -> LengthStatistics:
        tokens = self._output_tokens
        left = [max(1, tokens[item.request.id] - item.output_tokens) for item in group.items]
        return LengthStatistics(len(left), float(sum(left)), float(sum(each * each for each in left)))

    def remaining_tokens(self, ledger: InstanceLedger, item: Tracked) -> float:
        entry = self.clock(ledger).decoding.get(item.request.id)
        generated = entry.tokens() if entry is not None else item.output_tokens
        return max(1.0, self._output_tokens[item.request.id] - generated)

    def growth_tokens(self, ledger: InstanceLedger, item: Tracked, now: float) -> float:
        """The most that all of them will hold at one time, less what they brought along, and some slack."""
        self.generated_tokens(ledger, now)  # brings the clock up to now
        tokens = self._output_tokens
        everyone = (*ledger.running.values(), item)
        left = np.array([self.remaining_tokens(ledger, each) for each in everyone])
        full = np.array([each.request.prompt_tokens + tokens[each.request.id] for each in everyone])
        peak = peak_tokens(full - left + BLOCK_WASTE_TOKENS, left)
        slack = SLACK * ledger.spec.models[item.request.model].kv_capacity_tokens
        return peak + slack - ledger.context_tokens - item.context_tokens


def peak_tokens(held: Floats, left: Floats) -> float:
    """Most KV tokens at one time of sequences that hold so many now and grow by so many until they end.

    Their sum grows until one ends and then falls, so it is looked at when each is about to end.
    """
    order = np.argsort(-left, kind="stable")
    left = left[order]
    return float(np.max(np.cumsum(held[order]) + left * np.arange(1, len(left) + 1)))
