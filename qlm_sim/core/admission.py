"""Admission control: a request that would probably be late is refused at once, and told its estimated wait.

What is refused costs nobody anything; served late, it takes time in which others could be met.
"""

from qlm_sim.core.forecast import Forecast
from qlm_sim.core.policy import Forecaster


class Admission:
    """Lets in what has a fair chance.

    Has a forecaster of its own: what others ask of the core's must not change whom it lets in.
    """

    def __init__(self, forecaster: Forecaster, least_chance: float) -> None:
        """``least_chance``: a request with a smaller probability of meeting its SLO is refused."""
        self.forecaster = forecaster
        self._least_chance = least_chance

    def refuses(self, forecast: Forecast) -> bool:
        return forecast.p_slo_met < self._least_chance
