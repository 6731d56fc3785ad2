"""From a configuration to a service that serves."""

import asyncio
import signal

from fakes import job, read, text_of
from live_gateway import MODEL, SHORT, answers_of, batch_file, running_gateway, start_batch

from live.build import make_service, on_fakes
from live.config import load_config
from live.jobs import Finished

CONFIG = """
[[model]]
name = "llama-2-7b"
[[model]]
name = "mistral-7b"
max_model_len = 2048

[[engine]]
id = "gpu-0"
gpu = "a10"
models = ["llama-2-7b", "mistral-7b"]
resident = "mistral-7b"
swap = "sleep"
command = ["vllm", "serve", "{model}", "--port", "{port}"]
kv_tokens = 20_000
max_num_seqs = 8
"""


def test_a_cluster_can_be_tried_on_fakes_as_it_is_configured(tmp_path):
    path = tmp_path / "live.toml"
    path.write_text(CONFIG)

    async def main():
        service = make_service(on_fakes(load_config(path), speed=20.0))
        await service.start()
        try:
            await service.wait_up(30.0)
            assert service.models["llama-2-7b"].max_model_len == 4096
            assert service.models["mistral-7b"].max_model_len == 2048
            spec = service.core.ledgers["gpu-0"].spec
            assert spec.resident == "mistral-7b"
            assert {m.max_num_seqs for m in spec.models.values()} == {8}
            assert {m.kv_capacity_tokens for m in spec.models.values()} == {20_000}
            for name in ("mistral-7b", "llama-2-7b"):
                outputs = await read(service.submit(job(service, name, model=name)))
                assert text_of(outputs)
                assert isinstance(outputs[-1], Finished)
        finally:
            await service.stop()

    asyncio.run(main())


def test_a_dry_run_serves_without_the_engines_and_leaves_the_queue_alone(tmp_path, monkeypatch):
    config = f"""
[gateway]
port = 0
[store]
url = "sqlite:///kept.db"
[[model]]
name = "{MODEL}"
[[engine]]
id = "gpu-0"
gpu = "a10"
models = ["{MODEL}"]
url = "http://127.0.0.1:9"
"""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with running_gateway(tmp_path, config, "--dry-run", "--speed", "20") as gateway:
        answer = gateway.post("/v1/completions", SHORT)
        assert answer.status == 200
        assert len(answers_of(gateway, start_batch(gateway, batch_file(3)))) == 3
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(30) == 0
    assert not list(tmp_path.glob("kept*"))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
