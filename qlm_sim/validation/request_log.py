"""Reads the log of a real engine: when each request came, how long it was and how long it took.

Takes CSV, JSON Lines, a JSON list, Parquet, and the results of ``vllm bench serve --save-detailed``, and
recognises columns by their names. Knows nothing of engines or simulations.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlm_sim.errors import InputError
from qlm_sim.validation.bench_starts import bench_starts
from qlm_sim.workload.files import open_trace
from qlm_sim.workload.tables import Table, csv_header, read_csv, read_jsonl, read_parquet, shorten

Floats = NDArray[np.float64]

METRICS = ("ttft_s", "tpot_s", "e2e_s", "queue_s")
"""Seconds to the first token, per token after it, to the last token, and waiting in the engine."""

NAMES = {
    "arrival_s": "arrival arrival_time arrival_timestamp arrival_ts arrived_at timestamp start_time "
    "started_at start_timestamp request_start request_start_time request_time req_time submit_time "
    "submitted_at send_time sent_at created_at start time",
    "prompt_tokens": "prompt_tokens num_prompt_tokens n_prompt_tokens number_input_tokens input_tokens "
    "num_input_tokens prompt_len input_len prompt_length input_length input_sequence_length isl "
    "num_prefill_tokens prefill_tokens contexttokens context_tokens request_tokens prompt input",
    "output_tokens": "output_tokens num_output_tokens n_output_tokens number_output_tokens completion_tokens "
    "generated_tokens generatedtokens output_len output_length output_sequence_length osl completion_len "
    "num_decode_tokens num_generation_tokens response_tokens decode_tokens output",
    "ttft_s": "ttft time_to_first_token first_token_latency first_token_delay",
    "tpot_s": "tpot time_per_output_token mean_itl avg_itl itl inter_token_latency tbt",
    "e2e_s": "e2e e2el e2e_latency e2e_time end_to_end end_to_end_latency request_latency "
    "e2e_request_latency total_latency latency duration",
    "queue_s": "queue queue_time queueing_time queued wait wait_time waiting_time request_queue_time",
    "first_token_at_s": "first_token_at first_token_timestamp first_token_ts first_token_time",
    "finished_at_s": "finished_at finish_time finished_time finish_timestamp end_time ended_at end_timestamp "
    "completed_at last_token_at",
}
"""Names of columns, the plainest first; case, blanks and dashes do not matter. The last two are on the
arrivals' clock, not durations; but see ``AMBIGUOUS``."""

AMBIGUOUS, LONGEST_S = "first_token_time", 86_400.0
"""A column of that name holds durations where nothing tells when requests finished, and all are so short."""

UNITS_S = {
    "": 1.0,
    "_s": 1.0,
    "_sec": 1.0,
    "_secs": 1.0,
    "_seconds": 1.0,
    "_ms": 1e-3,
    "_us": 1e-6,
    "_ns": 1e-9,
}
"""What may follow the name of a time."""

UNNAMED = 1e11
"""Points in time beyond so much are not in seconds: that would be past the year 5000 ..."""
CLOCKS_S = (1e-3, 1e-6, 1e-9)
"""... but in one of these units, in which they are Unix times ..."""
YEARS_S = (946_684_800.0, 4_102_444_800.0)
"""... of the years 2000 to 2100."""


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

    Times are in seconds unless a column's name ends in _ms, _us or _ns; points in time may also be Unix times
    in those units, or ISO 8601 dates. First tokens and finishes may be points in time as well.
    """
    table, columns, notes = _open(path)
    if _tells_durations(table, columns):
        columns["ttft_s"] = columns.pop("first_token_at_s")
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        if name not in columns:
            raise InputError(
                f"{path}: no column for {name} (found {', '.join(table.found)}); "
                f"one of {NAMES[name].replace(' ', ', ')} would be right"
            )
    if not any(name in columns for name in (*METRICS, "first_token_at_s", "finished_at_s")):
        raise InputError(
            f"{path}: no measured time (found {', '.join(table.found)}); "
            "any of ttft, tpot, e2e, queue is wanted"
        )
    if table.rows == 0:
        raise InputError(f"{path}: the file holds no request")
    arrival_s = _moments(table, *columns["arrival_s"])
    prompt = _counts(table, columns["prompt_tokens"][0])
    output = _counts(table, columns["output_tokens"][0])
    measured = {name: _times(table, *columns[name]) for name in METRICS if name in columns}
    for name, moment in (("ttft_s", "first_token_at_s"), ("e2e_s", "finished_at_s")):
        if name not in measured and moment in columns:
            measured[name] = _since(table, columns[moment], arrival_s)
    _check_order(table, measured)
    return _arranged(path, arrival_s, prompt, output, measured, notes)


def _arranged(
    path: str,
    arrival_s: Floats,
    prompt: NDArray[np.int64],
    output: NDArray[np.int64],
    measured: dict[str, Floats],
    notes: list[str],
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
    if empty := int((~full).sum()):
        notes.append(f"{path}: {empty:,} of {len(full):,} requests are left out: no prompt or no output")
    rows = np.flatnonzero(full)
    rows = rows[np.argsort(arrival_s[rows], kind="stable")]
    measured = {name: values[rows] for name, values in measured.items() if np.isfinite(values[rows]).any()}
    if not measured:
        raise InputError(f"{path}: the columns of measured times are empty; a time in some row is wanted")
    return RequestLog(
        path=path,
        arrival_s=arrival_s[rows] - arrival_s[rows[0]],
        prompt_tokens=prompt[rows],
        output_tokens=output[rows],
        measured=measured,
        notes=tuple(notes),
    )


# Files.


def _open(path: str) -> tuple[Table, dict[str, tuple[str, float]], list[str]]:
    """The file's table, for each name of ours the column and the seconds of its unit, and notes."""
    notes: list[str] = []
    with open_trace(path) as (file, _):
        head = file.read(1 << 16)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start:
        raise InputError(f"{path}: the file is empty")
    if start.startswith(b"PAR1"):
        columns = _columns(list(read_parquet(path, ()).found))
        return read_parquet(path, _wanted(columns)), columns, notes
    if start.startswith(b"[") or (start.startswith(b"{") and _is_one_object(path)):
        table = _json_table(path, notes)
        return table, _columns(list(table.found)), notes
    if start.startswith(b"{"):
        found = read_jsonl(path, ()).found
        if "mean_ttft_ms" in found:
            raise InputError(
                f"{path}: several results of vllm bench serve (--append-result); "
                "a file for each, with --save-detailed, would be right"
            )
        columns = _columns(list(found))
        return read_jsonl(path, _wanted(columns)), columns, notes
    columns = _columns(csv_header(path))
    return read_csv(path, _wanted(columns)), columns, notes


def _wanted(columns: Mapping[str, tuple[str, float]]) -> list[str]:
    return [column for column, _ in columns.values()]


def _columns(found: list[str]) -> dict[str, tuple[str, float]]:
    plain = {_plain(name): name for name in reversed(found)}
    columns = {}
    for ours, names in NAMES.items():
        units = UNITS_S if ours.endswith("_s") else {"": 1.0}
        for name in names.split():
            match = next((unit for unit in units if name + unit in plain), None)
            if match is not None:
                columns[ours] = (plain[name + match], units[match])
                break
    return columns


def _plain(column: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_")


def _tells_durations(table: Table, columns: Mapping[str, tuple[str, float]]) -> bool:
    """Whether what is named as the time of the first token is the time that it took."""
    column, unit_s = columns.get("first_token_at_s", ("", 1.0))
    if not _plain(column).startswith(AMBIGUOUS) or {"ttft_s", "finished_at_s"} & set(columns):
        return False
    try:
        longest = float(np.nanmax(_times(table, column, unit_s), initial=0.0))
    except InputError:  # dates
        return False
    return longest <= LONGEST_S


def _is_one_object(path: str) -> bool:
    """Whether the file is a single JSON object, not one per line."""
    with open_trace(path) as (file, _):
        first = next(filter(bytes.strip, file), b"")
        rest = file.read(1 << 12).strip()
    if not rest:
        return any(key in first for key in (b'"input_lens"', b'"ttfts"', b'"mean_ttft_ms"'))
    try:
        json.loads(first)
    except ValueError:
        return True
    return False


def _json_table(path: str, notes: list[str]) -> Table:
    with open_trace(path) as (file, _):
        content = file.read()
    try:
        value = json.loads(content)
    except ValueError as error:
        raise InputError(f"{path}: {error}; JSON would be right") from None
    if isinstance(value, dict):
        return _bench_table(path, value, notes)
    keys: dict[str, None] = {}
    for number, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: item {number}: {shorten(row)}; a JSON object would be right")
        keys.update(dict.fromkeys(row))
    columns = {key: [row.get(key) for row in value] for key in keys}
    return Table(path, len(value), columns, tuple(keys), lambda row: f"item {row + 1}")


def _bench_table(path: str, result: dict[str, Any], notes: list[str]) -> Table:
    """The requests of a ``vllm bench serve`` result: lengths, first tokens and gaps between tokens."""
    wanted = ("input_lens", "output_lens", "ttfts", "itls")
    missing = [key for key in wanted if not isinstance(result.get(key), list)]
    if missing:
        raise InputError(
            f"{path}: no list {', '.join(missing)}; a result of vllm bench serve --save-result "
            "--save-detailed holds one per request"
        )
    for number, (ttft, gaps) in enumerate(zip(result["ttfts"], result["itls"], strict=False), 1):
        if not _is_number(ttft):
            raise InputError(f"{path}: ttfts of request {number}: {shorten(ttft)}; a number would be right")
        if not isinstance(gaps, list) or not all(map(_is_number, gaps)):
            raise InputError(
                f"{path}: itls of request {number}: {shorten(gaps)}; a list of numbers would be right"
            )
    e2e = [ttft + sum(gaps) for ttft, gaps in zip(result["ttfts"], result["itls"], strict=False)]
    starts = result.get("start_times")
    if not starts:
        starts, note = bench_starts(path, result, e2e)
        notes.append(f"{path}: no start_times; {note}")
    columns = {
        "arrival": starts,
        "prompt_tokens": result["input_lens"],
        "output_tokens": result["output_lens"],
        "ttft": result["ttfts"],
        "e2e": e2e,
    }
    if len({len(column) for column in columns.values()}) > 1:
        raise InputError(f"{path}: lists of one length are wanted: start_times, {', '.join(wanted)}")
    return Table(path, len(starts), columns, tuple(columns), lambda row: f"request {row + 1}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Columns.


def _moments(table: Table, column: str, unit_s: float) -> Floats:
    """Points in time, in seconds on whatever clock the column has."""
    try:
        values = table.numbers(column)
    except InputError as error:
        try:
            return table.instants(column)
        except InputError:
            raise error from None
    row = int(values.argmax()) if len(values) else 0
    if unit_s == 1.0 and len(values) and values[row] > UNNAMED:
        clocks = [each for each in CLOCKS_S if YEARS_S[0] <= values[row] * each < YEARS_S[1]]
        if not clocks:
            raise table.error(
                row,
                f"{column} is {values[row]:.0f}, no Unix time in any unit; a name that ends in its unit "
                "(_ms, _us, _ns) would be right",
            )
        unit_s = clocks[0]
    return values * unit_s


def _since(table: Table, column: tuple[str, float], arrival_s: Floats) -> Floats:
    """Seconds from each arrival to the point in time that the column tells."""
    found = _moments(table, *column) - arrival_s
    if (found < 0).any():
        row = int((found < 0).argmax())
        raise table.error(
            row,
            f"{column[0]} lies {-found[row]:g} s before the arrival; a point in time on the arrivals' clock "
            "would be right, or a duration named ttft or e2e",
        )
    return found


def _counts(table: Table, column: str) -> NDArray[np.int64]:
    """Whole numbers of 0 or more; 0 for an empty cell, as a failed request's is."""
    cells = [0 if _is_empty(cell) else cell for cell in _cells(table, column)]
    return replace(table, columns={column: cells}).whole_numbers(column)


def _cells(table: Table, column: str) -> list[object]:
    cells = table.columns[column]
    return list(cells) if isinstance(cells, Sequence) else cells.to_pylist()


def _is_empty(cell: object) -> bool:
    """Whether the cell is blank, null or NaN, which some writers put where there is nothing."""
    if isinstance(cell, str):
        return cell.strip().lower() in ("", "nan")
    return cell is None or cell != cell


def _times(table: Table, column: str, unit_s: float) -> Floats:
    """Seconds of 0 or more; NaN for an empty cell."""
    seconds = np.full(table.rows, np.nan)
    for row, cell in enumerate(_cells(table, column)):
        if _is_empty(cell):
            continue
        try:
            if isinstance(cell, bool):
                raise ValueError
            seconds[row] = float(cell) * unit_s  # type: ignore[arg-type]
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
