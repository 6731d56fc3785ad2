"""Logs of many shapes say the same; what is wrong in one is told with its place."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest

from qlm_sim.errors import InputError
from qlm_sim.validation.request_log import RequestLog, read_request_log

ROWS = [  # arrival, prompt, output, ttft, e2e
    (100.0, 300, 5, 0.25, 0.65),
    (101.5, 20, 1, 0.125, 0.125),
    (100.5, 700, 11, 0.5, 1.5),
]


def same(log: RequestLog) -> None:
    assert log.arrival_s.tolist() == pytest.approx([0.0, 0.5, 1.5])
    assert log.prompt_tokens.tolist() == [300, 700, 20]
    assert log.output_tokens.tolist() == [5, 11, 1]
    assert log.measured["ttft_s"] == pytest.approx([0.25, 0.5, 0.125])
    assert log.measured["e2e_s"] == pytest.approx([0.65, 1.5, 0.125])
    assert log.measured["tpot_s"] == pytest.approx([0.1, 0.1, np.nan], nan_ok=True)


def csv(header: str, scale: float = 1.0) -> str:
    lines = [f"{a},{p},{o},{t * scale},{e * scale}" for a, p, o, t, e in ROWS]
    return "\n".join([header, *lines]) + "\n"


@pytest.mark.parametrize(
    ("header", "scale"),
    [
        ("arrival,prompt,output,ttft,e2e", 1.0),
        ("timestamp,prompt_tokens,completion_tokens,TTFT (ms),E2E (ms)", 1e3),
        ("arrival_time,input_len,output_len,first_token_latency,request_latency", 1.0),
        ("start_time,num_prefill_tokens,num_decode_tokens,time_to_first_token_ms,e2e_latency_ms", 1e3),
    ],
)
def test_columns_go_by_many_names(header, scale, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(csv(header, scale))
    same(read_request_log(str(path)))


def test_dates_json_lines_json_lists_gzip_and_parquet_are_read(tmp_path):
    frame = pd.DataFrame(ROWS, columns=["arrival", "prompt_tokens", "output_tokens", "ttft", "e2e"])
    frame["arrival"] = pd.to_datetime(frame.arrival, unit="s").map(pd.Timestamp.isoformat)
    records = frame.to_dict("records")
    paths = [tmp_path / name for name in ("a.jsonl", "b.json", "c.jsonl.gz")]
    paths[0].write_text("".join(json.dumps(each) + "\n" for each in records))
    paths[1].write_text(json.dumps(records, indent=1))
    paths[2].write_bytes(gzip.compress(paths[0].read_bytes()))
    for path in paths:
        same(read_request_log(str(path)))
    parquet = tmp_path / "d.parquet"
    frame.assign(arrival=[row[0] for row in ROWS]).to_parquet(parquet)
    same(read_request_log(str(parquet)))


def test_a_vllm_bench_serve_result_is_read(tmp_path):
    path = tmp_path / "bench.json"
    result = {
        "request_rate": 2.0,
        "start_times": [row[0] for row in ROWS],
        "input_lens": [row[1] for row in ROWS],
        "output_lens": [row[2] for row in ROWS],
        "ttfts": [row[3] for row in ROWS],
        "itls": [[(e - t) / (o - 1)] * (o - 1) if o > 1 else [] for _, _, o, t, e in ROWS],
    }
    path.write_text(json.dumps(result))
    same(read_request_log(str(path)))


@pytest.mark.parametrize("nothing", ["", "NaN"])
def test_what_a_failed_request_lacks_may_be_blank_or_nan(nothing, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(f"arrival,prompt,output,ttft\n0,9,5,0.1\n1,9,{nothing},{nothing}\n2,9,5,{nothing}\n")
    log = read_request_log(str(path))
    assert log.arrival_s.tolist() == [0, 2]
    assert log.measured["ttft_s"] == pytest.approx([0.1, np.nan], nan_ok=True)
    assert "1 of 3 requests are left out" in log.notes[0]


def bench(tmp_path, e2e, **settings):
    """Start times as read from a result that does not say them: requests of two tokens, e2e as given."""
    path = tmp_path / "bench.json"
    lists = {"input_lens": [5] * len(e2e), "output_lens": [2] * len(e2e)}
    times = {"ttfts": [0.25] * len(e2e), "itls": [[each - 0.25] for each in e2e]}
    path.write_text(json.dumps(lists | times | settings))
    return read_request_log(str(path))


def test_start_times_that_a_bench_result_does_not_say_follow_from_its_settings(tmp_path):
    together = bench(tmp_path, [1.0, 2.0, 3.0], request_rate="inf")
    assert together.arrival_s.tolist() == [0, 0, 0]
    assert "all start at once" in together.notes[0]
    two_places = bench(tmp_path, [1.0, 4.0, 2.0, 3.0], request_rate="inf", max_concurrency=2)
    assert two_places.arrival_s.tolist() == [0, 0, 1, 3]
    assert "2 places" in two_places.notes[0]
    drawn = bench(tmp_path, [0.5] * 2000, request_rate=4.0)
    assert np.diff(drawn.arrival_s).mean() == pytest.approx(0.25, rel=0.1)
    assert np.diff(drawn.arrival_s).std() == pytest.approx(0.25, rel=0.1)
    assert "4 per second are drawn" in drawn.notes[0]
    steady = bench(tmp_path, [0.5] * 2000, request_rate=4.0, burstiness=100.0)
    assert np.diff(steady.arrival_s).std() == pytest.approx(0.025, rel=0.1)
    with pytest.raises(InputError, match="request_rate is None"):
        bench(tmp_path, [1.0])


@pytest.mark.parametrize(
    ("arrivals", "firsts", "finishes"),
    [
        (["0", "1.5"], ["0.25", "2.0"], ["4", "2.5"]),
        (
            ["1700000000000", "1700000001500"],
            ["1700000000250", "1700000002000"],
            ["1700000004000", "1700000002500"],
        ),
        (
            ["2026-01-01T00:00:00Z", "2026-01-01T00:00:01.5Z"],
            ["2026-01-01T00:00:00.25Z", "2026-01-01T00:00:02Z"],
            ["2026-01-01T00:00:04Z", "2026-01-01T00:00:02.5Z"],
        ),
    ],
)
def test_points_in_time_become_durations(tmp_path, arrivals, firsts, finishes):
    path = tmp_path / "log.csv"
    rows = [f"{a},5,3,{f},{e}\n" for a, f, e in zip(arrivals, firsts, finishes, strict=True)]
    path.write_text("Arrival Time,isl,osl,first_token_time,finish_time\n" + "".join(rows))
    log = read_request_log(str(path))
    assert log.arrival_s == pytest.approx([0, 1.5], abs=1e-5)
    assert log.measured["ttft_s"] == pytest.approx([0.25, 0.5], abs=1e-5)
    assert log.measured["e2e_s"] == pytest.approx([4.0, 1.0], abs=1e-5)
    assert log.measured["tpot_s"] == pytest.approx([1.875, 0.25], abs=1e-5)


def test_first_token_time_without_a_finish_is_a_duration(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("arrival,prompt,output,first_token_time\n0,5,3,0.5\n9,5,3,0.25\n")
    assert read_request_log(str(path)).measured["ttft_s"].tolist() == [0.5, 0.25]


@pytest.mark.parametrize("name", ["first_token_time", "first_token_at", "first_token_timestamp"])
def test_a_first_token_on_the_arrivals_clock_is_a_point_in_time(name, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(f"arrival,prompt,output,{name},tpot\n1700000000,5,3,1700000000.5,0.1\n")
    log = read_request_log(str(path))
    assert log.measured["ttft_s"] == pytest.approx([0.5], abs=1e-5)
    assert log.measured["e2e_s"] == pytest.approx([0.7], abs=1e-5)


def test_a_column_of_times_without_any_is_left_out(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("arrival,prompt,output,ttft,queue\n0,5,3,0.5,\n9,5,3,0.25,\n")
    assert list(read_request_log(str(path)).measured) == ["ttft_s"]


def test_parquet_may_be_compressed_and_must_be_whole(tmp_path):
    plain, path = tmp_path / "plain.parquet", tmp_path / "log.parquet"
    pd.DataFrame({"arrival": [0.0], "prompt": [5], "output": [3], "ttft": [0.5]}).to_parquet(plain)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_request_log(str(path)).measured["ttft_s"].tolist() == [0.5]
    path.write_bytes(plain.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a whole Parquet file"):
        read_request_log(str(path))


def test_json_lines_may_begin_with_a_blank_one(tmp_path):
    path = tmp_path / "log.jsonl"
    row = '{"arrival": %d, "prompt": 5, "output": 3, "ttft": 0.5}\n'
    path.write_text("\n" + row % 0 + row % 1)
    assert len(read_request_log(str(path))) == 2


def test_a_finish_before_the_arrival_is_told_with_its_place(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("arrival,prompt,output,finished_at\n0,5,3,0.5\n9,5,3,1.5\n")
    with pytest.raises(InputError, match=r"line 3: finished_at lies 7\.5 s before the arrival"):
        read_request_log(str(path))


def test_times_that_follow_from_others_are_filled_in(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("arrival,prompt,output,ttft,tpot\n0,10,5,0.5,0.1\n1,10,1,0.4,\n")
    log = read_request_log(str(path))
    assert log.measured["e2e_s"] == pytest.approx([0.9, 0.4])
    assert log.measured["tpot_s"] == pytest.approx([0.1, np.nan], nan_ok=True)


def test_requests_without_output_are_left_out_and_told(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("arrival,prompt,output,ttft\n0,10,0,\n3,10,4,0.5\n")
    log = read_request_log(str(path))
    assert len(log) == 1
    assert log.notes == (f"{path}: 1 of 2 requests are left out: no prompt or no output",)


BENCH = '{"input_lens": [5, 5], "output_lens": [1, 1], "ttfts": [%s], "itls": [%s], "request_rate": "inf"}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival,prompt,ttft\n0,1,1\n", "no column for output_tokens (found arrival, prompt, ttft)"),
        ("arrival,prompt,output\n0,1,1\n", "no measured time (found arrival, prompt, output)"),
        ("arrival,prompt,output,ttft\n0,1,1,fast\n", "line 2: ttft is 'fast'"),
        ("arrival,prompt,output,ttft\n0,1,1,1\n2,-3,1,1\n", "line 3: prompt is '-3'"),
        ("arrival,prompt,output,ttft\nnoon,1,1,1\n", "line 2: arrival is 'noon'"),
        ("arrival,prompt,output,ttft\n0,1,0,1\n", "none of 1 requests has both prompt and output"),
        ("arrival,prompt,output,ttft\n", "the file holds no request"),
        ("arrival,prompt,output,ttft,e2e\n0,1,9,35.5,3.3\n", "line 2: the first token takes 35.5 s"),
        ("", "the file is empty"),
        ('{"ttfts": [1]}', "no list input_lens, output_lens, itls"),
        ('{"mean_ttft_ms": 10.5}', "vllm bench serve --save-result --save-detailed holds one per request"),
        ('{"mean_ttft_ms": 10.5}\n{"mean_ttft_ms": 9.5}', "several results of vllm bench serve"),
        (BENCH % ("0.1, null", "[], []"), "ttfts of request 2: None; a number would be right"),
        (BENCH % ("0.1, 0.2", "0.1, 0.1"), "itls of request 1: 0.1; a list of numbers would be right"),
        ("arrival,prompt,output,ttft\n0,1,1,\n", "the columns of measured times are empty"),
        ("arrival,prompt,output,ttft\n5e13,1,1,1\n", "line 2: arrival is 50000000000000, no Unix time"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text, message, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_request_log(str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
