"""What files say and what the reader makes of it, and which line each mistake is blamed on."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

from qlm_sim.errors import InputError
from qlm_sim.workload.readers import FORMATS, read_trace
from qlm_sim.workload.workload import Trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""
MOONCAKE = """{"timestamp": 27000, "input_length": 695, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 30000, "input_length": 1472, "output_length": 26, "hash_ids": [46, 48, 49]}
"""
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n10.5,100,7\n11.0,2,3\n"
SARATHI = (
    "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n74,918,992,0.08\n290,905,1195,0.3\n"
)
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,230,1317,API log
"""
BENCH = {
    "date": "20260101",
    "input_lens": [5, 6],
    "output_lens": [7, 8],
    "start_times": [353399.5, 353400.25],
}
CANONICAL = """arrival_s,model,slo_class,prompt_tokens,output_tokens
0.5,mistral-7b,interactive,10,20
1.5,,batch-1,30,40
"""


def read(
    tmp_path: Path, content: str | bytes, *, format: str | None = None, name: str = "t"
) -> tuple[Trace, list[str]]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    warnings: list[str] = []
    return read_trace(str(path), format=format, warn=warnings.append), warnings


@pytest.mark.parametrize(
    ("content", "format", "prompts", "outputs", "arrivals"),
    [
        (AZURE, "azure", [374, 396, 879], [44, 109, 55], [0.0, 4.314579, 4.541877]),
        (MOONCAKE, "mooncake", [695, 1472], [52, 26], [0.0, 3.0]),
        (VIDUR, "vidur", [100, 2], [7, 3], [0.0, 0.5]),
        (SARATHI, "vidur", [74, 290], [918, 905], None),
        (BURSTGPT, "burstgpt", [472, 1087], [18, 230], [0.0, 40.0]),
        (json.dumps(BENCH), "vllm-bench", [5, 6], [7, 8], [0.0, 0.75]),
        (json.dumps(BENCH, indent=1), "vllm-bench", [5, 6], [7, 8], [0.0, 0.75]),
        (CANONICAL, "qlm", [10, 30], [20, 40], [0.5, 1.5]),
    ],
)
def test_format_is_recognised_and_read_as_when_forced(tmp_path, content, format, prompts, outputs, arrivals):
    for trace, warnings in (read(tmp_path, content), read(tmp_path, content, format=format)):
        assert trace.prompt_tokens.tolist() == prompts
        assert trace.output_tokens.tolist() == outputs
        assert (None if trace.arrival_s is None else trace.arrival_s.tolist()) == pytest.approx(arrivals)
        assert len(set(trace.ids)) == len(trace)
        assert warnings == []


@pytest.mark.parametrize(
    "change", [gzip.compress, lambda b: b"\xef\xbb\xbf" + b, lambda b: b.replace(b"\n", b"\r\n")]
)
@pytest.mark.parametrize("content", [AZURE, MOONCAKE, CANONICAL])
def test_compression_byte_order_mark_and_line_ends_change_nothing(tmp_path, content, change):
    plain, _ = read(tmp_path, content)
    other, _ = read(tmp_path, change(content.encode()))
    assert np.array_equal(plain.arrival_s, other.arrival_s)
    assert plain.output_tokens.tolist() == other.output_tokens.tolist()
    assert plain.slo_class == other.slo_class


def test_names_of_a_canonical_trace_are_kept_and_gaps_stay_open(tmp_path):
    trace, _ = read(tmp_path, CANONICAL)
    assert trace.model == ["mistral-7b", ""]
    assert trace.slo_class == ["interactive", "batch-1"]
    assert not trace.foreign_models


def test_models_of_burstgpt_are_another_services(tmp_path):
    trace, _ = read(tmp_path, BURSTGPT)
    assert trace.model == ["ChatGPT", "GPT-4"]
    assert trace.foreign_models


def test_parquet_without_the_needed_columns_names_those_found(tmp_path):
    pa_parquet.write_table(pa.table({"prompt_tokens": [1], "answers": [2]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"no column output_tokens \(found prompt_tokens, answers\)"):
        read_trace(str(tmp_path / "t.parquet"), warn=print)


def test_rows_out_of_order_are_sorted_stably_and_told(tmp_path):
    trace, warnings = read(tmp_path, "arrival_s,prompt_tokens,output_tokens\n2,1,1\n1,2,1\n1,3,1\n")
    assert trace.prompt_tokens.tolist() == [2, 3, 1]
    assert "1 requests arrive before the one above" in warnings[0]


def test_failed_requests_are_left_out_and_counted(tmp_path):
    content = BURSTGPT + "46,GPT-4,10,0,10,API log\n47,GPT-4,0,10,10,API log\n"
    trace, warnings = read(tmp_path, content)
    assert len(trace) == 2
    assert "2 of 4 requests are left out" in warnings[0]


def test_start_times_of_failed_requests_do_not_set_the_clock(tmp_path):
    result = {"input_lens": [5, 6, 7], "output_lens": [0, 8, 9], "start_times": [0.0, 100.0, 101.0]}
    trace, _ = read(tmp_path, json.dumps(result))
    assert trace.arrival_s is not None
    assert trace.arrival_s.tolist() == [0.0, 1.0]


def test_unused_column_of_a_canonical_trace_is_told(tmp_path):
    _, warnings = read(tmp_path, "slo_clas,prompt_tokens,output_tokens\na,1,1\n")
    assert "columns not used: slo_clas" in warnings[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ("a,b\n1,2\n", "format not recognised by its columns"),
        ('{"a": 1}\n', "format not recognised by its keys"),
        ('{"a": 1\n', """line 1 is '{"a": 1'; a whole JSON object with keys would be right"""),
        ("prompt_tokens,output_tokens\n", "holds no request"),
        ("prompt_tokens,output_tokens\n1,2\n-3,4\n", "line 3: prompt_tokens is '-3'; a whole number from 0"),
        ("prompt_tokens,output_tokens\n1,2\n\n3,x\n", "line 4: output_tokens is 'x'"),
        ("prompt_tokens,output_tokens\n1,2\n3,nan\n", "line 3: output_tokens is 'nan'"),
        ("prompt_tokens,output_tokens\n1,2\n3,1.5\n", "line 3: output_tokens is '1.5'"),
        ("prompt_tokens,output_tokens\n1,2\n3,1e99\n", "line 3: output_tokens is '1e99'"),
        ("prompt_tokens,output_tokens\n1,2\n3,\n", "line 3: output_tokens is ''"),
        ("prompt_tokens,output_tokens\n1,2\n3\n", "line 3: 1 fields; 2 would be right"),
        ("prompt_tokens,output_tokens\n1,2\n3,4,5\n", "line 3: 3 fields; 2 would be right"),
        ('id,prompt_tokens,output_tokens\n"a\nb",1,2\nc,3,-4\n', "line 4: output_tokens is '-4'"),
        ("prompt_tokens,output_tokens,prompt_tokens\n1,2,3\n", "column prompt_tokens stands there 2 times"),
        (
            "arrival_s,prompt_tokens,output_tokens\n-1,2,3\n",
            "line 2: arrival_s is '-1'; a number of 0 or more",
        ),
        ("arrival_s,prompt_tokens,output_tokens\ninf,2,3\n", "line 2: arrival_s is 'inf'"),
        ("arrival_s,prompt_tokens,output_tokens\n1e300,2,3\n", "line 2: arrival_s is '1e300'; a number of 0"),
        ("id,prompt_tokens,output_tokens\na,2,3\na,2,3\n", "line 3: id is 'a'; text of its own"),
        (
            "prompt_tokens,output_tokens,max_tokens\n1,20,30\n1,20,10\n",
            "line 3: output_tokens is 20; at most",
        ),
        ("prompt_tokens,output_tokens\n0,1\n1,0\n", "none of 2 requests has both"),
        (b"prompt_tokens,output_tokens\n1,2\n1,\xff\n", "not UTF-8 text"),
        (b"\xff\xfe{\x00", "not UTF-8 text"),
        ("\nprompt_tokens,output_tokens\n1,2\n", "line 1 is blank"),
        (AZURE + "yesterday,1,1\n", "line 5: TIMESTAMP is 'yesterday'; a time such as"),
        (MOONCAKE + '{"timestamp": 1, "input_length": 2}\n', "line 3: no output_length; a whole number"),
        (MOONCAKE + '{"timestamp": NaN, "input_length": 2, "output_length": 1}', "line 3: timestamp is nan"),
        (
            MOONCAKE + '{"timestamp": 1, "input_length": true, "output_length": 1}',
            "line 3: input_length is True",
        ),
        (MOONCAKE + '\n{"timestamp": 1, "input_le', "line 4: Unterminated string"),
        (MOONCAKE + "[1]\n", r"line 3: \[1\]; a JSON object would be right"),
        ('{"input_lens": [1], "output_lens": [1, 2]}', "no lists input_lens, output_lens of one length"),
        ('{"input_lens": [1, -2], "output_lens": [1, 2]}', "request 2: input_lens is -2"),
        (b"PAR1 and no more", "not a whole Parquet file"),
        (gzip.compress(AZURE.encode(), mtime=0)[:60], "damaged gzip file"),
    ],
)
def test_mistake_is_blamed_on_its_line(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path, content)
    assert str(tmp_path / "t") in str(error.value)
    assert "\n" not in str(error.value)


def test_forced_format_names_what_it_misses(tmp_path):
    with pytest.raises(InputError, match=r"no column TIMESTAMP \(found arrived_at.*format azure is CSV"):
        read(tmp_path, VIDUR, format="azure")


def test_unknown_format_lists_the_known(tmp_path):
    with pytest.raises(InputError) as error:
        read(tmp_path, VIDUR, format="excel")
    assert all(name in str(error.value) for name in FORMATS)


def test_absent_file_and_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_trace(str(tmp_path / "absent.csv"), warn=print)
    with pytest.raises(InputError, match="a folder"):
        read_trace(str(tmp_path), warn=print)


def test_tokenizer_for_a_file_of_counts_is_told_to_be_unused(tmp_path):
    (tmp_path / "t").write_text(VIDUR)
    warnings: list[str] = []
    read_trace(str(tmp_path / "t"), tokenizer="gpt2", warn=warnings.append)
    assert "tokenizer gpt2 is not used" in warnings[0]


def test_built_in_sharegpt_holds_lengths_of_real_conversations():
    trace = read_trace("sharegpt", warn=pytest.fail)
    assert trace.name == "sharegpt"
    assert len(trace) == 17_345
    assert trace.arrival_s is None
    assert trace.prompt_tokens.max() == 234_984
    # Heavy-tailed prompts: the mean lies far above the median.
    assert trace.prompt_tokens.mean() > 5 * np.median(trace.prompt_tokens)
