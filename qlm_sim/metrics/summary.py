"""A run in figures: the keys of summary.json under one policy, and how each is defined.

Knows the requests, the recorder and the SLO classes; nothing of policies or files. None stands for what
has no value.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qlm_sim.core.types import SloClass
from qlm_sim.metrics.columns import FloatColumn, Mask, RequestColumns
from qlm_sim.metrics.recorder import RunRecorder
from qlm_sim.metrics.saturation import saturation

Summary = dict[str, Any]


def summarise(
    requests: RequestColumns, recorder: RunRecorder, slo_classes: Sequence[SloClass], end_s: float
) -> Summary:
    """The figures of a run that was stopped, or had nothing left to do, at ``end_s``. ``requests`` are the
    recorder's.

    * ``requests`` = ``finished`` + ``unfinished`` + ``rejected``. Failed and cancelled requests count
      as rejected; ``refused`` are those of them that admission control refused at once. Requests are
      those that arrived before ``end_s``.
    * ``slo_attainment``: share of all requests (unfinished and rejected included, as not met) that
      finished within every target of their class. None for a class without requests. ``admitted`` is
      the same share of the requests that were not refused.
    * ``makespan_s``: from the first arrival to the last finish, or to ``end_s`` where work was left
      unfinished. Rates (``throughput_rps`` of finished requests, ``goodput_rps`` of those that met
      their SLO, ``output_tokens_per_s`` of finished requests) are per second of it.
    * ``ttft_s`` is over every request that got a first token, ``tpot_s`` and ``e2e_s`` over the
      finished; ``tpot_s`` leaves out outputs of one token. Percentiles interpolate linearly.
    * ``gpu_utilization``: share of the makespan in which an engine executed iterations, mean over
      instances; ``kv_utilization``: mean of the engines' reports.
    * ``swaps``: models loaded after the start; ``evictions``: by order of the scheduler;
      ``preemptions``: by engines short of KV blocks.
    * ``prefix_cache_hit_rate``: share of the prompts' tokens that the engines found in their prefix caches.
      As vLLM counts: the prompt of a resumed request includes what it had generated, and one that comes back
      from a preemption is not counted. None without prefix caching.
    * ``saturated`` and ``saturation``: see qlm_sim.metrics.saturation, and qlm_sim.offered_load, which adds
      ``offered_load`` (None with prefix caching, and for a few requests).
    """
    met = requests.slo_met(slo_classes)
    start_s, stop_s = _window(requests, end_s)
    makespan_s = stop_s - start_s
    everyone = np.ones(len(requests), dtype=np.bool_)
    by_class = {
        slo.name: _counts(requests, requests.of_class(slo.name))
        | {"slo_attainment": _share(met, requests.of_class(slo.name))}
        | _latencies(requests, requests.of_class(slo.name))
        for slo in slo_classes
    }
    verdict = saturation(requests)
    engines = recorder.engines().values()
    edges_s = np.array([start_s, stop_s])
    return (
        _counts(requests, everyone)
        | {
            "slo_attainment": {
                "overall": _share(met, everyone),
                "admitted": _share(met, ~requests.refused),
                "by_class": {name: figures["slo_attainment"] for name, figures in by_class.items()},
            },
            "throughput_rps": _rate(requests.finished.sum(), makespan_s),
            "goodput_rps": _rate(met.sum(), makespan_s),
            "output_tokens_per_s": _rate(
                requests.output_tokens[requests.finished].sum(dtype=np.int64), makespan_s
            ),
        }
        | _latencies(requests, everyone)
        | {
            "gpu_utilization": _mean([float(engine.busy_share(edges_s)[0]) for engine in engines])
            if makespan_s > 0
            else None,
            "kv_utilization": _mean(
                [float(np.mean(engine.kv_utilization)) for engine in engines if len(engine.time_s)]
            ),
            "swaps": recorder.swaps(),
            "evictions": int(requests.evictions.sum()),
            "preemptions": recorder.preemptions(),
            "prefix_cache_hit_rate": recorder.prefix_cache_hit_rate(),
            "makespan_s": makespan_s,
            "saturated": verdict.saturated,
            "saturation": verdict.sentence,
            "by_class": by_class,
        }
    )


def _window(requests: RequestColumns, end_s: float) -> tuple[float, float]:
    """First arrival, and last finish or ``end_s``: the span that rates and shares are taken over."""
    if len(requests) == 0:
        return 0.0, 0.0
    start_s = float(requests.arrival_s.min())
    if requests.unfinished.any():
        return start_s, max(start_s, end_s)
    if not requests.finished.any():
        return start_s, start_s
    return start_s, float(np.nanmax(requests.finished_s))


def _counts(requests: RequestColumns, rows: Mask) -> Summary:
    return {
        "requests": int(rows.sum()),
        "finished": int((requests.finished & rows).sum()),
        "unfinished": int((requests.unfinished & rows).sum()),
        "rejected": int((requests.rejected & rows).sum()),
        "refused": int((requests.refused & rows).sum()),
    }


def _latencies(requests: RequestColumns, rows: Mask) -> Summary:
    return {
        "ttft_s": _distribution(requests.ttft_s[rows]),
        "tpot_s": _distribution(requests.tpot_s[rows]),
        "e2e_s": _distribution(requests.e2e_s[rows]),
    }


def _distribution(values: FloatColumn) -> Summary:
    names = ("mean", "p50", "p90", "p95", "p99")
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return dict.fromkeys(names)
    percentiles = np.percentile(values, (50, 90, 95, 99))
    return dict(zip(names, (float(values.mean()), *percentiles.tolist()), strict=True))


def _share(met: Mask, rows: Mask) -> float | None:
    return float(met[rows].mean()) if rows.any() else None


def _rate(amount: float, seconds: float) -> float | None:
    return float(amount) / seconds if seconds > 0 else None


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
