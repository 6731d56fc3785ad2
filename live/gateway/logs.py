"""Structured logs on stderr: one JSON object a line, for what happens and for every request that is over."""

import logging
import sys
import time
from typing import Any

import msgspec

from live.gateway.intake import Entry

_encode = msgspec.json.Encoder().encode


def _utc(at: float) -> str:
    """A Unix time as ISO 8601, to a millisecond."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03d}Z"


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return _encode(told).decode()


def set_up_logs(kind: str) -> None:
    """``kind``: "json" or "text"."""
    handler = logging.StreamHandler(sys.stderr)
    if kind == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for noisy in ("uvicorn.error", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class RequestLog:
    """One line for each request that is over."""

    def __init__(self, kind: str) -> None:
        self._json = kind == "json"
        self._log = logging.getLogger("live.requests")

    def over(self, entry: Entry, outcome: str, met: bool | None) -> None:
        request = entry.job.request
        first, end = entry.first_token_at, entry.finished_at
        told = {
            "time": _utc(time.time()),
            "level": "info",
            "logger": "live.requests",
            "id": entry.id,
            "tenant": entry.tenant.name,
            "model": request.model,
            "slo_class": entry.slo.name,
            "outcome": outcome,
            "slo_met": met,
            "ttft_s": None if first is None else round(first - entry.arrived_at, 4),
            "e2e_s": None if end is None else round(end - entry.arrived_at, 4),
            "estimated_wait_s": None if entry.estimate is None else round(entry.estimate.median_s, 4),
            "output_tokens": entry.output_tokens,
            "held": entry.held,
        }
        if self._json:
            sys.stderr.write(_encode(told).decode() + "\n")
        else:
            self._log.info(" ".join(f"{name}={value}" for name, value in told.items() if name != "logger"))
