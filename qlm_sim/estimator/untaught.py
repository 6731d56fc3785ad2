"""The estimator of policies that do not ask in the course of a run: it learns nothing, and costs nothing."""

from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lifecycle import Tracked
from qlm_sim.estimator.lengths import PRIOR_MEAN_TOKENS


class Untaught:
    """Implements core's Estimator."""

    def arrived(self, item: Tracked, now: float) -> None:
        pass

    def first_token(self, ledger: InstanceLedger, item: Tracked, now: float) -> None:
        pass

    def finished(self, ledger: InstanceLedger, item: Tracked, now: float, output_tokens: int) -> None:
        pass

    def left(self, ledger: InstanceLedger, item: Tracked, now: float, output_tokens: int | None) -> None:
        pass

    def reported(self, ledger: InstanceLedger, now: float) -> None:
        pass

    def growth_tokens(self, ledger: InstanceLedger, item: Tracked, now: float) -> float:
        return len(ledger.running) * PRIOR_MEAN_TOKENS

    def slowness(self, ledger: InstanceLedger, model: str) -> float:
        return 1.0
