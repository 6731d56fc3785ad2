"""A scenario: the cluster, the requests and the scheduler of one run, as one TOML file says them.

Field names are the TOML keys, and carry their units. Knows what a scenario may say, and refuses one that
contradicts itself; it reads no trace and deploys no model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qlm_sim.config.table import Limit
from qlm_sim.core.types import SloClass
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.models.engines import DEFAULT_ENGINE
from qlm_sim.solver.solvers import DEFAULT_SOLVER
from qlm_sim.workload.mix import MixEntry

INTERACTIVE = SloClass("interactive", ttft_s=20.0)
BATCH_1 = SloClass("batch-1", ttft_s=60.0)
BATCH_2 = SloClass("batch-2", ttft_s=3600.0)
DEFAULT_SLO_CLASSES = (INTERACTIVE, BATCH_1, BATCH_2)
"""The classes of the paper (Patke et al., SoCC '24), all on the time to the first token."""


@dataclass(frozen=True, slots=True)
class WorkloadConfig:
    """Which requests arrive, and when."""

    trace: str = "sharegpt"
    """A trace file, or the name of a built-in trace."""
    format: str | None = None
    """The trace file's format; None recognises it."""
    tokenizer: str | None = None
    """What counts the tokens of a trace that holds text; None takes Mistral-7B's."""
    requests: int | None = None
    """How many requests to run; None runs as many as the trace has."""
    arrivals: str = "poisson"
    """"trace" (the file's own times), "poisson", "uniform" or "gamma:CV"."""
    rate_rps: float | None = None
    """Mean arrivals per second; with ``arrivals = "trace"`` the file's times are stretched to it."""


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Instances that are alike. Memory and bandwidth are those of one instance."""

    gpu: str
    count: int
    """Instances, of ``tp`` GPUs each."""
    models: tuple[str, ...]
    """Models that each instance may serve, one at a time."""
    tp: int = 1
    """Tensor parallel degree."""
    resident: tuple[str, ...] | None = None
    """Models loaded at the start, dealt round the instances; None deals them by their share of the mix."""
    host_memory_gib: float = 256.0
    """Host memory for idle model weights and evicted KV."""
    storage_gb_per_s: float = 2.0
    """Bandwidth of the storage that weights load from where host memory does not hold them."""
    engine: str = DEFAULT_ENGINE
    """Engine version, whose overhead per iteration the profile adds."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model that is not built in."""

    config: str
    """Path of its Hugging Face config.json."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Which policies run, and the settings they share."""

    policies: tuple[str, ...] | None = None
    """None runs all of them, on the same requests."""
    without: tuple[str, ...] = ()
    """Serving operations that no policy may use: pulling, eviction, swapping, balancing."""
    delta: float = 0.5
    """Size of a request group, as a share of the average batch."""
    replan_interval_s: float = 1.0
    """Least seconds between two global plans."""
    solver: str = DEFAULT_SOLVER
    """What makes them: "search", or the paper's integer program ("milp" by HiGHS, "milp-cbc" by CBC), whose
    place the search takes where the program would be too large."""
    admission: float | None = None
    """Requests with a smaller probability of meeting their SLO are refused at once; None lets all in."""


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """How the cluster is simulated."""

    engine: Literal["leap", "stepping"] = "leap"
    """"leap" goes from one change of the batch to the next; "stepping" is the slow reference."""
    horizon_s: float | None = None
    """Stop here; requests unfinished by then have missed their SLO. None runs until all is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One run. ``table_of(scenario)`` is all that is needed to repeat it."""

    name: str
    description: str = ""
    seed: int = 0
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    slo: tuple[SloClass, ...] = DEFAULT_SLO_CLASSES
    mix: tuple[MixEntry, ...]
    cluster: tuple[ClusterConfig, ...]
    engine: EngineConfig = field(default_factory=EngineConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    models: Mapping[str, ModelConfig] = field(default_factory=dict)
    """Models that are not built in, by name."""


LIMITS: Mapping[str, Limit] = (
    dict.fromkeys(
        (
            "ttft_s",
            "tpot_s",
            "e2e_s",
            "weight",
            "share",
            "rate_rps",
            "horizon_s",
            "storage_gb_per_s",
            "delta",
            "replan_interval_s",
        ),
        Limit(above=0),
    )
    | dict.fromkeys(
        (
            "requests",
            "prompt_tokens",
            "tp",
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "max_model_len",
            "num_gpu_blocks",
        ),
        Limit(at_least=1),
    )
    | dict.fromkeys(("seed", "host_memory_gib"), Limit(at_least=0))
    | dict.fromkeys(("gpu_memory_utilization", "admission"), Limit(above=0, at_most=1))
    | {"watermark": Limit(at_least=0, at_most=1)}
    | {"count": Limit(at_least=1, at_most=10_000)}
)
