"""Fits ``Factors`` to measurements through the simulated engine, by damped least squares.

Residuals are logarithms of simulated over measured times, so that short and long times count alike, with
large ones weighed down (Huber) for what a warm-up does. A weak pull towards the shipped profile settles
what the measurements do not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qlm_sim.calibration.factors import FACTOR_NAMES, Factors, request_s, with_factors
from qlm_sim.calibration.observations import Observation
from qlm_sim.core.types import ModelOnInstance
from qlm_sim.errors import InputError
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.models.engines import EngineVersion
from qlm_sim.models.hardware import GpuProfile
from qlm_sim.models.specs import ModelSpec
from qlm_sim.models.step_time import step_model
from qlm_sim.validation.request_log import Floats
from qlm_sim.validation.simulated_log import simulate_log

NOISE = {"ttft_s": 0.25, "tpot_s": 0.03, "e2e_s": 0.05, "makespan_s": 0.02}
"""Scatter of one measured time around the model, relative. A first token waits for the iteration under way,
and in which one it comes hangs on the slightest difference; averages over many tokens do not."""
TIMES = ("ttft_s", "tpot_s", "e2e_s")
PULL = 2.0
"""Standard deviation of the logarithm of each factor before anything was measured."""
OUTLIER = 3.0
"""Residuals beyond so many standard deviations count less (Huber)."""
STEPS = (0.3, 0.1)
"""Differences in a factor's logarithm over which derivatives are taken, the coarse ones first: the order of
a queue jumps, and only over a wide step does the trend show."""
FOLDS, STUDENT_T = 5, 2.776
"""Parts of the requests that are left out in turn, and Student's t of one part less at 95 %."""
LEAST_REQUESTS = 20
"""Fewer requests are not split."""
MOST_STEPS, MOST_TRIES = 40, 6
_UNFINISHED = 10.0
"""Residual of a time that the simulation does not have."""


@dataclass(frozen=True)
class Target:
    """The engine that was measured: the shipped profile to start from, and the settings it ran with."""

    model: ModelSpec
    gpu: GpuProfile
    tp: int
    version: EngineVersion
    config: EngineConfig
    placed: ModelOnInstance
    shared: bool = False
    """Whether the server runs on the engine's cores, so that each request holds the engine up."""

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the factors to find."""
        return FACTOR_NAMES if self.shared else FACTOR_NAMES[:-1]

    def with_factors(self, factors: Factors) -> ModelOnInstance:
        gpu = with_factors(self.gpu, self.model, self.tp, factors, name=self.gpu.name, source="trial")
        return replace(
            self.placed,
            step=step_model(self.model, gpu, self.tp, self.version),
            intake_s=gpu.intake_s.value if gpu.intake_s else 0.0,
        )


@dataclass(frozen=True)
class FitResult:
    """``bounds``: 95 % confidence of each factor, by leaving out a fifth of the requests in turn; a factor
    not in ``determined`` is the shipped profile's for want of evidence. Errors are mean absolute relative
    errors of single times; ``held_out_mape`` is that of requests that took no part in the fit."""

    factors: Factors
    bounds: dict[str, tuple[float, float]]
    determined: frozenset[str]
    times: int
    shipped_mape: float
    mape: float
    held_out_mape: float | None


def shipped_error(target: Target, observations: Sequence[Observation]) -> float:
    """Mean absolute logarithm of simulated over measured times under the shipped profile."""
    measured, _, _ = _measured(observations)
    found = _simulated(target, observations, np.zeros(len(FACTOR_NAMES) - 1)) - measured
    return float(np.nanmean(np.abs(found))) if np.isfinite(found).any() else float("inf")


def fit_factors(target: Target, observations: Sequence[Observation]) -> FitResult:
    """Raises InputError where there is nothing to fit to."""
    measured, groups, noises = _measured(observations)
    there = np.isfinite(measured)
    if not there.any():
        raise InputError("no measured time above 0 to fit to; ttft, tpot or e2e of requests is wanted")
    known, group, noise = measured[there], groups[there], noises[there]

    def residuals(theta: Floats) -> Floats:
        found: Floats = _simulated(target, observations, theta)[there] - known
        return found

    names = target.factors
    shipped = residuals(np.zeros(len(FACTOR_NAMES) - 1))
    start = np.full(len(names), -float(np.nanmedian(shipped)))  # as if all were slower alike
    if target.shared:
        start[-1] = 0.0
    theta, covariance = _least_squares(residuals, noise, start, np.ones(len(known), dtype=np.bool_), STEPS)
    deviation = np.sqrt(np.diag(covariance))
    margin, held_out = 1.96 * deviation, None
    if len(np.unique(group)) >= LEAST_REQUESTS:
        thetas, errors = [], []
        for fold in range(FOLDS):
            out = group % FOLDS == fold
            without, _ = _least_squares(residuals, noise, theta, ~out, STEPS)
            thetas.append(without)
            errors.append(np.abs(np.expm1(residuals(without)[out])))
        held_out = float(np.concatenate(errors).mean())
        spread = np.sqrt((FOLDS - 1) * np.var(thetas, axis=0))  # the jackknife's standard error
        margin = np.maximum(margin, STUDENT_T * spread)
    return FitResult(
        factors=_factors(theta),
        bounds={
            name: (float(np.exp(value - wide)), float(np.exp(value + wide)))
            for name, value, wide in zip(names, theta, margin, strict=True)
        },
        determined=frozenset(name for name, sd in zip(names, deviation, strict=True) if sd < PULL / 4),
        times=len(known),
        shipped_mape=_mape(shipped),
        mape=_mape(residuals(theta)),
        held_out_mape=held_out,
    )


def _factors(theta: Floats) -> Factors:
    return Factors(*np.exp(theta).tolist())


def _mape(residuals: Floats) -> float:
    return float(np.abs(np.expm1(residuals)).mean())


def _measured(observations: Sequence[Observation]) -> tuple[Floats, Floats, Floats]:
    """Logarithms of all measured times, NaN where there is none; the request that each is of; their noise.

    An end-to-end time is left out where the times to the first token and per token say the same.
    """
    times, groups, noises, first = [], [], [], 0
    for each in observations:
        rows, log = len(each.log), dict(each.log.measured)
        if "ttft_s" in log and "tpot_s" in log and "e2e_s" in log:
            log["e2e_s"] = np.where(np.isfinite(log["ttft_s"] + log["tpot_s"]), np.nan, log["e2e_s"])
        for name in TIMES:
            times.append(log.get(name, np.full(rows, np.nan)))
            groups.append(first + np.arange(rows))
            noises.append(np.full(rows, NOISE[name]))
        times.append(np.array([np.nan if each.makespan_s is None else each.makespan_s]))
        groups.append(np.array([first]))
        noises.append(np.array([NOISE["makespan_s"]]))
        first += rows
    together = np.concatenate(times)
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = np.where(together > 0, np.log(together), np.nan)
    return logarithms, np.concatenate(groups), np.concatenate(noises)


def _simulated(target: Target, observations: Sequence[Observation], theta: Floats) -> Floats:
    """Logarithms of the simulated times, in the order of ``_measured``."""
    factors = _factors(theta)
    placed, server_s = target.with_factors(factors), request_s(target.version, factors)
    parts = []
    for each in observations:
        in_server = 0.0 if each.makespan_s is not None else server_s
        times = simulate_log(each.log, placed, target.config, request_s=in_server).times
        parts += [times[name] for name in TIMES]
        parts.append(np.array([np.nanmax(each.log.arrival_s + times["e2e_s"])]))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(np.concatenate(parts))


def _least_squares(
    residuals: Callable[[Floats], Floats],
    noise: Floats,
    start: Floats,
    rows: NDArray[np.bool_],
    steps: Sequence[float],
) -> tuple[Floats, Floats]:
    """The best logarithms of the factors over these rows, and their covariance (Levenberg and Marquardt)."""

    def scaled(theta: Floats) -> Floats:
        found = residuals(theta)[rows]
        return np.where(np.isfinite(found), found, _UNFINISHED) / noise[rows]

    def cost(theta: Floats, r: Floats, limit: float) -> float:
        size = np.abs(r)
        huber = np.where(size <= limit, 0.5 * r**2, limit * (size - 0.5 * limit))
        return float(huber.sum()) + 0.5 * float((theta**2).sum()) / PULL**2

    theta, r = start.copy(), scaled(start)
    width, damping = 0, 1e-2
    for _ in range(MOST_STEPS):
        limit = OUTLIER * max(1.0, 1.48 * float(np.median(np.abs(r))))
        weights = np.minimum(1.0, limit / np.maximum(np.abs(r), 1e-300))
        slopes = np.empty((len(r), len(theta)))
        for k, step in enumerate(steps[width] * np.eye(len(theta))):
            slopes[:, k] = (scaled(theta + step) - scaled(theta - step)) / (2 * steps[width])
        hessian = slopes.T @ (weights[:, None] * slopes) + np.eye(len(theta)) / PULL**2
        gradient = slopes.T @ (weights * r) + theta / PULL**2
        before = cost(theta, r, limit)
        after = before
        for _ in range(MOST_TRIES):
            move = -np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), gradient)
            trial = theta + np.clip(move, -1.5, 1.5)
            trial_r = scaled(trial)
            after = cost(trial, trial_r, limit)
            if after < before:
                theta, r = trial, trial_r
                damping = max(damping / 5, 1e-6)
                break
            damping *= 5
        if before - after < 1e-5 * before:
            if width == len(steps) - 1:
                break
            width, damping = width + 1, 1e-2
    freedom = max(1, len(r) - len(theta))
    scale = max(1.0, float((weights * r**2).sum()) / freedom)
    return theta, np.linalg.inv(hessian) * scale
