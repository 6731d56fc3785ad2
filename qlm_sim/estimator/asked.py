"""An estimator beside which a second one learns the same, for questions from outside.

What is learnt is brought up to date when somebody asks, and then believed for a while. So a question would
change what the next decision sees, and a run that nobody asked would decide otherwise. Questions have an
estimator of their own instead.
"""

from qlm_sim.core.instances import InstanceLedger
from qlm_sim.core.lifecycle import Tracked
from qlm_sim.estimator.service import ServiceEstimator


class AskedEstimator(ServiceEstimator):
    """Decisions ask it; questions ask ``questions``."""

    def __init__(self, paces: bool = True) -> None:
        super().__init__(paces)
        self.questions = ServiceEstimator()

    def arrived(self, item: Tracked, now: float) -> None:
        super().arrived(item, now)
        self.questions.arrived(item, now)

    def first_token(self, ledger: InstanceLedger, item: Tracked, now: float) -> None:
        super().first_token(ledger, item, now)
        self.questions.first_token(ledger, item, now)

    def finished(self, ledger: InstanceLedger, item: Tracked, now: float, output_tokens: int) -> None:
        # ``finished`` calls ``first_token`` where both come in one instant: each estimator its own.
        self.questions.finished(ledger, item, now, output_tokens)
        if item.request.id not in self.clock(ledger).decoding:
            super().first_token(ledger, item, now)
        super().finished(ledger, item, now, output_tokens)

    def left(self, ledger: InstanceLedger, item: Tracked, now: float, output_tokens: int | None) -> None:
        super().left(ledger, item, now, output_tokens)
        self.questions.left(ledger, item, now, output_tokens)

    def reported(self, ledger: InstanceLedger, now: float) -> None:
        super().reported(ledger, now)
        self.questions.reported(ledger, now)
