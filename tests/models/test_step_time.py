import math
import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlm_sim.models.engines import load_engine
from qlm_sim.models.hardware import TOKEN_GRID, gpu_names, load_gpu
from qlm_sim.models.specs import load_model, model_names
from qlm_sim.models.step_time import step_model

ENGINE = load_engine("vllm-0.11")
PLACES = [
    (gpu, model, tp)
    for gpu in gpu_names()
    for model in model_names()
    for tp in (1, 2, 4, 8)
    if load_model(model).heads % tp == 0
]
places = st.sampled_from(PLACES)


def step(place):
    gpu, model, tp = place
    return step_model(load_model(model), load_gpu(gpu), tp, ENGINE)


@given(places, st.integers(1, 256), st.integers(1, 4096))
def test_decode_never_beats_the_memory_bandwidth(place, batch, context):
    gpu, spec, tp = load_gpu(place[0]), load_model(place[1]), place[2]
    read = spec.layer_bytes + spec.head_bytes + batch * context * spec.kv_bytes_per_token
    least = read / tp / gpu.bandwidth_bytes_per_s.value
    assert step(place).iteration_s(batch, batch, batch * context, 0) >= least


@given(places, st.integers(1, 40_000))
def test_prefill_never_beats_the_peak_flops(place, tokens):
    gpu, spec, tp = load_gpu(place[0]), load_model(place[1]), place[2]
    pairs = tokens * (tokens + 1) // 2
    flops = tokens * spec.flops_per_token + pairs * spec.flops_per_attention_pair
    assert step(place).iteration_s(tokens, 1, 0, pairs) >= flops / tp / gpu.flops.value


@given(places, st.integers(1, 20_000), st.integers(1, 2000))
def test_more_tokens_never_take_less_time(place, tokens, more):
    model = step(place)
    assert model.base_s(tokens + more) >= model.base_s(tokens)


@given(places, st.integers(1, 10_000))
def test_every_term_adds(place, amount):
    model = step(place)
    alone = model.iteration_s(64, 64, 0, 0)
    assert model.iteration_s(64, 64 + amount, 0, 0) > alone
    assert model.iteration_s(64, 64, amount, 0) > alone
    assert model.iteration_s(64, 64, 0, amount) > alone


@given(places, st.floats(0.25, 4), st.integers(1, 10_000), st.integers(1, 256), st.integers(0, 10**6))
def test_scaled_engine_is_slower_in_every_term(place, factor, tokens, seqs, amount):
    model = step(place)
    expected = factor * model.iteration_s(tokens, seqs, amount, amount)
    assert math.isclose(
        model.scaled(factor).iteration_s(tokens, seqs, amount, amount), expected, rel_tol=1e-9
    )


@given(places, st.integers(0, len(TOKEN_GRID) - 2))
def test_base_is_the_line_between_grid_points(place, index):
    low, high = TOKEN_GRID[index : index + 2]
    model = step(place)
    middle = model.base_s((low + high) // 2)
    assert model.base_s(low) <= middle <= model.base_s(high)


@pytest.mark.parametrize("gpu", ["A100-80", "H100", "H200"])
@pytest.mark.parametrize("model", ["llama-2-70b", "llama-3.1-8b"])
def test_doubling_the_gpus_helps_but_less_than_twice(gpu, model):
    for shape in ((1, 1, 512, 0), (64, 64, 64 * 512, 0), (2048, 1, 0, 2048 * 1024)):
        seconds = [step((gpu, model, tp)).iteration_s(*shape) for tp in (1, 2, 4)]
        for few, many in pairwise(seconds):
            assert few / 2.2 < many < few


def test_slow_links_eat_what_tensor_parallel_prefill_gains():
    def speedup(gpu):
        shape = (2048, 1, 0, 2048 * 1024)
        one, four = (step((gpu, "llama-2-13b", tp)).iteration_s(*shape) for tp in (1, 4))
        return one / four

    assert speedup("H100") > 1.5 > 1 > speedup("L40S")


def test_kv_heads_that_tp_exceeds_are_replicated():
    spec = load_model("qwen2.5-7b")
    four = step(("H100", "qwen2.5-7b", 4)).kv_token_s
    eight = step_model(spec, load_gpu("H100"), 8, ENGINE).kv_token_s
    assert eight == pytest.approx(four, rel=0.3)


def test_newer_gpus_are_faster():
    shape = (32, 32, 32 * 512, 0)
    order = [
        step((gpu, "mistral-7b", 1)).iteration_s(*shape) for gpu in ("A10", "L40S", "A100-80", "H100", "H200")
    ]
    assert order == sorted(order, reverse=True)


def test_older_engines_add_more_to_an_iteration():
    spec, gpu = load_model("mistral-7b"), load_gpu("H100")
    old, new = (step_model(spec, gpu, 1, load_engine(name)) for name in ("vllm-0.2", "vllm-0.11"))
    assert old.base_s(1) - new.base_s(1) == pytest.approx(3.1e-3)
    assert old.seq_s > new.seq_s


def test_memo_changes_neither_equality_nor_pickling():
    fresh, used = step(PLACES[0]), step(PLACES[0])
    used.base_s(17)
    assert fresh == used
    assert pickle.loads(pickle.dumps(used)).base_s(17) == fresh.base_s(17)
