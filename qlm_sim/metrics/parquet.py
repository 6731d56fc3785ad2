"""requests.parquet: one row per request and policy, written in row groups so that memory stays small.

The same runs give the same bytes: the file carries no time and no machine.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qlm_sim.metrics.columns import Mask, RequestColumns, State
from qlm_sim.metrics.run import PolicyRun

if TYPE_CHECKING:
    import pyarrow as pa

_ROW_GROUP = 65536
_STATUS = ["unfinished", "finished", "rejected", "failed"]
"""In the order of State from FINISHED on; all states before that are unfinished."""


def write_requests(path: Path, runs: Iterable[PolicyRun]) -> None:
    """Write the rows of every run, in order of arrival. What has no value is null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    word = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema(
        [
            ("policy", word),
            ("id", pa.string()),
            ("model", word),
            ("slo_class", word),
            ("arrival_s", pa.float64()),
            ("prompt_tokens", pa.int32()),
            ("output_tokens", pa.int32()),
            ("first_token_s", pa.float64()),
            ("finished_s", pa.float64()),
            ("instance", word),
            ("attempts", pa.int32()),
            ("evictions", pa.int32()),
            ("status", word),
            ("ttft_s", pa.float64()),
            ("tpot_s", pa.float64()),
            ("e2e_s", pa.float64()),
            ("slo_met", pa.bool_()),
        ]
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for run in runs:
            for start in range(0, len(run.requests), _ROW_GROUP):
                requests = run.requests.part(slice(start, start + _ROW_GROUP))
                columns = _columns(run.name, requests) | {"slo_met": requests.slo_met(run.slo_classes)}
                arrays = [
                    # A code below 0 and a NaN become null.
                    pa.DictionaryArray.from_arrays(_numbers(value[0], value[0] < 0), _texts(value[1]))
                    if isinstance(value, tuple)
                    else _numbers(value, np.isnan(value))
                    if isinstance(value, np.ndarray)
                    else _texts(value)
                    for value in map(columns.__getitem__, schema.names)
                ]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


# Arrays are made of buffers, because pa.array() imports pandas, which takes as long as a short run.


def _numbers(values: NDArray[Any], missing: Mask) -> "pa.Array[Any]":
    import pyarrow as pa

    data = _bits(values) if values.dtype == np.bool_ else np.ascontiguousarray(values)
    present = pa.py_buffer(_bits(~missing)) if missing.any() else None
    return pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), len(values), [present, pa.py_buffer(data)]
    )


def _texts(values: Sequence[str]) -> "pa.Array[Any]":
    import pyarrow as pa

    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(encoded), buffers)


def _bits(values: Mask) -> NDArray[np.uint8]:
    return np.packbits(values, bitorder="little")


def _columns(policy: str, requests: RequestColumns) -> dict[str, Any]:
    """Plain arrays, and (codes, words) for the columns of few different words."""
    return {
        "policy": (np.zeros(len(requests), dtype=np.int32), [policy]),
        "id": requests.ids,
        "model": (requests.model_index, list(requests.models)),
        "slo_class": (requests.class_index, list(requests.class_names)),
        "arrival_s": requests.arrival_s,
        "prompt_tokens": requests.prompt_tokens,
        "output_tokens": requests.output_tokens,
        "first_token_s": requests.first_token_s,
        "finished_s": requests.finished_s,
        "instance": (requests.instance_index, list(requests.instances)),
        "attempts": requests.attempts,
        "evictions": requests.evictions,
        "status": (np.maximum(requests.state.astype(np.int32) - State.FINISHED + 1, 0), _STATUS),
        "ttft_s": requests.ttft_s,
        "tpot_s": requests.tpot_s,
        "e2e_s": requests.e2e_s,
    }
