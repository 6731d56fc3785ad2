"""Replaying a scenario: its requests, the same for every policy, on its simulated cluster.

Puts the parts together and knows the inside of none. Runs share nothing, so they may go side by side.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from qlm_sim.cluster.simulation import simulate
from qlm_sim.config import Scenario
from qlm_sim.config.instances import instances
from qlm_sim.core.types import InstanceSpec, Lso
from qlm_sim.metrics.recorder import RunRecorder
from qlm_sim.metrics.repeats import combine
from qlm_sim.metrics.run import PolicyRun, conclude
from qlm_sim.models.engines import EngineVersion, load_engine
from qlm_sim.offered_load import demands, offered_load, with_offered_load
from qlm_sim.plan_log import PlanLog
from qlm_sim.policies import POLICIES, SchedulerSettings, make_core
from qlm_sim.solver.inline import InlineSolver
from qlm_sim.solver.solvers import DEFAULT_SOLVER, MOST_PLACES, PlanSolver
from qlm_sim.workload.mix import build_workload
from qlm_sim.workload.readers import Warn, read_trace
from qlm_sim.workload.workload import Trace, Workload

Progress = Callable[[str, int, int], None]
"""Told (policy, requests done, requests in all)."""
Report = Callable[[int], None]
"""Told how many requests are done."""


def policies_of(scenario: Scenario) -> tuple[str, ...]:
    """The policies that a scenario runs."""
    return scenario.scheduler.policies or tuple(POLICIES)


def engine_versions(scenario: Scenario) -> list[EngineVersion]:
    """The versions of the scenario's engines, each once, by name."""
    names = {load_engine(group.engine).name for group in scenario.cluster}
    return [load_engine(name) for name in sorted(names)]


def scenario_trace(
    scenario: Scenario, warn: Warn, progress: Callable[[int, int], None] | None = None
) -> Trace:
    """The trace that the scenario names. ``progress`` is told (bytes read, bytes of the file)."""
    workload = scenario.workload
    return read_trace(
        workload.trace,
        format=workload.format,
        tokenizer=workload.tokenizer,
        progress=progress,
        warn=warn,
    )


def scenario_workload(
    scenario: Scenario, specs: Sequence[InstanceSpec], trace: Trace
) -> tuple[Workload, list[str]]:
    """The scenario's requests, and notes on what was left out.

    A request must fit every instance that may serve its model.
    """
    longest: dict[str, int] = {}
    for spec in specs:
        for name, model in spec.models.items():
            longest[name] = min(model.max_model_len, longest.get(name, model.max_model_len))
    workload, notes = build_workload(
        trace,
        mix=scenario.mix,
        slo_classes=scenario.slo,
        arrivals=scenario.workload.arrivals,
        rate_rps=scenario.workload.rate_rps,
        requests=scenario.workload.requests,
        seed=scenario.seed,
        max_model_len=longest,
    )
    if scenario.engine.enable_prefix_caching and workload.content is None:
        notes.append(
            f"prefix caching is on, but trace {trace.name} does not tell which requests begin alike: "
            "only those that resume find their own blocks"
        )
    notes += [note for engine in engine_versions(scenario) if (note := engine.caveat)]
    return workload, notes


def replay(
    scenario: Scenario,
    *,
    trace: Trace | None = None,
    warn: Warn = lambda note: None,
    progress: Progress = lambda policy, done, total: None,
    processes: int = 1,
) -> list[PolicyRun]:
    """Run the scenario's requests under each of its policies, in their order.

    ``trace`` stands in for the one that the scenario names; ``warn`` gets one line about anything left
    out. With more than one process a script must guard its start with ``if __name__ == "__main__"``.
    Raises InputError. The same scenario gives the same runs, however many processes.
    """
    specs = instances(scenario)
    workload, notes = scenario_workload(scenario, specs, trace or scenario_trace(scenario, warn))
    for note in notes:
        warn(note)
    names = policies_of(scenario)
    jobs = [partial(_run, _Run(scenario, tuple(specs), workload, name)) for name in names]
    if processes == 1 or len(names) == 1:
        runs = [
            job(lambda done, name=name: progress(name, done, len(workload)))  # type: ignore[misc]
            for name, job in zip(names, jobs, strict=True)
        ]
    else:
        from qlm_sim.processes import run_jobs  # here, because one process does without

        runs = run_jobs(jobs, processes, lambda number, done: progress(names[number], done, len(workload)))
    # Who finds a prefix asks for less.
    load = None if scenario.engine.enable_prefix_caching else offered_load(demands(workload), specs)
    runs = [with_offered_load(run, load) for run in runs]
    for run in runs:
        if run.summary.get("plan_fallbacks"):
            warn(
                f"{run.name}: {run.summary['plan_fallbacks']:,} of {run.summary['plans']:,} plans were too "
                f"large for solver {scenario.scheduler.solver} (instances x groups² above {MOST_PLACES}); "
                f"solver {DEFAULT_SOLVER} made them"
            )
    return runs


def replay_repeatedly(
    scenario: Scenario,
    repeats: int,
    *,
    trace: Trace | None = None,
    warn: Warn = lambda note: None,
    progress: Progress = lambda policy, done, total: None,
    processes: int = 1,
) -> list[PolicyRun]:
    """``replay`` with the scenario's seed and those that follow it. Every policy's summary is the mean over
    them (see metrics.repeats); requests, figures and timelines are those of the first seed."""
    every: list[list[PolicyRun]] = []
    for repeat in range(repeats):
        seeded = replace(scenario, seed=scenario.seed + repeat)
        first = repeat == 0
        runs = replay(
            seeded,
            trace=trace,
            warn=warn if first else lambda note: None,
            progress=progress,
            processes=processes,
        )
        every.append(runs)
    if repeats == 1:
        return every[0]
    return [
        replace(together[0], summary=combine([run.summary for run in together]))
        for together in zip(*every, strict=True)
    ]


@dataclass(frozen=True)
class _Run:
    """All that one policy's run is made from."""

    scenario: Scenario
    instances: tuple[InstanceSpec, ...]
    workload: Workload
    policy: str


def _run(job: _Run, report: Report) -> PolicyRun:
    scenario = job.scenario
    scheduler = scenario.scheduler
    policy = POLICIES[job.policy]
    settings = SchedulerSettings(
        weights={slo.name: slo.weight for slo in scenario.slo},
        delta=scheduler.delta,
        replan_interval_s=scheduler.replan_interval_s,
        first_token_only=frozenset(slo.name for slo in scenario.slo if slo.first_token_only),
        admission=scheduler.admission,
        without=frozenset(map(Lso, scheduler.without)),
        output_tokens=job.workload.output_by_id() if policy.told else None,
    )
    recorder = RunRecorder(job.instances)
    log = PlanLog(recorder)
    solver = PlanSolver(scheduler.solver)
    end = simulate(
        job.workload,
        job.instances,
        replace(
            scenario.engine,
            scheduling_policy=policy.engine_scheduling or scenario.engine.scheduling_policy,
            scheduler_reserve_full_isl=_reserves_whole_prompt(scenario),
        ),
        make_core(job.policy, job.instances, settings),
        log,
        solver=InlineSolver(solver),
        engine=scenario.simulation.engine,
        until_s=scenario.simulation.horizon_s,
        progress=_sparse(report),
    )
    run = conclude(job.policy, recorder, scenario.slo, end.ended_at, log.plans, upper_bound=policy.told)
    if scheduler.solver == DEFAULT_SOLVER:
        return run
    return replace(run, summary=run.summary | {"plans": solver.plans, "plan_fallbacks": solver.fallbacks})


def _reserves_whole_prompt(scenario: Scenario) -> bool:
    told = scenario.engine.scheduler_reserve_full_isl
    if told is not None:
        return told
    return all(version.reserves_whole_prompt for version in engine_versions(scenario))


def _sparse(report: Report) -> Callable[[int, int], None]:
    """Reports no more than a few times a second: the simulation speaks far more often."""
    last = -math.inf

    def told(done: int, requests: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 0.2 or done == requests:
            last = now
            report(done)

    return told
