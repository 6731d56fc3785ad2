import dataclasses
import tomllib
from importlib.resources import files

import pytest

from qlm_sim.errors import InputError
from qlm_sim.models.engines import load_engine
from qlm_sim.models.hardware import KINDS, TOKEN_GRID, gpu_names, load_gpu
from qlm_sim.models.specs import load_model

PROFILE = files("qlm_sim.hardware_profiles").joinpath("a10.toml")


def test_the_promised_gpus_are_shipped():
    assert {"A10", "A10G", "A100-40", "A100-80", "H100", "H200", "L40S", "RTX-4090"} <= set(gpu_names())


@pytest.mark.parametrize("name", gpu_names())
def test_every_figure_has_a_kind_and_a_source(name):
    gpu = load_gpu(name)
    figures = [*gpu.coefficients().values(), *gpu.links, *gpu.kernels]
    assert len(gpu.coefficients()) >= 8
    for figure in figures:
        assert figure.kind in KINDS
        assert len(figure.source) > 10
        if figure.kind != "estimate" and hasattr(figure, "held_out_mape"):
            assert 0 < figure.held_out_mape < 0.15


@pytest.mark.parametrize("name", gpu_names())
def test_fits_cover_the_degrees_of_the_links_without_repeats(name):
    gpu = load_gpu(name)
    keys = [(fit.model, fit.tp) for fit in gpu.kernels]
    assert len(keys) == len(set(keys))
    assert [link.tp for link in gpu.links] == [2, 4, 8]


@pytest.mark.parametrize("name", gpu_names())
def test_a_profile_is_in_the_file_of_its_name(name):
    entry = files("qlm_sim.hardware_profiles").joinpath(f"{name.lower()}.toml")
    assert tomllib.loads(entry.read_text("utf-8"))["name"] == name
    assert load_gpu(name).name == name


def test_gpu_names_ignore_case_and_know_aliases():
    assert load_gpu("a100-80GB") is load_gpu("A100-80")
    assert load_gpu("NVIDIA H100 80GB HBM3") is load_gpu("H100")
    assert load_gpu("rtx 4090") is load_gpu("RTX-4090")


def test_ambiguous_gpu_lists_the_choices():
    with pytest.raises(InputError, match="ambiguous; one of: A100-40, A100-80"):
        load_gpu("A100")


def test_unknown_gpu_lists_all():
    with pytest.raises(InputError, match=r"V100.*A10, A100-40.*RTX-4090"):
        load_gpu("V100")


def test_own_fit_is_taken_before_a_nearer_size():
    gpu = load_gpu("H100")
    for model in ("llama-2-7b", "qwen2.5-7b", "codellama-34b"):
        assert gpu.kernel_fit(load_model(model), 1).model == model


def test_model_without_fit_takes_the_nearest_size():
    gpu = load_gpu("H100")
    unknown = dataclasses.replace(load_model("codellama-34b"), name="own-34b", layers=47)
    assert gpu.kernel_fit(unknown, 1).model == "codellama-34b"


def profile(tmp_path, old, new):
    path = tmp_path / "own.toml"
    text = PROFILE.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


def test_own_profile_is_read_from_its_path(tmp_path):
    assert load_gpu(profile(tmp_path, 'name = "A10"', 'name = "Mine"')).name == "Mine"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("flops = {", "flopz = {", "'flopz' is not known"),
        ('kind = "estimate"', 'kind = "guess"', "kind = 'guess'.*estimate"),
        ("kv_efficiency = 0.78", "kv_efficiency = 1.78", "kv_efficiency = 1.78; a share"),
        ("kv_efficiency = 0.78", "kv_efficiency = 0", "kv_efficiency = 0; a number above 0"),
        ("kv_efficiency = 0.78\n", "", "missing: kv_efficiency"),
        ("products_efficiency = [0.85, ", "products_efficiency = [", f"wanted {len(TOKEN_GRID)} shares"),
        ("name = ", "name ", "not readable as TOML"),
        ("value = 2.3687e+10", "value = inf", "memory_bytes: value = inf; a number above 0"),
    ],
)
def test_bad_profile_is_refused_with_file_and_key(tmp_path, old, new, message):
    path = profile(tmp_path, old, new)
    with pytest.raises(InputError, match=message) as caught:
        load_gpu(path)
    assert str(path) in str(caught.value)


def test_missing_profile_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.toml"):
        load_gpu(tmp_path / "none.toml")


def test_engine_versions_take_the_row_that_began_last():
    assert load_engine("vllm-0.8.4").iteration_s == load_engine("vLLM-0.11").iteration_s
    assert load_engine("vllm-0.7.3").scheduler == "v0"
    assert load_engine("vllm").scheduler == "v1"
    assert load_engine("vllm-0.11").name == "vllm-0.11"
    assert not load_engine("vllm-0.18.2").reserves_whole_prompt
    assert load_engine("vllm-0.19").reserves_whole_prompt


@pytest.mark.parametrize(("name", "message"), [("tgi-2", "vllm-VERSION"), ("vllm-0.1", "too old")])
def test_unknown_engines_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        load_engine(name)


def test_every_engine_row_has_sources():
    rows = tomllib.loads(files("qlm_sim.models").joinpath("engines.toml").read_text("utf-8"))["vllm"]
    for row in rows:
        for figure in (row["iteration_s"], row["sequence_s"]):
            assert figure["kind"] in KINDS
            assert len(figure["source"]) > 10
