"""What is shipped for deployment holds: configurations are read, linters pass, no key is untold."""

import dataclasses
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from live_gateway import engines, running_gateway

from live.config import LiveConfig, load_config
from live.config.schema import GatewayConfig
from live.gateway.leadership import own_url

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCS = (ROOT / "docs" / "deploy.md").read_text()


def test_the_sample_configuration_is_read() -> None:
    assert load_config(DEPLOY / "live.toml").batch_class == "batch"


def test_configurations_in_the_docs_and_the_manifest_are_read(tmp_path: Path) -> None:
    manifest = (DEPLOY / "kubernetes" / "qlm-live.yaml").read_text()
    block = manifest.split("live.toml: |\n")[1].split("---")[0]
    texts = [re.sub(r"^ {4}", "", block, flags=re.M), *re.findall(r"```toml\n(.*?)```", DOCS, re.S)]
    assert len(texts) >= 2
    for text in texts:
        path = tmp_path / "live.toml"
        path.write_text(text)
        load_config(path)


def keys(kind: Any) -> set[str]:
    """Every key of a configuration dataclass and those below it."""
    found: set[str] = set()
    for name, hint in get_type_hints(kind).items():
        inner = [hint, *get_args(hint)] if get_origin(hint) is tuple else [hint]
        below = [each for each in inner if dataclasses.is_dataclass(each)]
        found |= set().union(*(keys(each) for each in below)) if below else {name}
    return found


def test_the_docs_explain_every_key() -> None:
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", DOCS, flags=re.S))
    told = {word for span in spans for word in re.findall(r"[a-z_0-9]+", span)}
    assert keys(LiveConfig) - told == set()


def test_the_dockerfile_passes_hadolint() -> None:
    beside_python = str(Path(sys.executable).parent)
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=beside_python)
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_copies_what_is_there() -> None:
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source


def test_the_kubernetes_manifest_is_valid() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    yaml = pytest.importorskip("yaml")
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "qlm-live.yaml").read_text()))
    assert len(documents) == 6
    for document in documents:
        validate.validate(document, "1.37", strict=True)


@pytest.mark.parametrize(
    ("host", "addresses", "url"),
    [
        ("0.0.0.0", ["10.1.2.3"], "http://10.1.2.3:8000"),  # a pod: its name resolves only in itself
        ("0.0.0.0", ["fd00::1", "10.1.2.3"], "http://10.1.2.3:8000"),
        ("::", ["fd00::1", "10.1.2.3"], "http://10.1.2.3:8000"),
        ("::", ["fe80::1%eth0", "fd00::1"], "http://[fd00::1]:8000"),  # a pod that has IPv6 alone
        ("0.0.0.0", ["127.0.1.1"], "http://qlm-live-x:8000"),  # Debian: its own name is itself
        ("0.0.0.0", [], "http://qlm-live-x:8000"),
        ("127.0.0.1", ["10.1.2.3"], "http://127.0.0.1:8000"),
        ("fd00::1", ["10.1.2.3"], "http://[fd00::1]:8000"),
    ],
)
def test_a_gateway_is_told_where_others_reach_it(
    host: str, addresses: list[str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_name(name: str, port: None, family: int, *_: object) -> list[tuple[Any, ...]]:
        of_family = [each for each in addresses if (":" in each) == (family == socket.AF_INET6)]
        if not of_family:
            raise socket.gaierror("Name or service not known")
        return [(family, 1, 6, "", (each, 0)) for each in of_family]

    monkeypatch.setattr(socket, "gethostname", lambda: "qlm-live-x")
    monkeypatch.setattr(socket, "getaddrinfo", by_name)
    assert own_url(GatewayConfig(host=host), 8000) == url
    assert own_url(GatewayConfig(host=host, advertise="https://me/"), 8000) == "https://me"


def test_a_gateway_serves_on_ipv6(tmp_path: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    config = engines().replace("port = 0", 'host = "::1"\nport = 0')
    with running_gateway(tmp_path, config) as gateway:
        assert gateway.url.startswith("http://[::1]:")
        assert gateway.get("/health")["leader"]


def test_the_systemd_unit_is_valid() -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not on PATH")
    done = subprocess.run(
        [analyze, "verify", str(DEPLOY / "qlm-live.service")], capture_output=True, text=True
    )
    said = [line for line in done.stderr.splitlines() if "is not executable" not in line]
    assert not said, "the program is not installed here; nothing else is wrong"
