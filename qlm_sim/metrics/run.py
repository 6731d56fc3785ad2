"""One policy's run, concluded: all that tables, figures and files are made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlm_sim.core.plan import PlanExplanation
from qlm_sim.core.types import SloClass
from qlm_sim.metrics.columns import RequestColumns
from qlm_sim.metrics.recorder import RunRecorder
from qlm_sim.metrics.series import EngineSeries, InstanceTimeline, LoadSeries
from qlm_sim.metrics.summary import Summary, summarise


@dataclass(frozen=True)
class PolicyRun:
    """What a policy made of a workload. ``end_s``: when the run stopped, seconds since its start."""

    name: str
    slo_classes: tuple[SloClass, ...]
    end_s: float
    summary: Summary
    requests: RequestColumns
    load: LoadSeries
    engines: Mapping[str, EngineSeries]
    timelines: Mapping[str, InstanceTimeline]
    plans: tuple[PlanExplanation, ...] = ()
    """Global plans that moved something, for policies that make plans."""
    upper_bound: bool = False
    """Told in advance what nobody can know: a bound for the others, no policy to compare with."""

    @property
    def label(self) -> str:
        """Its name in tables; an upper bound is marked."""
        return f"{self.name}*" if self.upper_bound else self.name


def conclude(
    name: str,
    recorder: RunRecorder,
    slo_classes: Sequence[SloClass],
    end_s: float,
    plans: Sequence[PlanExplanation] = (),
    *,
    upper_bound: bool = False,
) -> PolicyRun:
    """Take from the recorder what will be reported: it has no requests left afterwards."""
    requests = recorder.hand_over()
    return PolicyRun(
        name=name,
        slo_classes=tuple(slo_classes),
        end_s=end_s,
        summary=summarise(requests, recorder, slo_classes, end_s),
        requests=requests,
        load=recorder.load(),
        engines=recorder.engines(),
        timelines=recorder.timelines(),
        plans=tuple(plans),
        upper_bound=upper_bound,
    )
