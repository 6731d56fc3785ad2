"""One self-contained HTML page of a comparison: nothing is fetched, no script runs."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape

from qlm_sim.metrics.run import PolicyRun
from qlm_sim.report.comparison import (
    Column,
    attainment_columns,
    footnotes,
    headline,
    percent,
    seconds,
    service_columns,
    targets,
    warnings,
)
from qlm_sim.report.figures import Picture
from qlm_sim.report.style import DARK, line_styles
from qlm_sim.report.why import plan_lines

MOST_PLANS = 40
"""Plans of one run that the page shows."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --faint: #5b6472; --line: #d9dde4; --paper: #fff;
  --back: #f5f6f8; --accent: #0b62a8; --warn: #fff4dc; --warn-line: #e69f00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --faint: #9aa4b2; --line: #363c47;
  --paper: #171a20; --back: #0f1115; --accent: #4aa3ea; --warn: #33290f; --warn-line: #b98300; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1rem; font-weight: 600; color: var(--faint); margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
.headline { font-size: clamp(1.3rem, 1rem + 1.6vw, 1.9rem); line-height: 1.3; font-weight: 650;
  margin: 0 0 .75rem; text-wrap: balance; }
.faint, figcaption { color: var(--faint); font-size: .9rem; }
.scroll { overflow-x: auto; background: var(--paper); border: 1px solid var(--line); border-radius: .5rem; }
.scroll + .scroll { margin-top: .75rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: right; white-space: nowrap; }
th { font-weight: 500; color: var(--faint); }
thead th { border-bottom: 1px solid var(--line); vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody + tbody tr:first-child > * { border-top: 2px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tbody th { color: var(--ink); }
td.best { font-weight: 700; color: var(--accent); }
tr.own th { font-weight: 700; }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
.warn { background: var(--warn); border-left: 4px solid var(--warn-line); border-radius: .25rem;
  padding: .6rem 1rem; margin: 1rem 0; }
.warn ul { margin: .25rem 0; padding-left: 1.1rem; }
figure { margin: 1rem 0 0; background: var(--paper); border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem; }
figure div { overflow-x: auto; }
img { display: block; width: 100%; min-width: 36rem; height: auto; }
figcaption { margin-top: .5rem; }
pre { margin: .5rem 0; padding: .9rem 1rem; overflow-x: auto; background: var(--paper);
  border: 1px solid var(--line); border-radius: .5rem; font-size: .85rem; }
details { font-size: .9rem; margin: .3rem 0; } details ul { margin: .25rem 0 .75rem; }
@media print { body { background: none; } figure, .scroll { break-inside: avoid; } }
"""


def report_html(
    runs: Sequence[PolicyRun],
    pictures: Sequence[Picture],
    title: str,
    command: str,
    scenario_toml: str,
    notes: Sequence[str] = (),
) -> str:
    """The page. ``command`` and ``scenario_toml`` are shown for repeating the run."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="headline">{escape(headline(runs))}</p>
<p class="faint">{_basis(runs)} Requests that were unfinished or rejected count as missed.</p>
{_warnings([*warnings(runs), *notes])}
<h2>The policies compared</h2>
{_comparison(runs, attainment_columns(runs))}
{_comparison(runs, service_columns(runs))}
{"".join(f'<p class="faint">{escape(note)}</p>' for note in footnotes(runs))}
<p class="faint">Best figures in blue. Goodput counts requests that met their SLO. TTFT: time from arrival to
the first token. GPU: share of time in which the engines executed.</p>
<h2>Figures</h2>
{"".join(_figure(picture) for picture in pictures)}
<h2>Latency of each class</h2>
{_by_class(runs)}
<p class="faint">TPOT: seconds per output token after the first. E2E: arrival to last token, of finished
requests.</p>
<h2>Was the cluster saturated?</h2>
<ul>{"".join(f"<li>{_name(run, runs)}: {escape(run.summary['saturation'])}</li>" for run in runs)}</ul>
{"".join(_plans(run) for run in runs if run.plans)}
<h2>Repeat this run</h2>
<pre><code>{escape(command)}</code></pre>
<p class="faint">The scenario, with everything that it left to defaults:</p>
<pre><code>{escape(scenario_toml)}</code></pre>
</main>
</body>
</html>
"""


def _basis(runs: Sequence[PolicyRun]) -> str:
    repeats = runs[0].summary.get("repeats")
    if repeats is None:
        return "One run of each policy on the same requests, from one seed: small differences may be chance."
    return (
        f"Means over {repeats} runs of each policy, each from a seed whose requests all policies get, with "
        "half-widths of 95 % confidence. The pictures are of the first seed."
    )


def _warnings(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return (
        f'<div class="warn" role="note"><strong>Before you trust these figures</strong><ul>{items}</ul></div>'
    )


def _name(run: PolicyRun, runs: Sequence[PolicyRun]) -> str:
    colour = "var(--accent)" if run.name == "qlm" else line_styles([r.name for r in runs])[run.name].colour
    return f'<span class="key" style="background:{colour}"></span>{escape(run.label)}'


def _comparison(runs: Sequence[PolicyRun], columns: Sequence[Column]) -> str:
    cells = [column.rows(runs) for column in columns]
    head = "".join(f'<th scope="col">{escape(column.title)}</th>' for column in columns)
    body = ""
    for row, run in enumerate(runs):
        figures = "".join(
            f'<td class="best">{escape(text)}</td>' if best else f"<td>{escape(text)}</td>"
            for text, best in (cell[row] for cell in cells)
        )
        own = ' class="own"' if run.name == "qlm" else ""
        body += f'<tr{own}><th scope="row">{_name(run, runs)}</th>{figures}</tr>'
    return _table(f'<th scope="col">policy</th>{head}', f"<tbody>{body}</tbody>")


def _by_class(runs: Sequence[PolicyRun]) -> str:
    shown = [
        (title, key, quantile)
        for title, key, quantiles in (
            ("TTFT", "ttft_s", ("p50", "p90", "p99")),
            ("TPOT", "tpot_s", ("p50", "p99")),
            ("E2E", "e2e_s", ("p50", "p99")),
        )
        for quantile in quantiles
    ]
    titles = ["policy", "SLO met", "unfinished", *(f"{title} {quantile}" for title, _, quantile in shown)]
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    bodies = ""
    for slo in runs[0].slo_classes:
        count = max(run.summary["by_class"][slo.name]["requests"] for run in runs)
        label = f"<strong>{escape(slo.name)}</strong>, {escape(targets(slo))}: {count:,} requests"
        body = f'<tr><th scope="rowgroup" colspan="{len(titles)}">{label}</th></tr>'
        for run in runs:
            figures = run.summary["by_class"][slo.name]
            texts = [
                percent(figures["slo_attainment"]),
                f"{figures['unfinished']:,}",
                *(seconds(figures[key][quantile]) for _, key, quantile in shown),
            ]
            cells = "".join(f"<td>{text}</td>" for text in texts)
            body += f'<tr><th scope="row">{_name(run, runs)}</th>{cells}</tr>'
        bodies += f"<tbody>{body}</tbody>"
    return _table(head, bodies)


def _plans(run: PolicyRun) -> str:
    """The plans that saved most, in order of time, each with what it moved."""
    shown = sorted(run.plans, key=lambda plan: (-plan.saved, plan.number))[:MOST_PLANS]
    items = ""
    for plan in sorted(shown, key=lambda plan: plan.number):
        title, *moves = plan_lines(plan)
        lines = "".join(f"<li>{escape(move.strip())}</li>" for move in moves)
        items += f"<details><summary>{escape(title)}</summary><ul>{lines}</ul></details>"
    return (
        f'<h2>Why {escape(run.name)} served whom when</h2><p class="faint">{len(run.plans):,} plans moved '
        f"waiting groups; here are the {len(shown)} whose moves were worth most. Costs are about requests "
        f"expected to miss their SLO. plans.jsonl holds every plan.</p>{items}"
    )


def _table(head: str, bodies: str) -> str:
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>{bodies}</table></div>'


def _figure(picture: Picture) -> str:
    data = b64encode(_for_both_schemes(picture.svg).encode()).decode()
    return (
        f'<figure id="{picture.name}"><div><img alt="{escape(picture.caption)}" '
        f'src="data:image/svg+xml;base64,{data}"></div><figcaption>{escape(picture.caption)}</figcaption></figure>\n'
    )


def _for_both_schemes(svg: str) -> str:
    """The drawing with its inks as variables that follow the page's colour scheme."""
    light = dark = ""
    for nth, (ink, ink_on_dark) in enumerate(DARK.items()):
        svg = svg.replace(ink, f"var(--c{nth})")
        light += f"--c{nth}: {ink}; "
        dark += f"--c{nth}: {ink_on_dark}; "
    style = f"<style>:root {{ {light}}} @media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}</style>"
    svg = svg.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    return svg.replace("<defs>", f"{style}<defs>", 1)
