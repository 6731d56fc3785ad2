"""The stock ``openai`` client against ``qlm-live serve``, unchanged."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from live_gateway import MODEL, GatewayProcess, engines, eventually, running_gateway

CONFIG = (
    'default_slo = "batch-1"\n'
    + engines()
    + """
[service_tier]
priority = "interactive"
flex = "batch-2"

[[tenant]]
name = "a"
api_key = "key-a"

[[tenant]]
name = "b"
api_key = "key-b"
"""
)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), CONFIG) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def client(gateway: GatewayProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="key-a", max_retries=0)


def ask(client: openai.OpenAI, **more: Any) -> Any:
    settings = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    return client.chat.completions.create(**{**settings, **more})  # type: ignore[call-overload]


def test_chat_answers_whole_and_streamed_alike(client: openai.OpenAI) -> None:
    whole = ask(client, temperature=0)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 8
    chunks = list(ask(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_usage_can_come_with_every_piece(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(client, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_completions_of_several_prompts_share_an_answer(client: openai.OpenAI) -> None:
    each = [
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=4).choices[0].text
        for prompt in ("one", "another")
    ]
    both = client.completions.create(model=MODEL, prompt=["one", "another"], max_tokens=4)
    assert [(choice.index, choice.text) for choice in both.choices] == list(enumerate(each))
    assert both.usage is not None
    assert both.usage.completion_tokens == 8
    texts = ["", ""]
    for chunk in client.completions.create(model=MODEL, prompt=["one", "another"], max_tokens=4, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == each


def test_tokens_are_a_prompt_too(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=4)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("absent")


def test_errors_are_those_that_the_client_knows(client: openai.OpenAI, gateway: GatewayProcess) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ask(client, model="absent")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        ask(client, max_tokens=0)
    with pytest.raises(openai.BadRequestError, match=r"Expected `float \| null`, got `str`") as caught:
        ask(client, temperature="hot")
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="min_tokens"):
        ask(client, extra_body={"min_tokens": "5"})
    with pytest.raises(openai.BadRequestError, match="max_completion_tokens"):
        ask(client, max_completion_tokens="abc")
    with pytest.raises(openai.BadRequestError, match="at least one message"):
        ask(client, messages=[])
    with pytest.raises(openai.BadRequestError, match="context length") as too_long:
        client.completions.create(model=MODEL, prompt=[1] * 5000, max_tokens=4)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="wrong"))
    for path, status in (("/v1/absent", 404), ("/v1/batches/x", 405)):
        answer = gateway.post(path, {}, {"authorization": "Bearer key-a"})
        assert answer.status == status
        assert json.loads(answer.read())["error"]["type"]
    answer = gateway.post("/v1/completions", [1], {"authorization": "bearer key-a"})
    assert answer.status == 400
    assert gateway.post("/v1/completions", [1], {"authorization": "Basic key-a"}).status == 401


def test_only_a_chat_knows_max_completion_tokens(client: openai.OpenAI) -> None:
    more = {"max_completion_tokens": "abc"}
    answer = client.completions.create(model=MODEL, prompt="Hello", max_tokens=4, extra_body=more)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert ask(client, max_completion_tokens=3).usage.completion_tokens == 3


DEEP = b"[" * 5000 + b"]" * 5000
CHAT_START = b'{"model": "%b", "messages": [{"role": "user", "content": "Hello"}], ' % MODEL.encode()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT_START + b'"x": ' + DEEP + b"}"),
        ("/v1/chat/completions", CHAT_START + b'"max_tokens": 1' + b"0" * 400 + b"}"),
        ("/v1/batches", b'{"output_expires_after": ' + DEEP + b"}"),
    ],
    ids=["deep", "long-number", "deep-batch"],
)
def test_json_that_is_too_much_is_the_fault_of_the_client(
    gateway: GatewayProcess, path: str, body: bytes
) -> None:
    assert gateway.post(path, body, {"authorization": "Bearer key-a"}).status == 400


def test_the_wait_is_told_in_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=2
    )
    median = int(raw.headers["x-qlm-estimated-wait-ms"])
    assert 0 <= median <= int(raw.headers["x-qlm-estimated-wait-p90-ms"])
    assert raw.headers["x-qlm-queue-position"] == "0"
    assert raw.headers["x-request-id"] == raw.parse().id


@pytest.mark.parametrize(
    ("settings", "slo_class"),
    [
        ({}, "batch-1"),
        ({"service_tier": "auto"}, "batch-1"),
        ({"service_tier": "priority"}, "interactive"),
        ({"service_tier": "flex"}, "batch-2"),
        ({"extra_headers": {"x-qlm-slo-class": "batch-2"}}, "batch-2"),
        ({"extra_headers": {"x-slo-ttft-ms": "15000"}}, "interactive"),
        ({"service_tier": "priority", "extra_headers": {"x-qlm-slo-class": "batch-2"}}, "batch-2"),
    ],
)
def test_the_slo_comes_from_tier_or_header(
    client: openai.OpenAI, gateway: GatewayProcess, settings: dict[str, Any], slo_class: str
) -> None:
    def met() -> float:
        return gateway.metric("qlm_slo_requests_total", slo_class=slo_class, met="true")

    before = met()
    answer = ask(client, **settings)
    assert met() == before + 1
    tier = settings.get("service_tier")
    assert answer.service_tier == (None if tier == "auto" else tier)


def test_a_target_of_the_client_is_held_against_the_answer(
    client: openai.OpenAI, gateway: GatewayProcess
) -> None:
    ask(client, extra_headers={"x-slo-ttft-ms": "0.001", "x-qlm-slo-class": "interactive"})
    assert gateway.metric("request_slo_violation_total", slo_class="interactive") >= 1


@pytest.mark.parametrize(
    "settings",
    [
        {"service_tier": "turbo"},
        {"extra_headers": {"x-qlm-slo-class": "absent"}},
        {"extra_headers": {"x-slo-ttft-ms": "-1"}},
        {"extra_headers": {"x-slo-tpot-ms": "soon"}},
        {"extra_headers": {"x-qlm-progress": "often"}},
        {"stream_options": {"include_usage": True}},
    ],
)
def test_a_promise_that_makes_no_sense_is_refused(client: openai.OpenAI, settings: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        ask(client, **settings)


# Files and batches


def lines(count: int, **changes: Any) -> bytes:
    rows = []
    for number in range(count):
        row: dict[str, Any] = {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": MODEL,
                "messages": [{"role": "user", "content": f"Question {number}"}],
                "max_tokens": 4,
            },
        }
        rows.append(json.dumps({**row, **changes}))
    return "\n".join(rows).encode()


def upload(client: openai.OpenAI, content: bytes) -> str:
    return client.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch").id


def start(client: openai.OpenAI, content: bytes, window: str = "24h") -> Any:
    return client.batches.create(
        input_file_id=upload(client, content),
        endpoint="/v1/chat/completions",
        completion_window=window,  # type: ignore[arg-type]
        metadata={"of": "tests"},
    )


def ended(client: openai.OpenAI, batch_id: str, seconds: float = 60) -> Any:
    def check() -> Any:
        batch = client.batches.retrieve(batch_id)
        return batch if batch.status in ("completed", "failed", "expired", "cancelled") else None

    return eventually(check, seconds)


def test_files_come_back_and_belong_to_one_tenant(client: openai.OpenAI) -> None:
    content = lines(3)
    file_id = upload(client, content)
    assert client.files.content(file_id).read() == content
    assert client.files.retrieve(file_id).bytes == len(content)
    assert file_id in [file.id for file in client.files.list(purpose="batch")]
    other = client.with_options(api_key="key-b")
    assert file_id not in [file.id for file in other.files.list()]
    with pytest.raises(openai.NotFoundError):
        other.files.content(file_id)
    assert client.files.delete(file_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file_id)
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("x", b"x"), purpose="fine-tune")


def test_a_file_name_is_unicode(client: openai.OpenAI, gateway: GatewayProcess) -> None:
    form = (
        b'--zz\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--zz\r\ncontent-disposition: form-data; name="file"; filename="\\ud800.jsonl"\r\n\r\n'
        b"x\r\n--zz--\r\n"
    )
    kind = "multipart/form-data; boundary=zz; charset=unicode_escape"
    answer = gateway.post("/v1/files", form, {"authorization": "Bearer key-a", "content-type": kind})
    assert answer.status == 400
    assert r"'\ud800.jsonl'" in json.loads(answer.read())["error"]["message"]
    assert client.files.list(timeout=10.0)


def test_a_batch_runs_to_completion(client: openai.OpenAI) -> None:
    batch = start(client, lines(40))
    assert batch.status == "validating"
    assert batch.expires_at - batch.created_at == 24 * 3600
    done = ended(client, batch.id)
    assert done.status == "completed"
    assert (done.request_counts.total, done.request_counts.completed) == (40, 40)
    assert done.error_file_id is None
    assert done.metadata == {"of": "tests"}
    assert done.in_progress_at <= done.finalizing_at <= done.completed_at
    rows = [json.loads(row) for row in client.files.content(done.output_file_id).text.splitlines()]
    assert [row["custom_id"] for row in rows] == [f"line-{number}" for number in range(40)]
    for row in rows:
        assert row["error"] is None
        assert row["response"]["status_code"] == 200
        assert row["response"]["body"]["usage"]["completion_tokens"] == 4
    assert batch.id in [each.id for each in client.batches.list(limit=5)]
    with pytest.raises(openai.BadRequestError, match="Cannot cancel"):
        client.batches.cancel(batch.id)


@pytest.mark.parametrize("limit", ["0", "²", "9" * 5000])
def test_a_page_has_a_number_of_entries(client: openai.OpenAI, limit: str) -> None:
    with pytest.raises(openai.BadRequestError, match="limit"):
        client.files.list(extra_query={"limit": limit})


def test_lists_come_in_pages(client: openai.OpenAI) -> None:
    ids = [start(client, lines(1)).id for _ in range(3)]
    found = [batch.id for batch in client.batches.list(limit=1)]  # the client asks for page after page
    assert found[:3] == ids[::-1]


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [
        (b"", "empty_file", None),
        (b"no json", "invalid_json_line", 1),
        (lines(1).replace(b'"max_tokens": 4', b'"x": ' + DEEP), "invalid_json_line", 1),
        (lines(2) + b"\n" + lines(1), "duplicate_custom_id", 3),
        (lines(1, url="/v1/completions"), "mismatched_endpoint", 1),
        (lines(1, method="GET"), "invalid_method", 1),
        (lines(1, body={"model": "absent", "messages": [{"role": "user"}]}), "model_not_found", 1),
        (lines(1, body={"model": MODEL, "messages": []}), "invalid_request", 1),
        (lines(1, body={"model": MODEL, "messages": [{"role": "user", "content": 5}]}), "invalid_request", 1),
    ],
)
def test_a_file_that_is_wrong_fails_its_batch(
    client: openai.OpenAI, content: bytes, code: str, line: int | None
) -> None:
    failed = ended(client, start(client, content).id)
    assert failed.status == "failed"
    assert (failed.errors.data[0].code, failed.errors.data[0].line) == (code, line)
    assert failed.request_counts.total == 0


def test_a_line_that_the_engine_refuses_is_in_the_error_file(client: openai.OpenAI) -> None:
    long = {"model": MODEL, "messages": [{"role": "user", "content": "word " * 6000}], "max_tokens": 4}
    content = lines(2) + b"\n" + lines(1, custom_id="too-long", body=long)
    done = ended(client, start(client, content).id)
    assert done.status == "completed"
    assert (done.request_counts.completed, done.request_counts.failed) == (2, 1)
    (row,) = map(json.loads, client.files.content(done.error_file_id).text.splitlines())
    assert row["custom_id"] == "too-long"
    assert row["response"]["status_code"] == 400
    assert "context length" in row["response"]["body"]["error"]["message"]


@pytest.mark.parametrize("window", ["25h", "0s", "soon"])
def test_a_window_is_24_hours_or_shorter(client: openai.OpenAI, window: str) -> None:
    with pytest.raises(openai.BadRequestError, match="completion_window"):
        start(client, lines(1), window)


def slow_lines(count: int) -> bytes:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Long"}], "max_tokens": 3000,
            "ignore_eos": True}  # fmt: skip
    return b"\n".join(lines(1, custom_id=f"slow-{number}", body=body) for number in range(count))


def test_what_is_not_done_in_the_window_expires(client: openai.OpenAI) -> None:
    content = lines(1) + b"\n" + slow_lines(300)
    done = ended(client, start(client, content, "2s").id)
    assert done.status == "expired"
    counts = done.request_counts
    assert counts.completed + counts.failed == counts.total == 301
    assert counts.failed > 0
    rows = [json.loads(row) for row in client.files.content(done.error_file_id).text.splitlines()]
    assert {row["error"]["code"] for row in rows} == {"batch_expired"}
    assert len(rows) == counts.failed


def test_a_batch_can_be_cancelled(client: openai.OpenAI, gateway: GatewayProcess) -> None:
    batch = start(client, lines(1) + b"\n" + slow_lines(200))
    eventually(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 1)
    queue = gateway.get("/v1/queue", {"authorization": "Bearer key-a"})
    assert [each["id"] for each in queue["batches"]] == [batch.id]
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = ended(client, batch.id)
    assert done.status == "cancelled"
    assert done.request_counts.completed < 201
    rows = client.files.content(done.output_file_id).text.splitlines()
    assert len(rows) == done.request_counts.completed
    eventually(lambda: gateway.metric("vllm:num_requests_running", model_name=MODEL) == 0)


def test_the_configuration_is_checked_without_serving(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from live.cli import main

    path = tmp_path / "live.toml"
    path.write_text(CONFIG)
    assert main(["serve", str(path), "--check"]) == 0
    said = capsys.readouterr().out
    assert "class      interactive: TTFT <= 20 s (service_tier priority)" in said
    assert "engine     e0: llama-2-7b (resident), fake; KV" in said
    path.write_text(CONFIG + "[gatway]\n")
    assert main(["serve", str(path), "--check"]) == 2
    assert "unknown key; did you mean 'gateway'?" in capsys.readouterr().err
