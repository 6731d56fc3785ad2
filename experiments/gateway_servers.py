"""The servers of ``gateway_cost``, each a process of its own: a fake engine, our gateway, LiteLLM's proxy."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from live.engines.supervise import free_port

MODEL = "llama-2-7b"
PEER = "LiteLLM"
CORES = sorted(os.sched_getaffinity(0))
GATEWAY_CORES = set(CORES[-1:])
PEER_SETTINGS = {"LITELLM_LOG": "ERROR", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}


def gateway_config(engine: str, folder: Path, more: str = "") -> Path:
    path = folder / "live.toml"
    path.write_text(
        f'[gateway]\nport = 0\nmax_body_mib = 64.0\n[[model]]\nname = "{MODEL}"\n[[engine]]\nid = "e0"\n'
        f'url = "{engine}"\nmodels = ["{MODEL}"]\ngpu = "H100"\nmax_num_seqs = 256\n{more}'
    )
    return path


def peer_config(engine: str, folder: Path) -> Path:
    path = folder / "litellm.yaml"
    path.write_text(
        f"model_list:\n  - model_name: {MODEL}\n    litellm_params:\n"
        f"      model: text-completion-openai/{MODEL}\n      api_base: {engine}/v1\n      api_key: none\n"
        "litellm_settings:\n  set_verbose: false\n  drop_params: false\n"
    )
    return path


class Process:
    """A server process, its URL, and the processor time that it and its children used."""

    def __init__(
        self, name: str, command: Sequence[str], url: str, log: Path, cores: set[int] | None = None
    ) -> None:
        """``cores``: those it runs on; None for the ones of this process."""
        self.name = name
        self.url = url
        self.log = log
        environment = os.environ | PEER_SETTINGS
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        if cores is not None:
            os.sched_setaffinity(self._process.pid, cores)

    async def up(self, path: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while True:
            if self._process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{self.name} does not start:\n{self.log.read_text()[-2000:]}")
            with contextlib.suppress(OSError):
                await asyncio.to_thread(urllib.request.urlopen, self.url + path, timeout=2)
                return
            await asyncio.sleep(0.2)

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> float:
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start_engine(folder: Path, speed: float) -> Process:
    """A fake engine, ``speed`` times as fast as an H100."""
    port = free_port()
    flags = ["--port", str(port), "--gpu", "H100", "--speed", str(speed), "--mean-output-tokens", "10000"]
    command = [sys.executable, "-m", "live.cli", "fake-engine", MODEL, *flags]
    return Process("engine", command, f"http://127.0.0.1:{port}", folder / f"engine-{port}.log")


def start_gateway(folder: Path, engine: str, more: str = "") -> Process:
    port = free_port()
    config = gateway_config(engine, folder, more)
    command = [sys.executable, "-m", "live.cli", "serve", str(config), "--port", str(port)]
    return Process("qlm-live", command, f"http://127.0.0.1:{port}", folder / "gateway.log", GATEWAY_CORES)


def start_peer(folder: Path, engine: str, program: str) -> Process:
    port = free_port()
    config = str(peer_config(engine, folder))
    command = [program, "--config", config, "--port", str(port), "--num_workers", "1"]
    return Process(PEER, command, f"http://127.0.0.1:{port}", folder / "peer.log", GATEWAY_CORES)
