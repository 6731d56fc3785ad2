"""Measurements to fit to: request logs, and what ``vllm bench serve|latency|throughput`` write.

Everything becomes a log of requests: a batch whose time as a whole was measured is a log of requests that
arrive together.
"""

import json
from dataclasses import dataclass

import numpy as np

from qlm_sim.errors import InputError
from qlm_sim.validation.request_log import RequestLog, read_request_log
from qlm_sim.workload.files import open_trace


@dataclass(frozen=True)
class Observation:
    """One run. Requests' own times are in the log; ``makespan_s`` is from first arrival to last finish."""

    log: RequestLog
    makespan_s: float | None = None


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What a latency or throughput result does not say of itself. Tokens of each request; requests."""

    input_len: int | None = None
    output_len: int | None = None
    batch_size: int | None = None


def read_observation(path: str, shape: BatchShape) -> Observation:
    """A request log or the result of a vLLM benchmark. Raises InputError.

    ``vllm bench latency`` needs all of ``shape``, ``throughput`` its lengths.
    """
    result = _one_object(path)
    if result is None:
        return Observation(read_request_log(path))
    if "avg_latency" in result:
        requests = _told(path, "--batch-size", shape.batch_size)
        seconds = _positive(path, result, "avg_latency")
    elif "elapsed_time" in result:
        requests = int(_positive(path, result, "num_requests"))
        seconds = _positive(path, result, "elapsed_time")
    else:
        return Observation(read_request_log(path))
    prompt = _told(path, "--input-len", shape.input_len)
    output = _told(path, "--output-len", shape.output_len)
    log = RequestLog(
        path=path,
        arrival_s=np.zeros(requests),
        prompt_tokens=np.full(requests, prompt),
        output_tokens=np.full(requests, output),
        measured={},
    )
    return Observation(log, seconds)


def _one_object(path: str) -> dict[str, object] | None:
    with open_trace(path) as (file, _):
        content = file.read() if file.read(1) == b"{" else b""
    try:
        value = json.loads(b"{" + content)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _told(path: str, flag: str, value: int | None) -> int:
    if value is None:
        raise InputError(f"{path}: a vLLM latency or throughput result does not say {flag}; give the flag")
    if value < 1:
        raise InputError(f"{flag}: found {value}, expected a whole number at least 1")
    return value


def _positive(path: str, result: dict[str, object], key: str) -> float:
    value = result.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{path}: {key} is {value!r}; a number above 0 would be right")
    return float(value)
