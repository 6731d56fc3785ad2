"""A result directory: summary.json, requests.parquet, figures and report.html, all or nothing."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlm_sim.errors import InputError
from qlm_sim.metrics.parquet import write_requests
from qlm_sim.metrics.run import PolicyRun
from qlm_sim.report.figures import pictures
from qlm_sim.report.html import report_html
from qlm_sim.report.why import plans_jsonl

_DIGITS = 9
_PICTURES = ("attainment", "ttft", "load", "queue_by_class", "timeline", "scatter")
_OURS = ("summary.json", "requests.parquet", "plans.jsonl", "report.html", *map("{}.png".format, _PICTURES))
_KEYS = ({"scenario", "policies"}, {"log", "metrics", "saturation"})
"""What a summary.json of a comparison has, and one of a validation."""


def summary_json(runs: Sequence[PolicyRun], scenario: Mapping[str, Any]) -> str:
    """The text of summary.json: keys sorted, figures of 9 significant digits, null for no value."""
    # The scenario keeps every digit: it must repeat the run.
    document = {"scenario": scenario, "policies": plain({run.name: run.summary for run in runs})}
    return json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n"


def check_output(out_dir: Path) -> None:
    """Refuse, before hours of work, a directory that results cannot be written to.

    A directory is written to if it is not there yet, is empty, or holds an earlier result and nothing
    else (that is replaced).
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"{out_dir}: is a file; results need a directory")
    if out_dir.is_dir():
        names = sorted(entry.name for entry in out_dir.iterdir())
        foreign = [name for name in names if name not in _OURS]
        if names and not _is_ours(out_dir / "summary.json"):
            raise InputError(
                f"{out_dir}: holds {(foreign or names)[0]} and no summary.json of a run, so it is no result "
                "of ours and is left alone; name a new or empty directory"
            )
        if foreign:
            raise InputError(
                f"{out_dir}: holds {foreign[0]} beside an earlier result, which would be lost; move it away "
                "or name another directory"
            )
    nearest = next(folder for folder in out_dir.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{out_dir}: cannot be written, {nearest} is not a directory we may write to")


def _is_ours(summary: Path) -> bool:
    try:
        document = json.loads(summary.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and any(keys <= document.keys() for keys in _KEYS)


def write_results(
    out_dir: Path,
    runs: Sequence[PolicyRun],
    scenario: Mapping[str, Any],
    *,
    title: str,
    command: str,
    scenario_toml: str,
    notes: Sequence[str] = (),
    report: bool = True,
) -> None:
    """Write all files of a comparison; the same runs give the same bytes.

    Without ``report`` there are no figures and no report.html, which take longer than a short run.

    ``scenario`` holds all that is needed to repeat the run, ``command`` and ``scenario_toml`` say the
    same to a reader of the report, ``notes`` are further warnings. An earlier result in ``out_dir`` is
    replaced at the very end; whatever goes wrong before, out_dir stays as it was.
    """
    with all_or_nothing(out_dir) as folder:
        (folder / "summary.json").write_text(summary_json(runs, scenario), encoding="utf-8")
        write_requests(folder / "requests.parquet", runs)
        (folder / "plans.jsonl").write_text(plans_jsonl(runs), encoding="utf-8")
        if not report:
            return
        drawn = pictures(runs)
        for picture in drawn:
            (folder / f"{picture.name}.png").write_bytes(picture.png)
        page = report_html(runs, drawn, title, command, scenario_toml, notes)
        (folder / "report.html").write_text(page, encoding="utf-8")


@contextmanager
def all_or_nothing(out_dir: Path) -> Iterator[Path]:
    """A folder to write to, which becomes ``out_dir`` if all went well and vanishes if not."""
    check_output(out_dir)
    target = out_dir.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InputError(f"{out_dir}: cannot be written: {error.strerror}") from error
    try:
        fresh = workshop / "new"
        fresh.mkdir()
        yield fresh
        _replace(target, fresh, workshop / "old")
    except OSError as error:
        raise InputError(f"{out_dir}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _replace(target: Path, fresh: Path, old: Path) -> None:
    if target.exists():
        target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


def plain(value: Any) -> Any:
    """``value`` as JSON takes it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value
