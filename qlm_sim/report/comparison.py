"""What policies are compared by: the columns that the terminal table and the HTML report share.

Knows summaries; nothing of how they are shown.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlm_sim.core.types import SloClass
from qlm_sim.metrics.run import PolicyRun

NOTHING = "–"


def percent(share: float | None) -> str:
    """One decimal, or as many as it takes not to call nearly all all, or next to none none."""
    if share is None:
        return NOTHING
    for decimals in range(1, 6):
        text = f"{share * 100:.{decimals}f}"
        if float(text) not in (0.0, 100.0) or share in (0.0, 1.0):
            break
    return f"{text}%"


def count(value: float) -> str:
    """A whole number, or the mean of some, thousands marked."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def number(value: float | None) -> str:
    """Three significant digits, thousands marked."""
    if value is None:
        return NOTHING
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def seconds(value: float | None) -> str:
    """A duration with its unit: 0 ms, 7.69 ms, 85.4 ms, 1.24 s, 42.0 s, 12.5 min, 3.10 h."""
    if value is None:
        return NOTHING
    if value < 0.9995:
        return f"{number(value * 1000)} ms" if value else "0 ms"
    if value < 120:
        return f"{number(value)} s"
    return f"{number(value / 60)} min" if value < 7200 else f"{number(value / 3600)} h"


def targets(slo: SloClass) -> str:
    """What a class promises: "TTFT ≤ 20 s, E2E ≤ 1 h"."""

    def plain(value: float) -> str:
        for unit, unit_s in (("h", 3600), ("min", 60)):
            if value >= 120 and value % unit_s == 0:
                return f"{value / unit_s:g} {unit}"
        return f"{value:g} s"

    promised = (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s), ("E2E", slo.e2e_s))
    return ", ".join(f"{what} ≤ {plain(value)}" for what, value in promised if value is not None)


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of a summary. ``better`` is max or min, or None where neither end is the goal."""

    title: str
    keys: tuple[str, ...]
    show: Callable[[Any], str]
    better: Callable[[Sequence[float]], float] | None = None

    def value(self, summary: Mapping[str, Any]) -> Any:
        found: Any = summary
        for key in self.keys:
            found = found[key]
        return found

    def rows(self, runs: Sequence[PolicyRun]) -> list[tuple[str, bool]]:
        """The text for each run, and whether it is the best, upper bounds apart.

        Where all look alike, none is.
        """
        values = [self.value(run.summary) for run in runs]
        texts = [self.show(value) for value in values]
        shown = [text + self._confidence(run.summary) for text, run in zip(texts, runs, strict=True)]
        known = [
            value
            for value, run in zip(values, runs, strict=True)
            if value is not None and not run.upper_bound
        ]
        if self.better is None or not known or len(set(map(self.show, known))) == 1:
            return [(text, False) for text in shown]
        best = self.show(self.better(known))
        return [
            (long, text == best and not run.upper_bound)
            for long, text, run in zip(shown, texts, runs, strict=True)
        ]

    def _confidence(self, summary: Mapping[str, Any]) -> str:
        """The half-width of 95 % confidence, where runs were repeated."""
        half_width = self.value(summary["ci95"]) if "ci95" in summary else None
        return "" if half_width is None else f" ±{self.show(half_width)}"


def attainment_columns(runs: Sequence[PolicyRun]) -> list[Column]:
    """SLO attainment, overall and of each class; apart, who was refused, where anybody was."""
    overall = Column("SLO met", ("slo_attainment", "overall"), percent, max)
    classes = [
        Column(slo.name, ("slo_attainment", "by_class", slo.name), percent, max)
        for slo in runs[0].slo_classes
    ]
    if not any(run.summary["refused"] for run in runs):
        return [overall, *classes]
    refused = Column("refused", ("refused",), count)
    admitted = Column("of admitted", ("slo_attainment", "admitted"), percent, max)
    return [overall, refused, admitted, *classes]


def service_columns(runs: Sequence[PolicyRun]) -> list[Column]:
    """Rates, latencies and what the cluster did for them; prefix caching where it is on."""
    prefix = Column("prefix", ("prefix_cache_hit_rate",), percent, max)
    on = any(run.summary.get("prefix_cache_hit_rate") is not None for run in runs)
    return [
        Column("req/s", ("throughput_rps",), number, max),
        Column("goodput/s", ("goodput_rps",), number, max),
        Column("TTFT p50", ("ttft_s", "p50"), seconds, min),
        Column("TTFT p99", ("ttft_s", "p99"), seconds, min),
        Column("GPU", ("gpu_utilization",), percent),
        Column("swaps", ("swaps",), count),
        Column("evictions", ("evictions",), count),
        *([prefix] if on else []),
    ]


def headline(runs: Sequence[PolicyRun]) -> str:
    """One honest sentence: which policy met the SLO most often, and where ``qlm`` stands."""
    ranked = sorted(
        (
            (run.summary["slo_attainment"]["overall"], run.name)
            for run in runs
            if len(run.requests) and not run.upper_bound
        ),
        key=lambda entry: -entry[0],
    )
    if not ranked:
        return _nothing_ranked(runs)
    best, winner = ranked[0]
    count = next(len(run.requests) for run in runs if run.name == winner)
    level = [name for share, name in ranked if best - share < 0.0005]
    behind = ranked[len(level) :]
    if len(level) > 1:
        sentence = f"{listed(level)} are level: each met the SLO for {percent(best)} of {count:,} requests"
    else:
        sentence = f"{winner} met the SLO for {percent(best)} of {count:,} requests"
    if behind:
        share, name = behind[0]
        sentence += f", {_points(best - share)} more than {name} ({percent(share)}), the next best"
    sentence += "."
    if "qlm" in (name for _, name in behind):
        place = [name for _, name in ranked].index("qlm") + 1
        share = ranked[place - 1][0]
        sentence += f" qlm is not the best here: {percent(share)}, {_points(best - share)} behind {winner}."
    return sentence


def _nothing_ranked(runs: Sequence[PolicyRun]) -> str:
    if not any(len(run.requests) for run in runs):
        return "No request arrived, so nothing was measured."
    return " ".join(
        f"{run.name}, an upper bound, met the SLO for {percent(run.summary['slo_attainment']['overall'])} of "
        f"{len(run.requests):,} requests."
        for run in runs
    )


def footnotes(runs: Sequence[PolicyRun]) -> list[str]:
    """What the marks in the tables mean."""
    return [
        f"* {run.name} is told every output length in advance: an upper bound, not a policy to run."
        for run in runs
        if run.upper_bound
    ]


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _points(difference: float) -> str:
    return f"{difference * 100:.1f} points"


def warnings(runs: Sequence[PolicyRun]) -> list[str]:
    """What a reader must know before trusting the figures: saturation, and requests left out."""
    saturated = [run for run in runs if run.summary["saturated"]]
    if len(saturated) > 2:
        names = listed([run.name for run in saturated])
        found = [f"{names}: Saturated; in a longer run latencies would be longer."]
    else:
        found = [f"{run.name}: {run.summary['saturation']}" for run in saturated]
    for run in runs:
        unfinished, refused = run.summary["unfinished"], run.summary["refused"]
        failed = run.summary["rejected"] - refused
        if unfinished:
            found.append(
                f"{run.name}: {unfinished:,} of {len(run.requests):,} requests were unfinished when the run "
                f"stopped at {seconds(run.end_s)}; they count as missed, and when they would end is unknown."
            )
        if refused:
            found.append(
                f"{run.name}: {refused:,} of {len(run.requests):,} requests were refused at once, as likely "
                "to be late; they count as missed, and the latencies are those of the others."
            )
        if failed:
            found.append(
                f"{run.name}: {failed:,} of {len(run.requests):,} requests failed or were cancelled; "
                "they count as missed, and the latencies are those of the others."
            )
    return found
