import json

import pytest

from qlm_sim.errors import InputError
from qlm_sim.models.deployment import deploy
from qlm_sim.models.describe import describe
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.models.hardware import gpu_names, load_gpu
from qlm_sim.models.memory import kv_capacity_blocks
from qlm_sim.models.specs import load_model
from qlm_sim.models.swap import load_s, swap_in_s

DEFAULTS = EngineConfig()


def place(model, gpu, tp, config=DEFAULTS):
    spec = load_model(model)
    return deploy(spec, load_gpu(gpu), tp, config, engine="vllm-0.11", storage_bytes_per_s=2e9)


@pytest.mark.parametrize(
    ("model", "gpu", "tp"),
    [
        ("mistral-7b", "A10", 1),
        ("vicuna-13b", "A10", 2),
        ("mistral-7b", "A100-80", 1),
        ("vicuna-13b", "A100-80", 1),
        ("llama-2-70b", "A100-80", 4),
    ],
)
def test_the_papers_models_are_served_on_its_gpus(model, gpu, tp):
    placed = place(model, gpu, tp)
    assert placed.kv_capacity_tokens % DEFAULTS.block_size == 0
    assert placed.kv_capacity_tokens >= placed.max_model_len
    assert placed.weight_bytes == load_model(model).weight_bytes


def test_what_does_not_fit_is_refused_with_the_arithmetic():
    with pytest.raises(InputError) as refused:
        place("llama-2-70b", "A10", 1)
    message = str(refused.value)
    assert "weights 128.48 GiB + overhead" in message
    assert "0.9 x 22.06 GiB = 19.85 GiB" in message
    assert "smallest tp that fits is 8" in message
    place("llama-2-70b", "A10", 8)
    with pytest.raises(InputError, match="smallest tp that fits is 8"):
        place("llama-2-70b", "A10", 4)


def test_degree_that_splits_no_heads_is_refused():
    with pytest.raises(InputError, match=r"tp = 8 does not divide the 28 .*1, 2, 4"):
        place("qwen2.5-7b", "H100", 8)


@pytest.mark.parametrize(
    ("gpu", "model", "batched_tokens", "blocks"),
    [
        ("A10", "llama-2-7b", 4400, 862),
        ("A10", "llama-2-7b", 7500, 832),
        ("A10", "llama-2-7b", 8700, 831),
        ("A10", "llama-2-7b", 12000, 792),
        ("H100", "llama-2-7b", 4096, 7438),
        ("H100", "codellama-34b", 4096, 2537),
        ("A100-80", "llama-2-7b", 4096, 7351),
    ],
)
def test_kv_blocks_are_within_two_percent_of_engines_logs(gpu, model, batched_tokens, blocks):
    config = EngineConfig(max_num_batched_tokens=batched_tokens)
    assert kv_capacity_blocks(load_model(model), load_gpu(gpu), 1, config) == pytest.approx(blocks, rel=0.02)


def test_blocks_told_by_a_log_are_taken():
    assert place("mistral-7b", "A10", 1, EngineConfig(num_gpu_blocks=1000)).kv_capacity_tokens == 16_000


def test_memory_of_all_gpus_counts():
    tokens = [place("llama-2-13b", "A100-80", tp).kv_capacity_tokens for tp in (1, 2, 4)]
    assert tokens[1] > 2 * tokens[0]
    assert tokens[2] > 2 * tokens[1]


def test_kv_capacity_falls_with_a_larger_token_budget_and_rises_with_utilization():
    def blocks(**settings):
        return kv_capacity_blocks(load_model("mistral-7b"), load_gpu("A10"), 1, EngineConfig(**settings))

    assert blocks(max_num_batched_tokens=16384) < blocks(max_num_batched_tokens=8192) < blocks()
    assert blocks(gpu_memory_utilization=0.8) < blocks(gpu_memory_utilization=0.95)


def test_context_that_the_cache_cannot_hold_is_cut_unless_asked_for():
    placed = place("llama-3.1-8b", "A10", 1)
    assert placed.max_model_len == placed.kv_capacity_tokens < load_model("llama-3.1-8b").max_model_len
    with pytest.raises(InputError, match=f"at most {placed.kv_capacity_tokens} fits"):
        place("llama-3.1-8b", "A10", 1, EngineConfig(max_model_len=131072))
    assert place("llama-3.1-8b", "A10", 1, EngineConfig(max_model_len=8192)).max_model_len == 8192


def test_swaps_come_near_vllms_wake_up_times():
    a100 = load_gpu("A100-80")
    rate = (61e9 - 8.3e9) / (2.87 - 0.82)
    spec = load_model("codellama-34b")
    assert swap_in_s(spec, a100, 1) == pytest.approx(0.82 + (spec.weight_bytes - 8.3e9) / rate, rel=0.1)


def test_gpus_that_wake_together_share_the_hosts_bandwidth():
    spec, gpu = load_model("llama-2-70b"), load_gpu("A100-80")
    seconds = [swap_in_s(spec, gpu, tp) for tp in (1, 2, 4, 8)]
    assert seconds[0] > seconds[1] == seconds[2] == seconds[3]


def test_storage_slower_than_the_loader_decides_the_load():
    spec, gpu = load_model("mistral-7b"), load_gpu("A10")
    assert load_s(spec, gpu, 1, 1e9) == pytest.approx(spec.weight_bytes / 1e9 + swap_in_s(spec, gpu, 1))
    assert load_s(spec, gpu, 1, 1e12) == load_s(spec, gpu, 1, 1e11) > swap_in_s(spec, gpu, 1)


@pytest.mark.parametrize("gpu", gpu_names())
def test_description_stays_under_its_roofline_and_is_json(gpu):
    spec = load_model("mistral-7b")
    told = describe(spec, load_gpu(gpu), 1, DEFAULTS)
    assert json.loads(json.dumps(told)) == told
    rates = [*told["decode"].values(), told["prefill"]]
    for rate in rates:
        if rate["tokens_per_s"] is not None:
            assert 0.2 * rate["roofline_tokens_per_s"] < rate["tokens_per_s"] < rate["roofline_tokens_per_s"]
    assert told["engine"] == "vllm-0.11"
    assert told["fit"]["source"]


def test_batch_that_the_cache_cannot_hold_has_no_rate():
    told = describe(load_model("llama-2-7b"), load_gpu("A10"), 1, DEFAULTS, context_tokens=2048)
    assert told["decode"]["1"]["tokens_per_s"] > 0
    assert told["decode"]["128"]["tokens_per_s"] is None
