"""What ``qlm-live serve CONFIG.toml`` may be told: the dataclasses are the schema, their fields the keys.

Keys are strict and carry their units.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qlm_sim.config.scenario import DEFAULT_SLO_CLASSES
from qlm_sim.config.table import Limit
from qlm_sim.core.types import SloClass

SERVICE_TIERS = ("priority", "default", "flex")


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """The HTTP server."""

    host: str = "127.0.0.1"
    port: int = 8000
    advertise: str | None = None
    """URL at which other gateways of the same store reach this one; None takes host and port, and the address
    of the machine's own name where the host is 0.0.0.0 or ::."""
    tls_cert: str | None = None
    tls_key: str | None = None
    max_body_mib: float = 32.0
    """Largest body of a request. Uploaded files have their own limit, ``batch.max_file_mib``."""
    max_queued: int = 10_000
    """Most interactive requests in the house; beyond, 429."""
    drain_s: float = 30.0
    """How long running work may go on after SIGTERM."""
    log: Literal["json", "text"] = "json"
    log_requests: bool = True
    """One line of the log for each request that is over."""
    admin_key: str | None = None
    """Key for /metrics and /dashboard, which show all tenants; None leaves them open."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The scheduler core, the same as in simulation."""

    policy: str = "qlm"
    delta: float = 0.5
    """Size of a request group, as a share of the average batch."""
    replan_interval_s: float = 1.0
    """Least seconds between two global plans."""
    without: tuple[str, ...] = ()
    """Serving operations that are not to be used: pulling, eviction, swapping, balancing."""


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """Refusing what would be late anyway: 429 with Retry-After, from the estimated wait."""

    refuse_late: bool = False
    late_quantile: float = 0.5
    """A request is refused when this quantile of its estimated wait lies beyond its TTFT target."""


@dataclass(frozen=True, slots=True)
class FairnessConfig:
    """How much of one tenant's backlog the scheduler gets to see while others have work too."""

    window: int | None = None
    """Requests of one SLO class that may wait in the scheduler, all tenants together; None takes the
    sequences that all engines run at once. With fewer than two tenants nothing is held back."""


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Where accepted batches and files survive: sqlite:///PATH or redis://HOST:PORT/DB."""

    url: str = "sqlite:///qlm-live.db"
    lease_s: float = 5.0
    """Redis: a scheduling leader that has not renewed its lease for so long is replaced."""


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """The Batch API."""

    slo: str | None = None
    """SLO class of batch lines; None takes the class with the longest TTFT target."""
    window: int = 256
    """Lines of one tenant that are in the scheduler at once; the others wait in the store."""
    max_requests: int = 50_000
    max_file_mib: float = 200.0


@dataclass(frozen=True, slots=True)
class TenantConfig:
    """Who sends requests, known by an API key. Without any tenant the gateway asks for no key."""

    name: str
    api_key: str | None = None
    api_key_env: str | None = None
    """Name of the environment variable that holds the key."""
    weight: float = 1.0
    """Its share while several tenants have work, in relation to the others' weights."""
    max_queued: int | None = None
    """Most interactive requests in the house; beyond, 429."""
    rate_rps: float | None = None
    """Most interactive requests per second, averaged over ten seconds; beyond, 429."""
    default_slo: str | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model that is served."""

    name: str
    """What clients call it."""
    path: str | None = None
    """What engines load: a folder or a Hugging Face name; None takes ``name``."""
    config: str | None = None
    """Its Hugging Face config.json, to model its speed and memory; None takes the shipped model ``name``."""
    tokenizer: str | None = None
    """A tokenizer.json to count prompts with; None estimates from characters, learning from the engines."""
    max_model_len: int | None = None
    default_slo: str | None = None


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine that can hold one model at a time."""

    id: str
    models: tuple[str, ...]
    url: str | None = None
    """A running OpenAI-compatible server to attach to."""
    urls: Mapping[str, str] = field(default_factory=dict)
    """With ``swap = "sleep"``, the running server of each model."""
    engine_key_env: str | None = None
    """Name of the environment variable that holds the servers' own API key."""
    command: tuple[str, ...] | None = None
    """Start and watch this server; {port}, {model} (its path) and {name} are filled in. With
    ``swap = "sleep"`` one is started for each model. In-process engines: the flags of ``vllm serve``."""
    log: str | None = None
    """File that gets what the started server writes; None drops it."""
    kind: Literal["server", "in-process", "fake"] = "server"
    gpu: str | None = None
    """Hardware profile: a shipped name or a TOML file. What its coefficients promise is learnt further."""
    tp: int = 1
    resident: str | None = None
    """The model that it holds at the start; None takes the first of ``models``."""
    swap: Literal["sleep", "restart", "none"] = "none"
    """How it changes models: a server per model, of which all but one sleep; one server, which is started
    anew; or not at all."""
    sleep_level: Literal[1, 2] = 1
    """1 keeps the weights of sleeping models in host memory, 2 drops them."""
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 8192
    kv_tokens: int | None = None
    """Tokens that its KV cache holds; None computes it from GPU and model."""
    host_memory_gib: float = 64.0
    storage_gb_per_s: float = 2.0
    """What weights are read with where host memory does not hold them."""
    block_size: int = 16
    report_s: float = 1.0
    """Between two looks at how it stands."""
    stall_s: float = 60.0
    """With requests running, an engine that says nothing for so long hangs: it is given up and restarted."""
    backoff_s: float = 1.0
    """Before it is started again after a crash; doubles with each in a row."""
    speed: float = 1.0
    """Fake engines: how many times faster than the profile they run."""
    mean_output_tokens: float = 128.0
    """Fake engines: how long their answers are."""
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveConfig:
    """Everything that ``qlm-live serve`` runs."""

    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    fairness: FairnessConfig = field(default_factory=FairnessConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    default_slo: str | None = None
    """SLO class of a request that asks for none; None takes the first of ``slo``."""
    service_tier: Mapping[str, str] = field(default_factory=dict)
    """OpenAI's service tiers (priority, default, flex) to SLO classes."""
    slo: tuple[SloClass, ...] = DEFAULT_SLO_CLASSES
    tenant: tuple[TenantConfig, ...] = ()
    model: tuple[ModelConfig, ...]
    engine: tuple[EngineConfig, ...]

    @property
    def default_class(self) -> str:
        return self.default_slo or self.slo[0].name

    @property
    def batch_class(self) -> str:
        return self.batch.slo or max(self.slo, key=lambda each: each.ttft_s or 0.0).name


LIMITS: Mapping[str, Limit] = (
    dict.fromkeys(
        (
            "ttft_s",
            "tpot_s",
            "e2e_s",
            "weight",
            "rate_rps",
            "delta",
            "replan_interval_s",
            "lease_s",
            "max_body_mib",
            "max_file_mib",
            "speed",
            "mean_output_tokens",
            "storage_gb_per_s",
            "report_s",
            "stall_s",
            "backoff_s",
        ),
        Limit(above=0),
    )
    | dict.fromkeys(
        (
            "max_queued",
            "window",
            "max_requests",
            "max_model_len",
            "tp",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_tokens",
            "block_size",
        ),
        Limit(at_least=1),
    )
    | dict.fromkeys(("drain_s", "host_memory_gib"), Limit(at_least=0))
    | {"port": Limit(at_least=0, at_most=65535), "late_quantile": Limit(above=0, at_most=0.99)}
)


def api_key(tenant: TenantConfig) -> str | None:
    """The key that its requests carry; None where its environment variable is not set."""
    return tenant.api_key if tenant.api_key_env is None else os.environ.get(tenant.api_key_env)
