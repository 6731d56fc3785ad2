"""The terminal table: readable at 80 columns, plain where no terminal reads it, honest in its sentence."""

from io import StringIO

import pytest
from rich.console import Console

from qlm_sim.metrics.repeats import combine
from qlm_sim.metrics.run import PolicyRun
from qlm_sim.report.comparison import Column, headline, percent, seconds, warnings
from qlm_sim.report.table import print_comparison


def printed(runs, width: int, terminal: bool = False) -> str:
    out = StringIO()
    print_comparison(runs, Console(file=out, width=width, force_terminal=terminal))
    return out.getvalue()


def with_attainment(run: PolicyRun, name: str, share: float) -> PolicyRun:
    summary = run.summary | {"slo_attainment": {"overall": share, "by_class": {}}}
    return PolicyRun(**vars(run) | {"name": name, "summary": summary})


def test_80_columns_show_every_title_and_figure_whole(runs):
    text = printed(runs, 80)
    assert max(map(len, text.splitlines())) <= 80
    for word in ("SLO met", "interactive", "goodput/s", "TTFT p99", "evictions", "shepherd"):
        assert word in text
    for run in runs:
        assert percent(run.summary["slo_attainment"]["overall"]) in text


def test_means_of_repeated_runs_and_their_confidence_are_whole(runs):
    repeated = [
        PolicyRun(**vars(run) | {"summary": combine([run.summary, run.summary | {"swaps": 1_000}])})
        for run in runs
    ]
    text = printed(repeated, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    mean = (runs[0].summary["swaps"] + 1_000) / 2
    assert f"{mean:,.1f} ±" in text
    for word in ("SLO met", "TTFT p99", "evictions"):
        assert word in text


def test_wide_terminals_get_one_table(runs):
    assert sum("policy" in line for line in printed(runs, 160).splitlines()) == 1


def test_no_escape_codes_where_there_is_no_terminal(runs):
    assert "\x1b" not in printed(runs, 80)
    assert "\x1b[1m" in printed(runs, 80, terminal=True)  # the best are bold


def test_best_is_bold_and_ties_are_bold_together(runs):
    column = Column("SLO met", ("slo_attainment", "overall"), percent, max)
    trio = [with_attainment(runs[0], name, share) for name, share in (("a", 0.5), ("b", 0.9), ("c", 0.9))]
    assert column.rows(trio) == [("50.0%", False), ("90.0%", True), ("90.0%", True)]
    assert column.rows(trio[1:]) == [("90.0%", False), ("90.0%", False)]  # nothing to tell apart


def test_an_upper_bound_is_marked_and_wins_nothing(runs):
    bound = PolicyRun(**vars(with_attainment(runs[0], "clairvoyant", 0.97)) | {"upper_bound": True})
    pair = [with_attainment(runs[0], name, share) for name, share in (("edf", 0.8), ("qlm", 0.9))]
    column = Column("SLO met", ("slo_attainment", "overall"), percent, max)
    assert column.rows([*pair, bound]) == [("80.0%", False), ("90.0%", True), ("97.0%", False)]
    assert headline([*pair, bound]) == headline(pair)
    assert headline([bound]).startswith("clairvoyant, an upper bound, met the SLO for 97.0% of")
    text = printed([runs[0], PolicyRun(**vars(runs[0]) | {"name": "clairvoyant", "upper_bound": True})], 80)
    assert "clairvoyant* " in text
    assert "* clairvoyant is told every output length in advance: an upper bound" in text


def test_refused_requests_are_shown_apart_where_there_are_any(runs):
    assert "refused" not in printed(runs, 160)
    attainment = runs[0].summary["slo_attainment"] | {"overall": 0.5, "admitted": 0.75}
    some = runs[0].summary | {"refused": 12, "rejected": 14, "slo_attainment": attainment}
    text = printed([PolicyRun(**vars(runs[0]) | {"summary": some})], 200)
    assert "refused" in text
    assert "75.0%" in text
    assert "12 of" in text
    assert "2 of" in text  # those that failed, told apart


def test_headline_names_the_winner_and_its_lead(runs):
    sentence = headline([with_attainment(runs[0], "edf", 0.812), with_attainment(runs[0], "qlm", 0.938)])
    assert sentence.startswith("qlm met the SLO for 93.8% of")
    assert "12.6 points more than edf (81.2%)" in sentence
    assert "not the best" not in sentence


def test_headline_says_so_when_qlm_is_not_best(runs):
    sentence = headline([with_attainment(runs[0], "edf", 0.95), with_attainment(runs[0], "qlm", 0.938)])
    assert "qlm is not the best here: 93.8%, 1.2 points behind edf." in sentence


def test_headline_calls_a_tie_a_tie(runs):
    sentence = headline([with_attainment(runs[0], "edf", 0.9), with_attainment(runs[0], "qlm", 0.9)])
    assert sentence.startswith("edf and qlm are level")


def test_unfinished_requests_are_warned_of(runs):
    cut = PolicyRun(**vars(runs[0]) | {"summary": runs[0].summary | {"unfinished": 7, "saturated": False}})
    assert any("7 of" in warning and "unfinished" in warning for warning in warnings([cut]))


def test_saturation_is_told_at_length_for_one_run_and_in_one_line_for_many(runs):
    full = PolicyRun(**vars(runs[0]) | {"summary": runs[0].summary | {"saturated": True}})
    assert warnings([full])[0] == f"{full.name}: {full.summary['saturation']}"
    assert sum("Saturated" in warning for warning in warnings([full] * 3)) == 1


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.5, "50.0%"), (1.0, "100.0%"), (0.9996, "99.96%"), (0.0, "0.0%"), (0.0001, "0.01%"), (None, "–")],
)
def test_nearly_all_is_not_called_all(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 ms"),
        (0.00769, "7.69 ms"),
        (0.0854, "85.4 ms"),
        (1.239, "1.24 s"),
        (42.0, "42.0 s"),
        (750.0, "12.5 min"),
        (11160.0, "3.10 h"),
    ],
)
def test_durations_have_units(value, text):
    assert seconds(value) == text
