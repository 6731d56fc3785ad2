"""Reads the log of a real engine: when each request came, how long it was and how long it took.

Takes CSV, JSON Lines, a JSON list, Parquet, and the results of ``vllm bench serve --save-detailed``, and
recognises columns by their names. Knows nothing of engines or simulations.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlm_sim.errors import InputError
from qlm_sim.workload.files import open_trace
from qlm_sim.workload.tables import Table, csv_header, read_csv, read_jsonl, read_parquet, shorten

Floats = NDArray[np.float64]

METRICS = ("ttft_s", "tpot_s", "e2e_s", "queue_s")
"""Seconds to the first token, per token after it, to the last token, and waiting in the engine."""

NAMES = {
    "arrival_s": "arrival arrival_time arrived_at timestamp start_time started_at request_time req_time "
    "sent_at start time",
    "prompt_tokens": "prompt_tokens num_prompt_tokens input_tokens num_input_tokens prompt_len input_len "
    "prompt_length input_length num_prefill_tokens contexttokens context_tokens request_tokens prompt input",
    "output_tokens": "output_tokens num_output_tokens completion_tokens generated_tokens generatedtokens "
    "output_len output_length num_decode_tokens num_generation_tokens response_tokens decode_tokens output",
    "ttft_s": "ttft time_to_first_token first_token_latency first_token_time",
    "tpot_s": "tpot time_per_output_token mean_itl",
    "e2e_s": "e2e e2el e2e_latency end_to_end end_to_end_latency request_latency e2e_request_latency latency",
    "queue_s": "queue queue_time queueing_time queued wait wait_time waiting_time request_queue_time",
}
"""Names of columns, the plainest first; case, blanks and dashes do not matter."""

UNITS_S = {"": 1.0, "_s": 1.0, "_sec": 1.0, "_secs": 1.0, "_seconds": 1.0, "_ms": 1e-3, "_us": 1e-6}
"""What may follow the name of a time."""


@dataclass(frozen=True)
class RequestLog:
    """A real run, in order of arrival. Columns of one length."""

    path: str
    arrival_s: Floats
    """Seconds since the first arrival."""
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    measured: Mapping[str, Floats]
    """Those of METRICS that the log tells or that follow from what it tells; NaN where a row has none."""
    notes: tuple[str, ...] = ()
    """What was left out."""

    def __len__(self) -> int:
        return len(self.arrival_s)


def read_request_log(path: str) -> RequestLog:
    """The log in a file, gzip-compressed or not. Raises InputError that names the line or key.

    Times are in seconds unless a column's name ends in _ms or _us; arrivals may also be ISO 8601 dates.
    """
    table, columns = _open(path)
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        if name not in columns:
            raise InputError(
                f"{path}: no column for {name} (found {', '.join(table.found)}); "
                f"one of {NAMES[name].replace(' ', ', ')} would be right"
            )
    if not any(name in columns for name in METRICS):
        raise InputError(
            f"{path}: no measured time (found {', '.join(table.found)}); "
            "any of ttft, tpot, e2e, queue is wanted"
        )
    if table.rows == 0:
        raise InputError(f"{path}: the file holds no request")
    arrival_s = _arrivals(table, *columns["arrival_s"])
    prompt = table.whole_numbers(columns["prompt_tokens"][0])
    output = table.whole_numbers(columns["output_tokens"][0])
    measured = {name: _times(table, *columns[name]) for name in METRICS if name in columns}
    _check_order(table, measured)
    return _arranged(path, arrival_s, prompt, output, measured)


def _arranged(
    path: str,
    arrival_s: Floats,
    prompt: NDArray[np.int64],
    output: NDArray[np.int64],
    measured: dict[str, Floats],
) -> RequestLog:
    """Sorted by arrival, without empty requests, with the times that follow from the others."""
    ttft, tpot, e2e = (measured.get(name) for name in ("ttft_s", "tpot_s", "e2e_s"))
    gaps = np.where(output > 1, output - 1.0, np.nan)
    if e2e is None and ttft is not None and tpot is not None:
        measured["e2e_s"] = ttft + np.where(output > 1, tpot * (output - 1.0), 0.0)
    elif tpot is None and ttft is not None and e2e is not None:
        measured["tpot_s"] = (e2e - ttft) / gaps
    elif ttft is None and tpot is not None and e2e is not None:
        measured["ttft_s"] = e2e - np.where(output > 1, tpot * (output - 1.0), 0.0)
    if "tpot_s" in measured:
        measured["tpot_s"] = np.where(output > 1, measured["tpot_s"], np.nan)
    full = (prompt > 0) & (output > 0)
    if not full.any():
        raise InputError(f"{path}: none of {len(full):,} requests has both prompt and output tokens")
    notes = []
    if empty := int((~full).sum()):
        notes.append(f"{path}: {empty:,} of {len(full):,} requests are left out: no prompt or no output")
    rows = np.flatnonzero(full)
    rows = rows[np.argsort(arrival_s[rows], kind="stable")]
    return RequestLog(
        path=path,
        arrival_s=arrival_s[rows] - arrival_s[rows[0]],
        prompt_tokens=prompt[rows],
        output_tokens=output[rows],
        measured={name: values[rows] for name, values in measured.items()},
        notes=tuple(notes),
    )


# Files.


def _open(path: str) -> tuple[Table, dict[str, tuple[str, float]]]:
    """The file's table, and for each name of ours the column and the seconds of its unit."""
    with open_trace(path) as (file, _):
        head = file.read(1 << 16)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start:
        raise InputError(f"{path}: the file is empty")
    if start.startswith(b"PAR1"):
        import pyarrow.parquet as pq

        columns = _columns(pq.read_schema(path).names)
        return read_parquet(path, _wanted(columns)), columns
    if start.startswith(b"[") or (start.startswith(b"{") and _is_one_object(path)):
        table = _json_table(path)
        return table, _columns(list(table.found))
    if start.startswith(b"{"):
        found = read_jsonl(path, ()).found
        columns = _columns(list(found))
        return read_jsonl(path, _wanted(columns)), columns
    columns = _columns(csv_header(path))
    return read_csv(path, _wanted(columns)), columns


def _wanted(columns: Mapping[str, tuple[str, float]]) -> list[str]:
    return [column for column, _ in columns.values()]


def _columns(found: list[str]) -> dict[str, tuple[str, float]]:
    plain = {re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"): name for name in reversed(found)}
    columns = {}
    for ours, names in NAMES.items():
        units = UNITS_S if ours.endswith("_s") else {"": 1.0}
        for name in names.split():
            match = next((unit for unit in units if name + unit in plain), None)
            if match is not None:
                columns[ours] = (plain[name + match], units[match])
                break
    return columns


def _is_one_object(path: str) -> bool:
    """Whether the file is a single JSON object, not one per line."""
    with open_trace(path) as (file, _):
        first = file.readline()
        rest = file.read(1 << 12).strip()
    if not rest:
        return b'"input_lens"' in first or b'"ttfts"' in first
    try:
        json.loads(first)
    except ValueError:
        return True
    return False


def _json_table(path: str) -> Table:
    with open_trace(path) as (file, _):
        content = file.read()
    try:
        value = json.loads(content)
    except ValueError as error:
        raise InputError(f"{path}: {error}; JSON would be right") from None
    if isinstance(value, dict):
        return _bench_table(path, value)
    keys: dict[str, None] = {}
    for number, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: item {number}: {shorten(row)}; a JSON object would be right")
        keys.update(dict.fromkeys(row))
    columns = {key: [row.get(key) for row in value] for key in keys}
    return Table(path, len(value), columns, tuple(keys), lambda row: f"item {row + 1}")


def _bench_table(path: str, result: dict[str, Any]) -> Table:
    """The requests of a ``vllm bench serve`` result: lengths, first tokens and gaps between tokens."""
    wanted = ("input_lens", "output_lens", "ttfts", "itls")
    missing = [key for key in wanted if not isinstance(result.get(key), list)]
    if missing:
        raise InputError(
            f"{path}: no list {', '.join(missing)}; a result of vllm bench serve --save-result "
            "--save-detailed holds one per request"
        )
    starts = result.get("start_times")
    if not starts:
        if str(result.get("request_rate")) != "inf" or result.get("max_concurrency"):
            raise InputError(
                f"{path}: no start_times, so when requests arrived is unknown; a result of a vLLM that "
                "saves them is wanted, or one of --request-rate inf without --max-concurrency"
            )
        starts = [0.0] * len(result["input_lens"])
    columns = {
        "arrival": starts,
        "prompt_tokens": result["input_lens"],
        "output_tokens": result["output_lens"],
        "ttft": result["ttfts"],
        "e2e": [ttft + sum(gaps) for ttft, gaps in zip(result["ttfts"], result["itls"], strict=False)],
    }
    if len({len(column) for column in columns.values()}) > 1:
        raise InputError(f"{path}: lists of one length are wanted: start_times, {', '.join(wanted)}")
    return Table(path, len(starts), columns, tuple(columns), lambda row: f"request {row + 1}")


# Columns.


def _arrivals(table: Table, column: str, unit_s: float) -> Floats:
    try:
        return table.numbers(column) * unit_s
    except InputError as error:
        try:
            return table.datetimes(column)
        except InputError:
            raise error from None


def _times(table: Table, column: str, unit_s: float) -> Floats:
    """Seconds of 0 or more; NaN for an empty cell."""
    cells = table.columns[column]
    values = list(cells) if isinstance(cells, Sequence) else cells.to_pylist()
    seconds = np.full(table.rows, np.nan)
    for row, cell in enumerate(values):
        if cell is None or cell == "":
            continue
        try:
            if isinstance(cell, bool):
                raise ValueError
            seconds[row] = float(cell) * unit_s
        except (TypeError, ValueError):
            seconds[row] = -1.0
        if not 0 <= seconds[row] < float("inf"):
            raise table.error(
                row, f"{column} is {shorten(cell)}; a time of 0 or more, or none, would be right"
            )
    return seconds


def _check_order(table: Table, measured: Mapping[str, Floats]) -> None:
    """A first token after the last one shows that columns are of different units."""
    if "ttft_s" in measured and "e2e_s" in measured:
        late = measured["ttft_s"] > 1.01 * measured["e2e_s"] + 1e-3
        if late.any():
            row = int(late.argmax())
            raise table.error(
                row,
                f"the first token takes {measured['ttft_s'][row]:g} s and all of them "
                f"{measured['e2e_s'][row]:g} s; a column in milliseconds should be named so (ttft_ms)",
            )
