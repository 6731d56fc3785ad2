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
    del result["start_times"]
    path.write_text(json.dumps(result))
    with pytest.raises(InputError, match=r"bench\.json: no start_times"):
        read_request_log(str(path))
    path.write_text(json.dumps(result | {"request_rate": "inf"}))
    assert read_request_log(str(path)).arrival_s.tolist() == [0, 0, 0]


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
    ],
)
def test_what_is_wrong_is_told_with_its_place(text, message, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_request_log(str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
