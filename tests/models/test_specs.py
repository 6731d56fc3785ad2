import json

import pytest

from qlm_sim.errors import InputError
from qlm_sim.models.specs import ModelSpec, load_model, model_names

PUBLISHED_PARAMETERS = {
    "mistral-7b": 7.24e9,
    "vicuna-13b": 13.02e9,
    "llama-2-7b": 6.74e9,
    "llama-2-13b": 13.02e9,
    "llama-2-70b": 68.98e9,
    "llama-3.1-8b": 8.03e9,
    "llama-3.1-70b": 70.55e9,
    "qwen2.5-7b": 7.62e9,
    "codellama-34b": 33.74e9,
}
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
"""Qwen2.5-0.5B, as Hugging Face publishes it."""


def config_file(tmp_path, **changes):
    path = tmp_path / "config.json"
    kept = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    path.write_text(json.dumps(kept))
    return path


def test_every_shipped_model_has_a_published_count():
    assert set(model_names()) == set(PUBLISHED_PARAMETERS)


@pytest.mark.parametrize(("name", "published"), PUBLISHED_PARAMETERS.items())
def test_parameters_match_the_published_count(name, published):
    assert load_model(name).parameters == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize("name", model_names())
def test_shipped_models_name_their_source(name):
    assert "Hugging Face" in load_model(name).source


def test_names_ignore_case():
    assert load_model("Mistral-7B") == load_model("mistral-7b")
    assert load_model("meta-llama/Llama-3.1-8B-Instruct") is load_model("llama-3.1-8b")


def test_grouped_query_attention_shrinks_the_kv_cache_by_the_group():
    full, grouped = load_model("llama-2-7b"), load_model("mistral-7b")
    assert full.kv_bytes_per_token == 512 * 1024
    assert grouped.kv_bytes_per_token * 4 == full.kv_bytes_per_token


def test_weights_are_layers_embedding_head_and_final_norm():
    spec = load_model("llama-2-7b")
    assert spec.weight_bytes == spec.layer_bytes + 2 * spec.head_bytes + 2 * spec.hidden_size


def test_config_of_qwen_counts_tied_embeddings_and_biases_once(tmp_path):
    spec = load_model(config_file(tmp_path))
    assert spec.parameters == pytest.approx(494e6, rel=0.005)
    assert spec.qkv_bias
    assert spec.sliding_window is None


def test_config_without_kv_heads_has_full_attention(tmp_path):
    spec = load_model(config_file(tmp_path, architectures=["LlamaForCausalLM"], num_key_value_heads=None))
    assert spec.kv_heads == spec.heads


def test_directory_with_a_config_is_a_model_named_after_it(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    config_file(folder)
    assert load_model(folder).name == "my-model"


def test_unknown_name_lists_the_shipped_ones():
    with pytest.raises(InputError, match=r"gpt-4.*mistral-7b.*config\.json"):
        load_model("gpt-4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, r"MixtralForCausalLM is not supported.*LlamaForCausalLM"),
        ({"architectures": None}, "architecture none is not supported"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"vocab_size": "many"}, "vocab_size = 'many'"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"head_dim": True}, "head_dim = True"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_bad_config_is_refused_with_its_key(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_model(config_file(tmp_path, **changes))


@pytest.mark.parametrize("text", ["[1, 2]", "{broken"])
def test_config_that_is_no_object_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(path)


def test_more_layers_only_add(tmp_path):
    small = load_model(config_file(tmp_path))
    large = load_model(config_file(tmp_path, num_hidden_layers=48))
    assert isinstance(large, ModelSpec)
    assert large.flops_per_token == 2 * small.flops_per_token
    assert large.kv_bytes_per_token == 2 * small.kv_bytes_per_token
    assert large.head_bytes == small.head_bytes
