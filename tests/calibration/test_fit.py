"""Fits find the engine that made the measurements."""

from dataclasses import replace

import numpy as np
import pytest

from qlm_sim.calibration.factors import Factors, request_s, with_factors
from qlm_sim.calibration.fit import Target, fit_factors
from qlm_sim.calibration.observations import BatchShape, Observation, read_observation
from qlm_sim.calibration.profile_file import profile_toml
from qlm_sim.errors import InputError
from qlm_sim.models.deployment import deploy
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.models.engines import load_engine
from qlm_sim.models.hardware import TOKEN_GRID, Coefficient, load_gpu
from qlm_sim.models.specs import load_model
from qlm_sim.models.step_time import step_model
from qlm_sim.validation.request_log import RequestLog
from qlm_sim.validation.simulated_log import simulate_log

TRUTH = Factors(compute=1.2, memory=0.85, iteration=1.5, sequence=2.0, request=3.0)


@pytest.fixture(scope="module")
def target() -> Target:
    model, gpu, version, config = (
        load_model("llama-2-7b"),
        load_gpu("A100-80"),
        load_engine("vllm-0.11"),
        EngineConfig(),
    )
    placed = deploy(model, gpu, 1, config, engine=version.name, storage_bytes_per_s=2e9)
    return Target(model, gpu, 1, version, config, placed)


def sweep_log(target: Target, factors: Factors, noise: float, crowds: tuple[int, ...] = ()) -> RequestLog:
    """Prompts alone, then batches of two contexts, as the engine of these factors would answer them."""
    rows = [(float(k), prompt, 2) for k, prompt in enumerate((32, 128, 512, 1024, 2048, 3000) * 2)]
    at = len(rows) + 1.0
    for batch in (1, 4, 16, 48):
        for context in (64, 768):
            rows += [(at, context, 48)] * batch
            at += 10.0
    for crowd in crowds:
        rows += [(at, 1, 1)] * crowd
        at += 10.0
    arrival, prompt, output = (np.array(column) for column in zip(*rows, strict=True))
    log = RequestLog("sweep", arrival, prompt, output, {})
    times = simulate_log(
        log,
        target.with_factors(factors),
        target.config,
        request_s=request_s(target.version, factors),
    ).times
    rng = np.random.default_rng(7)
    noisy = {name: each * np.exp(noise * rng.standard_normal(len(log))) for name, each in times.items()}
    return replace(log, measured=noisy)


def test_exact_times_give_the_factors_back(target: Target) -> None:
    found = fit_factors(target, [Observation(sweep_log(target, TRUTH, noise=0.0))])
    assert found.factors.compute == pytest.approx(TRUTH.compute, rel=0.02)
    assert found.factors.memory == pytest.approx(TRUTH.memory, rel=0.02)
    assert found.factors.iteration == pytest.approx(TRUTH.iteration, rel=0.10)
    assert found.factors.sequence == pytest.approx(TRUTH.sequence, rel=0.10)
    assert found.mape < 0.01 < found.shipped_mape


def test_what_a_request_as_such_takes_of_the_engine_is_told_from_its_steps(target: Target) -> None:
    """By crowds of requests that hardly need any step."""
    shared, truth = replace(target, shared=True), replace(TRUTH, intake=5.0)
    log = sweep_log(shared, truth, noise=0.0, crowds=(64, 256))
    found = fit_factors(shared, [Observation(log)])
    assert found.factors.intake == pytest.approx(5.0, rel=0.03)
    assert found.factors.memory == pytest.approx(TRUTH.memory, rel=0.02)
    assert fit_factors(target, [Observation(log)]).mape > 5 * found.mape


def test_noisy_times_give_bounds_that_hold_the_factors(target: Target) -> None:
    found = fit_factors(target, [Observation(sweep_log(target, TRUTH, noise=0.03))])
    for name in ("compute", "memory", "iteration", "sequence", "request"):
        low, high = found.bounds[name]
        assert low <= getattr(TRUTH, name) <= high
    assert found.held_out_mape is not None
    assert found.held_out_mape < 0.05


def test_what_was_not_measured_stays_as_shipped(target: Target) -> None:
    """Makespans of one small batch tell of memory, and nothing of large products."""
    log = RequestLog("batch", np.zeros(1), np.array([8]), np.array([400]), {})
    slow = Factors(memory=1.3)
    times = simulate_log(log, target.with_factors(slow), target.config, request_s=0.0).times
    found = fit_factors(target, [Observation(log, float(times["e2e_s"][0]))])
    assert "compute" not in found.determined
    assert found.factors.compute == pytest.approx(1.0, abs=0.05)
    assert found.mape < 0.01


def test_the_corner_of_the_roofline_moves_with_what_bounds_it(target: Target) -> None:
    """An engine with far more bandwidth for its FLOPS is bound by these from few tokens on."""
    shift = 12.0
    gpu = with_factors(target.gpu, target.model, 1, Factors(compute=shift), name="cpu", source="made up")
    ours, theirs = (
        gpu.kernels[0].products_efficiency,
        target.gpu.kernel_fit(target.model, 1).products_efficiency,
    )
    for tokens, efficiency in zip(TOKEN_GRID, ours, strict=True):
        there = np.interp(np.log(tokens * shift), np.log(TOKEN_GRID), theirs)
        assert efficiency == pytest.approx(there)


def test_the_written_profile_has_the_fitted_step_times(target: Target, tmp_path) -> None:
    slow = replace(TRUTH, intake=2.0)
    fitted = with_factors(target.gpu, target.model, 1, slow, name="mine", source="measured")
    path = tmp_path / "mine.toml"
    path.write_text(profile_toml(fitted, held_out_mape=0.03, comment="measured"))
    read = load_gpu(path)
    assert read.intake_s == fitted.intake_s == Coefficient(2e-3, "fitted", "measured")
    ours, theirs = (
        step_model(target.model, gpu, 1, target.version).iteration_s(200, 9, 5000, 3000)
        for gpu in (fitted, read)
    )
    assert theirs == pytest.approx(ours, rel=1e-12)
    assert read.kernel_fit(target.model, 1).held_out_mape == 0.03


def test_latency_and_throughput_results_are_batches(tmp_path) -> None:
    latency, throughput = tmp_path / "latency.json", tmp_path / "throughput.json"
    latency.write_text('{"avg_latency": 1.5, "latencies": [1.4, 1.6]}')
    throughput.write_text('{"elapsed_time": 9.0, "num_requests": 30, "requests_per_second": 3.3}')
    shape = BatchShape(input_len=128, output_len=64, batch_size=4)
    one, many = read_observation(str(latency), shape), read_observation(str(throughput), shape)
    assert (len(one.log), one.makespan_s) == (4, 1.5)
    assert (len(many.log), many.makespan_s) == (30, 9.0)
    with pytest.raises(InputError, match=r"latency\.json: .* --batch-size"):
        read_observation(str(latency), BatchShape(128, 64))
