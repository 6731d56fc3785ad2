"""Scenarios: one TOML file that names everything a run needs, read strictly."""

from qlm_sim.config.load import DEFAULT_SCENARIO, load_scenario, shipped_scenarios
from qlm_sim.config.scenario import Scenario
from qlm_sim.config.table import table_of

__all__ = ["DEFAULT_SCENARIO", "Scenario", "load_scenario", "shipped_scenarios", "table_of"]
