"""The estimator of policies that do not ask in the course of a run: nothing is learnt for it."""

from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lifecycle import Tracked
from qlm_sim.estimator.lengths import PRIOR_MEAN_TOKENS


class Untaught:
    """Implements core's Estimator."""

    def growth_tokens(self, ledger: InstanceLedger, item: Tracked, now: float) -> float:
        return len(ledger.running) * PRIOR_MEAN_TOKENS

    def slowness(self, ledger: InstanceLedger, model: str) -> float:
        return 1.0
