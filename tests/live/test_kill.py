"""Whatever is killed, gateway or engine: accepted work is answered once, and goes on where it was."""

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from live_gateway import (
    MODEL,
    SHORT,
    GatewayProcess,
    answered_lines,
    answers_of,
    batch_file,
    engines,
    eventually,
    running_engine,
    running_gateway,
    start_batch,
)

from live.fake.language import generate, tokenize, words


def test_a_batch_survives_kill_9_of_the_gateway(tmp_path: Path) -> None:
    config = engines(slots=8, speed=4.0)
    with running_gateway(tmp_path, config) as gateway:
        batch_id = start_batch(gateway, batch_file(200))
        eventually(lambda: answered_lines(gateway, batch_id) >= 20)
        before = answered_lines(gateway, batch_id)
        gateway.kill()
    with running_gateway(tmp_path, config) as gateway:
        assert answered_lines(gateway, batch_id) >= before, "what was answered stays so"
        eventually(lambda: answered_lines(gateway, batch_id) >= before + 20)
        gateway.kill()
    with running_gateway(tmp_path, config) as gateway:
        rows = answers_of(gateway, batch_id)
    assert [row["custom_id"] for row in rows] == [f"line-{n}" for n in range(200)], "each once, none lost"
    assert {row["response"]["body"]["usage"]["completion_tokens"] for row in rows} == {40}


def test_lines_go_on_where_they_were_when_the_gateway_was_killed(tmp_path: Path) -> None:
    count, tokens = 8, 1000
    with running_engine("--speed", "3", "--max-num-seqs", "8") as engine:
        config = engines(slots=8).replace('kind = "fake"', f'url = "{engine.url}"')
        with running_gateway(tmp_path, config) as gateway:
            batch_id = start_batch(gateway, batch_file(count, tokens))
            eventually(lambda: engine.metric("vllm:generation_tokens_total") > count * 600, 60)
            gateway.kill()
        before = engine.metric("vllm:generation_tokens_total")
        with running_gateway(tmp_path, config) as gateway:
            rows = answers_of(gateway, batch_id)
        generated = engine.metric("vllm:generation_tokens_total")
        assert generated < count * tokens + 0.75 * before, "no line began anew"
        assert [row["custom_id"] for row in rows] == [f"line-{n}" for n in range(count)]
        for number, row in enumerate(rows):
            prompt = tokenize(f"Line {number}")
            answer = row["response"]["body"]
            assert answer["choices"][0]["text"] == "".join(words(generate(MODEL, prompt, tokens, 1e9, True)))
            assert answer["usage"]["prompt_tokens"] == len(prompt)
            assert answer["usage"]["completion_tokens"] == tokens


OWN_ENGINES = """
[gateway]
port = 0
[[model]]
name = "llama-2-7b"
""" + "".join(
    f"""
[[engine]]
id = "e{number}"
models = ["llama-2-7b"]
command = [{json.dumps(sys.executable)}, "-m", "live.cli", "fake-engine", "{{name}}", "--port", "{{port}}",
    "--speed", "4", "--max-num-seqs", "8"]
gpu = "A100-80"
max_num_seqs = 8
backoff_s = 0.1
"""
    for number in range(2)
)


def engines_of(gateway: GatewayProcess) -> list[int]:
    """Processes of the gateway's own engines."""
    pid = gateway.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(each) for each in children if "fake-engine" in Path(f"/proc/{each}/cmdline").read_text()]


def test_nothing_is_lost_when_an_engine_is_killed_and_then_all(tmp_path: Path) -> None:
    with running_gateway(tmp_path, OWN_ENGINES) as gateway:
        eventually(lambda: all(gateway.metric("qlm_instance_up", instance=f"e{n}") == 1 for n in (0, 1)), 120)
        batch_id = start_batch(gateway, batch_file(200))
        eventually(lambda: answered_lines(gateway, batch_id) >= 10)
        talking = {**SHORT, "max_tokens": 400, "ignore_eos": True, "temperature": 0}
        expected = json.loads(gateway.post("/v1/completions", talking).read())["choices"][0]["text"]
        with ThreadPoolExecutor() as pool:
            answers = [pool.submit(gateway.post, "/v1/completions", talking) for _ in range(4)]
            eventually(lambda: gateway.metric("qlm_tenant_queued", tenant="default") >= 4)
            os.kill(engines_of(gateway)[0], signal.SIGKILL)
            texts = [json.loads(each.result().read())["choices"][0]["text"] for each in answers]
        assert texts == [expected] * 4, "the other engine went on where the killed one was"
        before = answered_lines(gateway, batch_id)
        engines_left = engines_of(gateway)
        gateway.kill()
        for pid in engines_left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    with running_gateway(tmp_path, OWN_ENGINES) as gateway:
        assert answered_lines(gateway, batch_id) >= before
        rows = answers_of(gateway, batch_id)
    assert [row["custom_id"] for row in rows] == [f"line-{n}" for n in range(200)], "each once, none lost"


def test_another_gateway_of_the_same_redis_takes_over(tmp_path: Path, redis_url: str) -> None:
    config = engines(slots=8, speed=4.0) + f'[store]\nurl = "{redis_url}"\nlease_s = 1.0\n'
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    with running_gateway(folders[0], config) as leader, running_gateway(folders[1], config) as follower:
        assert leader.get("/health")["leader"]
        assert not follower.get("/health")["leader"]
        passed_on = json.loads(follower.post("/v1/completions", SHORT).read())
        assert passed_on["usage"]["completion_tokens"] == 2
        batch_id = start_batch(follower, batch_file(200))
        eventually(lambda: answered_lines(follower, batch_id) >= 20)
        leader.kill()
        eventually(lambda: follower.get("/health")["leader"])
        rows = answers_of(follower, batch_id)
    assert [row["custom_id"] for row in rows] == [f"line-{n}" for n in range(200)], "each once, none lost"
