"""Columns out of CSV, JSON Lines and Parquet files, every bad cell told with its line.

Knows nothing of what the columns mean. Whole columns are converted at once; only when that fails
are the cells looked at one by one, to say which is wrong.
"""

import csv
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qlm_sim.errors import InputError
from qlm_sim.workload.files import not_utf8, open_trace, text_lines

if TYPE_CHECKING:  # slow to import: loaded where a CSV or Parquet file is read
    import pyarrow as pa

MOST = 10**9
"""The largest count of tokens taken for one."""


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of one length, as found: text, JSON values or Arrow numbers."""

    path: str
    rows: int
    columns: Mapping[str, "Sequence[object] | pa.ChunkedArray"]
    found: tuple[str, ...]
    """Every column of the file, those not read too."""
    line_of: Callable[[int], str]
    """Where a row (from 0) stands in the file, in words."""

    def __contains__(self, column: str) -> bool:
        return column in self.columns

    def numbers(self, column: str, most: float = np.inf) -> NDArray[np.float64]:
        """Finite numbers from 0 to ``most``."""
        values = self._floats(column)
        bad = ~(np.isfinite(values) & (values >= 0) & (values <= most))
        if bad.any():
            right = "a number of 0 or more" + (f", up to {most:g}" if most < np.inf else "")
            raise self._bad_cell(column, int(bad.argmax()), right)
        return values

    def whole_numbers(self, column: str) -> NDArray[np.int64]:
        """Counts: whole numbers, 0 or more."""
        right = f"a whole number from 0 to {MOST}"
        values = self._floats(column, right)
        bad = ~((values >= 0) & (values <= MOST) & (values == np.floor(values)))
        if bad.any():
            raise self._bad_cell(column, int(bad.argmax()), right)
        return values.astype(np.int64)

    def datetimes(self, column: str) -> NDArray[np.float64]:
        """ISO 8601 dates with times, as seconds since the earliest; UTC where no zone is said."""
        nanoseconds = self._nanoseconds(column)
        seconds: NDArray[np.float64] = (nanoseconds - nanoseconds.min()) / 1e9
        return seconds

    def instants(self, column: str) -> NDArray[np.float64]:
        """Such dates as Unix times in seconds, to a microsecond."""
        seconds: NDArray[np.float64] = self._nanoseconds(column) / 1e9
        return seconds

    def strings(self, column: str) -> list[str]:
        """Text; "" where a row has none."""
        texts = []
        for row, cell in enumerate(self._cells(column)):
            if cell is not None and not isinstance(cell, str):
                raise self._bad_cell(column, row, "text")
            texts.append(cell or "")
        return texts

    def integer_lists(self, column: str) -> list[list[int]]:
        """Lists of whole numbers; an empty one where a row has none."""
        lists = []
        for row, cell in enumerate(self._cells(column)):
            cell = [] if cell is None else cell
            if not isinstance(cell, list) or not all(type(each) is int for each in cell):
                raise self._bad_cell(column, row, "a list of whole numbers")
            lists.append(cell)
        return lists

    def error(self, row: int, message: str) -> InputError:
        return InputError(f"{self.path}: {self.line_of(row)}: {message}")

    def _cells(self, column: str) -> list[object]:
        cells = self.columns[column]
        return list(cells) if isinstance(cells, Sequence) else cells.to_pylist()

    def _nanoseconds(self, column: str) -> NDArray[np.int64]:
        plain = self._plain_times(column)
        return self._any_times(column) if plain is None else plain

    def _plain_times(self, column: str) -> NDArray[np.int64] | None:
        """Nanoseconds since 1970 of an Arrow column whose times are whole and name no zone."""
        cells = self.columns[column]
        if isinstance(cells, Sequence) or cells.null_count:
            return None
        import pyarrow as pa

        try:
            return _numbers(cells.cast(pa.timestamp("ns")).cast(pa.int64()))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return None

    def _any_times(self, column: str) -> NDArray[np.int64]:
        """Nanoseconds since 1970 of dates with zones or without, of whatever ISO 8601 form."""
        import pandas as pd  # slow to import

        cells = pd.Series(self._cells(column), dtype=object)
        when = pd.to_datetime(cells, format="ISO8601", utc=True, errors="coerce")
        bad = when.isna().to_numpy()
        if bad.any():
            raise self._bad_cell(column, int(bad.argmax()), "a time such as 2023-11-16 18:17:03.979960")
        return np.asarray(when.dt.as_unit("ns").astype("int64"), dtype=np.int64)

    def _floats(self, column: str, right: str = "a number of 0 or more") -> NDArray[np.float64]:
        cells = self.columns[column]
        if isinstance(cells, Sequence):
            if {type(cell) for cell in cells} <= {int, float}:
                with suppress(OverflowError):
                    return np.array(cells, dtype=np.float64)
        else:
            import pyarrow as pa

            with suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
                if cells.null_count == 0 and not pa.types.is_boolean(cells.type):
                    return _numbers(cells.cast(pa.float64()))
        values = np.empty(self.rows)
        for row, cell in enumerate(self._cells(column)):
            try:
                if isinstance(cell, bool) or not isinstance(cell, str | int | float) or "_" in str(cell):
                    raise ValueError
                values[row] = float(cell)
            except (ValueError, OverflowError):
                raise self._bad_cell(column, row, right) from None
        return values

    def _bad_cell(self, column: str, row: int, right: str) -> InputError:
        cell = self._cells(column)[row]
        if cell is None:
            return self.error(row, f"no {column}; {right} would be right")
        return self.error(row, f"{column} is {shorten(cell)}; {right} would be right")


def _numbers(column: "pa.ChunkedArray") -> NDArray[Any]:
    """The column without pandas, which ``to_numpy`` loads."""
    return np.concatenate([np.from_dlpack(chunk) for chunk in column.chunks])


def shorten(value: object) -> str:
    """The value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def csv_header(path: str) -> list[str]:
    """The names in the first line of a CSV file."""
    line, header = next(_csv_records(path), (0, []))
    if line != 1:
        raise InputError(f"{path}: line 1 is blank; the names of the columns would be right")
    return [name.strip() for name in header]


def read_csv(path: str, wanted: Collection[str]) -> Table:
    """The wanted columns that the file has, as text. Blank lines are passed over."""
    import pyarrow as pa
    import pyarrow.csv as pa_csv

    header = csv_header(path)
    for name in wanted:
        if header.count(name) > 1:
            raise InputError(
                f"{path}: line 1: column {name} stands there {header.count(name)} times, not once"
            )
    names = [str(place) for place in range(len(header))]
    places = {name: names[header.index(name)] for name in wanted if name in header}
    try:
        with open_trace(path) as (file, _):
            table = pa_csv.read_csv(
                file,
                pa_csv.ReadOptions(column_names=names, skip_rows=1, block_size=1 << 24),
                pa_csv.ParseOptions(newlines_in_values=True),
                pa_csv.ConvertOptions(
                    column_types={place: pa.string() for place in names},
                    include_columns=list(places.values()),
                    strings_can_be_null=False,
                ),
            )
    except pa.ArrowInvalid as error:
        for line, record in _csv_records(path):
            if len(record) != len(header):
                raise InputError(
                    f"{path}: line {line}: {len(record)} fields; {len(header)} would be right, as in line 1"
                ) from None
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from None

    def line_of(row: int) -> str:
        line, _ = next(islice(_csv_records(path), row + 1, None))
        return f"line {line}"

    columns = {name: table[place] for name, place in places.items()}
    return Table(path, table.num_rows, columns, tuple(header), line_of)


def _csv_records(path: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of every record, the header first: slow, and exact about lines."""
    line = 0
    with open_trace(path) as (file, _), TextIOWrapper(file, "utf-8-sig", newline="") as text:
        reader = csv.reader(text)
        try:
            for record in reader:
                if record:
                    yield line + 1, record
                line = reader.line_num
        except UnicodeDecodeError:
            raise not_utf8(path, f"after line {line}") from None
        except csv.Error as error:
            raise InputError(f"{path}: line {line + 1}: {error}") from None


def read_jsonl(path: str, wanted: Collection[str]) -> Table:
    """The wanted keys of one JSON object per line; None where a row lacks one that others have."""
    columns: dict[str, list[object]] = {name: [] for name in wanted}
    lines: list[int] = []
    keys: dict[str, None] = {}
    for line, value in json_lines(path):
        lines.append(line)
        keys.update(dict.fromkeys(value))
        for name, cells in columns.items():
            cells.append(value.get(name))
    found = {name: cells for name, cells in columns.items() if name in keys}
    return Table(path, len(lines), found, tuple(keys), lambda row: f"line {lines[row]}")


def json_lines(
    path: str, progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[int, dict[str, object]]]:
    """(line, object) of a JSON Lines file."""
    for line, text in text_lines(path, progress):
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}: line {line}: {error.msg} at column {error.colno}; one JSON object would be right"
            ) from None
        if not isinstance(value, dict):
            raise InputError(f"{path}: line {line}: {shorten(value)}; a JSON object would be right")
        yield line, value


def read_parquet(path: str, wanted: Collection[str]) -> Table:
    """The wanted columns that the file has."""
    import pyarrow as pa
    import pyarrow.parquet as pa_parquet

    try:
        with open_trace(path) as (file, _):
            parquet = pa_parquet.ParquetFile(file)
            found = tuple(parquet.schema_arrow.names)
            table = parquet.read([name for name in found if name in wanted])
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a whole Parquet file: {str(error).splitlines()[0]}") from None
    columns = {name: table[name] for name in table.column_names}
    return Table(path, table.num_rows, columns, found, lambda row: f"row {row + 1}")
