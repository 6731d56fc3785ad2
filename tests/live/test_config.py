"""The live configuration: strict keys, and one line that says what is wrong and what would be right."""

import textwrap
from pathlib import Path

import pytest

from live.config import api_key, load_config
from qlm_sim.errors import InputError

BASE = """
[[model]]
name = "tiny"

[[engine]]
id = "e0"
models = ["tiny"]
url = "http://127.0.0.1:8101"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "live.toml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def test_a_model_and_an_engine_are_all_that_is_needed(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, BASE))
    assert config.default_class == "interactive"
    assert config.batch_class == "batch-2", "batches get the class with the longest target"
    assert config.store.url == f"sqlite:///{tmp_path}/qlm-live.db", "paths are relative to the file"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (BASE + "[gateway]\nprot = 80\n", "gateway.prot: unknown key; did you mean 'port'?"),
        (BASE + "[gateway]\nport = 'x'\n", "gateway.port: found 'x', expected a whole number"),
        (BASE + "[gateway]\nport = 70000\n", "gateway.port: found 70000, expected a whole number"),
        (BASE + "[gateway]\ntls_cert = 'c.pem'\n", "gateway.tls_key: missing"),
        (
            BASE + "[gateway]\nadvertise = '10.0.0.5:80'\n",
            "gateway.advertise: found '10.0.0.5:80', expected http",
        ),
        (
            BASE + "[gateway]\nadvertise = 'http://fd00::1:80'\n",
            "expected http://HOST:PORT or https://HOST:PORT",
        ),
        (BASE.replace("http://", ""), "engine[0].url: found '127.0.0.1:8101', expected http://HOST:PORT"),
        (BASE + "[scheduler]\npolicy = 'qlmm'\n", "scheduler.policy: found 'qlmm'; did you mean 'qlm'?"),
        (BASE + "[scheduler]\nwithout = ['pull']\n", "scheduler.without: found 'pull', expected one of"),
        (
            BASE + "[service_tier]\nflexx = 'batch-1'\n",
            "service_tier.flexx: unknown key; did you mean 'flex'?",
        ),
        (BASE + "[service_tier]\nflex = 'bath-1'\n", "service_tier.flex: found 'bath-1'; did you mean"),
        (BASE + "[store]\nurl = 'mysql://x'\n", "store.url: found 'mysql://x', expected sqlite:///PATH"),
        (BASE + "[[tenant]]\nname = 'a'\n", "tenant[0]: expected one of api_key and api_key_env"),
        (BASE + "[[tenant]]\nname = 'a'\napi_key_env = 'NOT_SET_X'\n", "NOT_SET_X is not set"),
        (
            BASE + "".join(f"[[tenant]]\nname = '{name}'\napi_key = 'k'\n" for name in "ab"),
            "tenant[1]: its API key is also that of tenant 'a'",
        ),
        (BASE.replace('["tiny"]', '["tinny"]'), "engine[0].models: found 'tinny'; did you mean 'tiny'?"),
        (
            BASE.replace("url =", "# url ="),
            "engine[0]: expected one of url or urls",
        ),
        (BASE + "[[model]]\nname = 'idle'\n", "model[1]: found 'idle', expected an engine that serves it"),
        (BASE + "[[model]]\nname = 'tiny'\n", "model[1].name: found 'tiny', expected each name once"),
    ],
)
def test_an_error_names_file_and_key_and_what_would_be_right(tmp_path: Path, text: str, error: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {error}") or (message.startswith(f"{path}: ") and error in message)
    assert "\n" not in message


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(InputError, match=r"config .*live\.toml: "):
        load_config(write(tmp_path, "[[[ "))


def test_keys_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLM_KEY_A", "secret-a")
    config = load_config(write(tmp_path, BASE + "[[tenant]]\nname = 'a'\napi_key_env = 'QLM_KEY_A'\n"))
    assert api_key(config.tenant[0]) == "secret-a"
