"""Scheduling policies by name, and the scheduler core made with one of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from qlm_sim.core.admission import Admission
from qlm_sim.core.manager import QueueManager
from qlm_sim.core.policy import Forecaster, Overtaking, Policy
from qlm_sim.core.types import InstanceSpec, Lso
from qlm_sim.errors import InputError
from qlm_sim.estimator.asked import AskedEstimator
from qlm_sim.estimator.service import ServiceEstimator
from qlm_sim.estimator.told import ToldEstimator
from qlm_sim.estimator.untaught import Untaught
from qlm_sim.policies import central
from qlm_sim.policies.qlm import QlmPolicy
from qlm_sim.policies.shepherd import ShepherdPolicy
from qlm_sim.policies.vllm import VllmPolicy


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """What policies can be told. Each takes what concerns it."""

    weights: Mapping[str, float] = field(default_factory=dict)
    """Cost of one missed request, by SLO class; 1 where absent."""
    delta: float = 0.5
    """Size of a request group, as a share of the average batch."""
    replan_interval_s: float = 1.0
    """Least seconds between two global plans."""
    without: frozenset[Lso] = frozenset()
    """Serving operations that are not to be used."""
    output_tokens: Mapping[str, int] | None = None
    """True output length of every request by its id: for ``clairvoyant`` alone."""
    first_token_only: frozenset[str] = frozenset()
    """SLO classes that promise nothing but the time to the first token."""
    admission: float | None = None
    """Requests with a smaller probability of meeting their SLO are refused at once; None lets all in."""
    forecasts: bool = False
    """Waits will be asked for: under every policy an estimator of its own learns what they rest on."""


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """A policy as the command line lists it."""

    summary: str
    make: Callable[[ServiceEstimator, SchedulerSettings], Policy]
    engine_scheduling: str | None = None
    """The engine's own scheduling policy that it needs, where not the scenario's."""
    learns: bool = True
    """Whether it asks, in the course of a run, what its estimator has learnt."""
    told: bool = False
    """Told every output length in advance: an upper bound, which nobody can run."""


def _central(
    name: str,
    summary: str,
    rank: central.RankFunction,
    hold: central.HoldFunction = central.never,
    overtaking: Overtaking = Overtaking.NONE,
) -> PolicyEntry:
    return PolicyEntry(
        summary, lambda estimator, settings: central.CentralPolicy(name, rank, hold, overtaking)
    )


def _qlm(estimator: ServiceEstimator, settings: SchedulerSettings) -> Policy:
    return QlmPolicy(
        estimator,
        settings.weights,
        delta=settings.delta,
        replan_interval_s=settings.replan_interval_s,
        first_token_only=settings.first_token_only,
        balancing=Lso.BALANCING not in settings.without,
    )


POLICIES: dict[str, PolicyEntry] = {
    "vllm": PolicyEntry(
        "first come, first served per instance, least-loaded dispatch",
        lambda estimator, settings: VllmPolicy(estimator),
        learns=False,
    ),
    "priority": PolicyEntry(
        "as vllm, with the engines' priority scheduling by deadline",
        lambda estimator, settings: VllmPolicy(estimator),
        engine_scheduling="priority",
        learns=False,
    ),
    "static": _central("static", "oldest first on the models that are loaded; no swaps", central.static),
    "collate": _central(
        "collate", "all of the loaded model before the next one (llama-swap)", central.collate
    ),
    "flow-control": _central(
        "flow-control",
        "strict bands by SLO, held back while an engine is saturated (llm-d)",
        central.flow_control,
        central.saturated,
        Overtaking.BY_SLO,
    ),
    "edf": _central(
        "edf",
        "earliest deadline first over the whole cluster",
        central.edf,
        overtaking=Overtaking.BY_DEADLINE,
    ),
    "edf-batched": _central(
        "edf-batched",
        "earliest deadline first, the loaded model before others",
        central.edf_batched,
        overtaking=Overtaking.BY_DEADLINE,
    ),
    "shepherd": PolicyEntry(
        "SHEPHERD: periodic plan of models onto instances, largest feasible batch first",
        lambda estimator, settings: ShepherdPolicy(estimator),
    ),
    "qlm": PolicyEntry("QLM: request groups on virtual queues under a global SLO-aware plan", _qlm),
    "clairvoyant": PolicyEntry("an upper bound: qlm told every output length in advance", _qlm, told=True),
}


def _estimator(policy: str, settings: SchedulerSettings) -> ServiceEstimator:
    paces = settings.admission is not None
    if not POLICIES[policy].told:
        return AskedEstimator(paces) if settings.forecasts else ServiceEstimator(paces)
    if settings.output_tokens is None:
        raise InputError(f"{policy}: an upper bound, which runs where output lengths are known in advance")
    return ToldEstimator(settings.output_tokens, paces or settings.forecasts)


def make_core(policy: str, instances: Sequence[InstanceSpec], settings: SchedulerSettings) -> QueueManager:
    """A scheduler core for these instances, under the policy of that name."""
    entry = POLICIES[policy]
    estimator = _estimator(policy, settings)
    asked = estimator.questions if isinstance(estimator, AskedEstimator) else estimator

    made = entry.make(estimator, settings)
    by_deadline = entry.engine_scheduling == "priority"
    overtaking = Overtaking.BY_DEADLINE if by_deadline else made.overtaking

    def forecaster(service: ServiceEstimator) -> Forecaster:
        from qlm_sim.estimator.wait import WaitEstimator  # here, because most simulations do without

        return WaitEstimator(service, overtaking, engines_by_deadline=by_deadline)

    learns = entry.learns or settings.forecasts or settings.admission is not None
    return QueueManager(
        instances,
        made,
        estimator if learns else Untaught(),
        learner=estimator if learns else None,
        forecaster=lambda: forecaster(asked),
        allowed=frozenset(Lso) - settings.without,
        admission=Admission(forecaster(estimator), settings.admission)
        if settings.admission is not None
        else None,
    )
