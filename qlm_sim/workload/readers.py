"""Reads traces: recognises a file's format by what it holds and gives its columns.

Knows no scenario: models, SLO classes and arrivals stay as the file has them, or open. Nothing is
left out for its length; only rows without a prompt or without output are, and counted.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qlm_sim.errors import InputError
from qlm_sim.workload.content import content_of_hashes, hash_block_tokens, parse_content
from qlm_sim.workload.files import Progress, open_trace
from qlm_sim.workload.openai_batch import read_openai_batch
from qlm_sim.workload.sharegpt import read_sharegpt, read_sharegpt_turns
from qlm_sim.workload.tables import Table, csv_header, read_csv, read_jsonl, read_parquet, shorten
from qlm_sim.workload.tokenizers import load_tokenizer
from qlm_sim.workload.workload import Trace

BUILT_IN = ("sharegpt",)
"""Traces that come with the package, by name."""
LATEST = 1e15
"""The largest time of an arrival, in the trace's unit: far beyond, a second more is no other number."""

Warn = Callable[[str], None]

_TEXTS = {"sharegpt": read_sharegpt, "sharegpt-turns": read_sharegpt_turns, "openai-batch": read_openai_batch}
"""Readers of formats that hold text."""


@dataclass(frozen=True, slots=True)
class TableFormat:
    """Which columns of a table hold what."""

    prompt: str
    output: str
    arrival: str | None
    arrival_unit_s: float | None = 1.0
    """Seconds per unit of the arrival column; None where it holds dates."""
    arrival_required: bool = True
    id: str | None = None
    model: str | None = None
    foreign_models: bool = False
    slo_class: str | None = None
    max_tokens: str | None = None
    content: str | None = None
    hash_ids: str | None = None
    """Lists of ids, each of as many tokens and of all that come before."""

    def columns(self) -> list[str]:
        named = (
            self.arrival,
            self.id,
            self.model,
            self.slo_class,
            self.prompt,
            self.output,
            self.max_tokens,
            self.content,
            self.hash_ids,
        )
        return [name for name in named if name]

    def required(self) -> list[str]:
        return [
            name
            for name in (self.arrival if self.arrival_required else None, self.prompt, self.output)
            if name
        ]


CANONICAL = TableFormat(
    prompt="prompt_tokens",
    output="output_tokens",
    arrival="arrival_s",
    arrival_required=False,
    id="id",
    model="model",
    slo_class="slo_class",
    max_tokens="max_tokens",
    content="content",
)
"""The project's own: CSV, JSON Lines or Parquet."""

TABLES = {
    "qlm": CANONICAL,
    "azure": TableFormat("ContextTokens", "GeneratedTokens", "TIMESTAMP", arrival_unit_s=None),
    "mooncake": TableFormat(
        "input_length", "output_length", "timestamp", arrival_unit_s=1e-3, hash_ids="hash_ids"
    ),
    "vidur": TableFormat("num_prefill_tokens", "num_decode_tokens", "arrived_at", arrival_required=False),
    "burstgpt": TableFormat(
        "Request tokens", "Response tokens", "Timestamp", model="Model", foreign_models=True
    ),
}

FORMATS = {
    "sharegpt": 'JSON, [{"id", "conversations": [{"from", "value"}]}]; the first exchange of each',
    "sharegpt-turns": "the same, every exchange of each, the earlier ones in its prompt",
    "azure": "CSV, TIMESTAMP,ContextTokens,GeneratedTokens",
    "mooncake": "JSON Lines, timestamp (ms), input_length, output_length, hash_ids (may be absent)",
    "vidur": "CSV, arrived_at (may be absent),num_prefill_tokens,num_decode_tokens",
    "burstgpt": "CSV, Timestamp,Model,Request tokens,Response tokens",
    "openai-batch": "JSON Lines, custom_id, body",
    "vllm-bench": "JSON, a result of vllm bench serve with input_lens, output_lens",
    "qlm": "CSV, JSON Lines or Parquet, prompt_tokens, output_tokens "
    "and any of arrival_s, model, slo_class, id, max_tokens, content",
}
"""Every format's name and what marks it."""


def read_trace(
    path_or_name: str,
    *,
    format: str | None = None,
    tokenizer: str | None = None,
    progress: Progress | None = None,
    warn: Warn,
) -> Trace:
    """The trace in a file, or the built-in one of that name. Gzip-compressed files are read as they are.

    ``format`` is one of FORMATS; None recognises it. ``tokenizer`` counts the tokens of formats that
    hold text (see ``load_tokenizer``). ``progress`` is told (bytes read, bytes of the file) while text
    is counted; ``warn`` gets one line about anything left out. Raises InputError.

    A row's arrival keeps its distance to the first; the canonical format keeps its times as they are.
    """
    name, path = _locate(path_or_name)
    if format is None:
        format = recognise(path)
    elif format not in FORMATS:
        raise InputError(f"format {format!r} is unknown; known are {', '.join(FORMATS)}")
    if format in _TEXTS:
        trace = _TEXTS[format](path, name, load_tokenizer(tokenizer), progress, warn)
    else:
        if tokenizer is not None:
            warn(f"{path_or_name}: holds token counts, so tokenizer {tokenizer} is not used")
        trace = (
            _from_bench_result(path, name)
            if format == "vllm-bench"
            else _from_table(path, name, format, warn)
        )
    trace = _in_order(_without_empty(trace, path, warn), path, warn)
    if trace.arrival_s is None or format == "qlm":
        return trace
    return replace(trace, arrival_s=trace.arrival_s - trace.arrival_s[0])


def recognise(path: str) -> str:
    """The name of the file's format, judged by its first bytes."""
    with open_trace(path) as (file, _):
        head = file.read(1 << 16)
        line = head if b"\n" in head else head + file.readline(1 << 26)
    if not line.strip():
        raise InputError(f"{path}: the file is empty")
    if line.startswith(b"PAR1"):
        return "qlm"
    start = line.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"["):
        return "sharegpt"
    if start.startswith(b"{"):
        keys = _keys(start)
        if {"custom_id", "body"} <= keys:
            return "openai-batch"
        if {"input_lens", "output_lens"} <= keys:
            return "vllm-bench"
        kind = "keys"
    else:
        keys = set(csv_header(path))
        kind = "columns"
    for name, table in TABLES.items():
        if {table.prompt, table.output} <= keys:
            return name
    if not keys and kind == "keys":
        found = line.split(b"\n", 1)[0].decode("utf-8", "replace").strip()
        raise InputError(f"{path}: line 1 is {shorten(found)}; a whole JSON object with keys would be right")
    found = ", ".join(sorted(keys)) or "none"
    raise InputError(
        f"{path}: format not recognised by its {kind} ({shorten(found)}); known are {', '.join(FORMATS)}: a "
        "CSV with prompt_tokens and output_tokens will do, and --format NAME tells what another needs"
    )


def _keys(start: bytes) -> set[str]:
    """Keys of the JSON object that the bytes start with; those seen, where it is not whole in one line."""
    line = start.split(b"\n", 1)[0]
    try:
        return set(json.loads(line))
    except ValueError:
        return {
            key for key in ("custom_id", "body", "input_lens", "output_lens") if f'"{key}"'.encode() in start
        }


def _locate(path_or_name: str) -> tuple[str, str]:
    """(name, path) of a trace."""
    if path_or_name not in BUILT_IN:
        if not Path(path_or_name).exists():
            names = ", ".join(BUILT_IN)
            raise InputError(f"{path_or_name}: no such file, and no built-in trace (those are: {names})")
        return Path(path_or_name).name.split(".")[0], path_or_name
    file = f"{path_or_name}_lengths.csv.gz"
    package = Path(str(resources.files("qlm_sim")))
    for folder in (package / "traces", package.parent / "traces"):  # in the wheel; in a checkout
        if (folder / file).is_file():
            return path_or_name, str(folder / file)
    raise InputError(f"the built-in trace {path_or_name} is missing ({file}); install qlm again")


def _from_table(path: str, name: str, format: str, warn: Warn) -> Trace:
    spec = TABLES[format]
    table = _read_table(path, spec)
    for column in spec.required():
        if column not in table:
            raise InputError(
                f"{path}: no column {column} (found {', '.join(table.found)}); "
                f"format {format} is {FORMATS[format]}"
            )
    if table.rows == 0:
        raise InputError(f"{path}: the file holds no request")
    if spec is CANONICAL and (unused := [column for column in table.found if column not in spec.columns()]):
        warn(f"{path}: columns not used: {', '.join(unused)}")

    def strings(column: str | None) -> list[str] | None:
        return table.strings(column) if column and column in table else None

    output = table.whole_numbers(spec.output)
    max_tokens = None
    if spec.max_tokens and spec.max_tokens in table:
        max_tokens = table.whole_numbers(spec.max_tokens)
        if (over := output > max_tokens).any():
            row = int(over.argmax())
            raise table.error(
                row, f"{spec.output} is {output[row]}; at most max_tokens, {max_tokens[row]}, is right"
            )
    return Trace(
        name=name,
        ids=_ids(table, spec),
        prompt_tokens=table.whole_numbers(spec.prompt),
        output_tokens=output,
        arrival_s=_arrivals(table, spec),
        model=strings(spec.model),
        slo_class=strings(spec.slo_class),
        max_tokens=max_tokens,
        foreign_models=spec.foreign_models,
        content=_content(table, spec, warn),
    )


def _content(table: Table, spec: TableFormat, warn: Warn) -> list[str] | None:
    if spec.hash_ids and spec.hash_ids in table:
        cells = table.integer_lists(spec.hash_ids)
        prompts = table.whole_numbers(spec.prompt).tolist()
        size = hash_block_tokens(prompts, [len(ids) for ids in cells])
        if size is None:
            warn(
                f"{table.path}: {spec.hash_ids} are not one for each so many tokens of a prompt, so not used"
            )
            return None
        return [content_of_hashes(ids, prompt, size) for ids, prompt in zip(cells, prompts, strict=True)]
    if not spec.content or spec.content not in table:
        return None
    texts = table.strings(spec.content)
    for row, text in enumerate(texts):
        try:
            parse_content(text)
        except ValueError as error:
            raise table.error(row, f"{spec.content} is {error}") from None
    return texts


def _read_table(path: str, spec: TableFormat) -> Table:
    with open_trace(path) as (file, _):
        head = file.read(1 << 16)
    if head.startswith(b"PAR1"):
        return read_parquet(path, spec.columns())
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return read_jsonl(path, spec.columns())
    return read_csv(path, spec.columns())


def _arrivals(table: Table, spec: TableFormat) -> NDArray[np.float64] | None:
    if spec.arrival is None or spec.arrival not in table:
        return None
    if spec.arrival_unit_s is None:
        return table.datetimes(spec.arrival)
    return table.numbers(spec.arrival, LATEST) * spec.arrival_unit_s


def _ids(table: Table, spec: TableFormat) -> list[str]:
    if spec.id is None or spec.id not in table:
        return numbered_ids(table.rows)
    ids = table.strings(spec.id)
    if len(set(ids)) < len(ids) or "" in ids:
        seen = {""}
        for row, request_id in enumerate(ids):
            if request_id in seen:
                raise table.error(row, f"{spec.id} is {shorten(request_id)}; text of its own would be right")
            seen.add(request_id)
    return ids


def numbered_ids(count: int) -> list[str]:
    """Numbers from 0, of one width, so that they sort as the rows stand."""
    width = len(str(count - 1))
    return [f"{row:0{width}d}" for row in range(count)]


def _from_bench_result(path: str, name: str) -> Trace:
    """Lengths, and start times where they are saved, of ``vllm bench serve --save-detailed``."""
    with open_trace(path) as (file, _):
        content = file.read()
    try:
        result = json.loads(content)
    except ValueError as error:
        raise InputError(f"{path}: {error}; one JSON object would be right") from None
    if not isinstance(result, dict):
        raise InputError(f"{path}: {shorten(result)}; a JSON object would be right")
    keys = ["input_lens", "output_lens"] + (["start_times"] if result.get("start_times") else [])
    columns = {key: result.get(key) for key in keys}
    lengths = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
    if len(lengths) > 1 or lengths <= {-1, 0}:
        raise InputError(
            f"{path}: no lists {', '.join(keys)} of one length; "
            "a result of vllm bench serve --save-result --save-detailed would be right"
        )
    table = Table(path, lengths.pop(), columns, tuple(result), lambda row: f"request {row + 1}")
    return Trace(
        name=name,
        ids=numbered_ids(table.rows),
        prompt_tokens=table.whole_numbers("input_lens"),
        output_tokens=table.whole_numbers("output_lens"),
        arrival_s=None if "start_times" not in table else table.numbers("start_times", LATEST),
    )


def _without_empty(trace: Trace, path: str, warn: Warn) -> Trace:
    full = (trace.prompt_tokens > 0) & (trace.output_tokens > 0)
    if full.all():
        return trace
    if not full.any():
        raise InputError(f"{path}: none of {len(trace):,} requests has both prompt and output tokens")
    empty = len(trace) - int(full.sum())
    warn(f"{path}: {empty:,} of {len(trace):,} requests are left out: no prompt or no output tokens")
    return trace.take(np.flatnonzero(full))


def _in_order(trace: Trace, path: str, warn: Warn) -> Trace:
    if trace.arrival_s is None or (np.diff(trace.arrival_s) >= 0).all():
        return trace
    late = int((np.diff(trace.arrival_s) < 0).sum())
    warn(f"{path}: {late:,} requests arrive before the one above them: put in order of arrival")
    return trace.take(np.argsort(trace.arrival_s, kind="stable"))
