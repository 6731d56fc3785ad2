"""Writes requests in the canonical columns, as CSV, JSON Lines or Parquet.

Knows no other format. What is written reads back the same (``read_trace``), to the last bit of a time.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from qlm_sim.errors import InputError
from qlm_sim.workload.workload import Counts, Trace, Workload

SUFFIXES = (".csv", ".jsonl", ".parquet")


def write_trace(requests: Trace | Workload, path: Path) -> None:
    """Write the requests, in the format of the path's suffix. A file is whole or not there."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: suffix {path.suffix!r}; one of {', '.join(SUFFIXES)} would be right")
    table = _table(requests)
    part = path.with_name(path.name + ".part")
    try:
        if path.suffix == ".csv":
            pa_csv.write_csv(table, part)
        elif path.suffix == ".parquet":
            pa_parquet.write_table(table, part)
        else:
            with part.open("w", encoding="utf-8") as file:
                for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
                    values = dict(zip(table.column_names, row, strict=True))
                    file.write(json.dumps(values, ensure_ascii=False) + "\n")
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def _table(requests: Trace | Workload) -> pa.Table:
    columns: dict[str, object] = {"id": pa.array(requests.ids, pa.string())}
    if isinstance(requests, Workload):
        columns["arrival_s"] = requests.arrival_s
        columns["model"] = _names(requests.models, requests.model_index)
        columns["slo_class"] = _names([slo.name for slo in requests.slo_classes], requests.slo_index)
    else:
        if requests.arrival_s is not None:
            columns["arrival_s"] = requests.arrival_s
        if requests.model is not None:
            columns["model"] = pa.array(requests.model, pa.string())
        if requests.slo_class is not None:
            columns["slo_class"] = pa.array(requests.slo_class, pa.string())
    columns["prompt_tokens"] = requests.prompt_tokens
    columns["output_tokens"] = requests.output_tokens
    if requests.max_tokens is not None:
        columns["max_tokens"] = requests.max_tokens
    if requests.content is not None:
        columns["content"] = pa.array(requests.content, pa.string())
    return pa.table(columns)


def _names(names: Sequence[str], index: Counts) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(index))
