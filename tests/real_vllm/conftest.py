"""Real vLLM engines on CPU, on tiny models: two servers and one engine in this process, for all tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_vllm.engines_at_hand import ENV, FLAGS, Engines, KeptServer
from real_vllm.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("engines")
    made = Engines(folder)
    for seed, path in enumerate(made.paths.values()):
        make_tiny_model(Path(path), seed)
    made.run(made.start())
    yield made
    made.run(made.stop())
    made.loop.close()


@pytest.fixture(scope="session")
def in_process(engines: Engines) -> Iterator[Any]:
    """An AsyncLLM of model a, as a server that stays up from one instance to the next."""
    from live.engines.in_process import InProcessServer

    server = InProcessServer(FLAGS, engines.paths, ENV)
    engines.run(server.start("a"))
    yield KeptServer(server)
    engines.run(server.stop(kill=False))
