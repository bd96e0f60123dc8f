"""The report of runs as one HTML file."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence

from bert_pretraining import __version__
from bert_pretraining.logs.reading.runs import Run
from bert_pretraining.report import speeds, summary
from bert_pretraining.report.document import DrawnPicture, document, picture, table
from bert_pretraining.report.view import View


def page(title: str, view: View, drawn: Sequence[DrawnPicture]) -> str:
    """The page as HTML text."""
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="muted">Made {made} by bert_pretraining {__version__}</p>',
        *(f"<p>{html.escape(line)}</p>" for line in summary.conclusions(view)),
        "<h2>Runs</h2>",
        _runs(view.runs),
        '<p class="muted">Sequences and time to the target where it was reached, else of the '
        "whole run. Sequences/s of the whole run, evaluations included. Init: before the clock "
        "starts.</p>",
        _speed(view.runs),
        *(picture(each) for each in drawn),
        _settings(view.runs),
        _sources(view.runs),
    ]
    return document(title, parts)


def _runs(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        kinds = ["number" if name in summary.RIGHT_ALIGNED else "" for name in summary.COLUMNS]
        kinds[1] = "good" if run.target_point else "bad"
        rows.append(list(zip(kinds, summary.cells(run), strict=True)))
    return table(summary.COLUMNS, rows)


def _speed(runs: Sequence[Run]) -> str:
    rows = [
        [("number" if name in speeds.RIGHT_ALIGNED else "", cell)
         for name, cell in zip(speeds.COLUMNS, row, strict=True)]
        for row in speeds.table(runs)
    ]  # fmt: skip
    if not rows:
        return ""
    caption = f'<p class="muted">{html.escape(speeds.CAPTION)}</p>'
    return "<h2>Speed</h2>" + table(speeds.COLUMNS, rows) + caption


def _settings(runs: Sequence[Run]) -> str:
    """The hyperparameters of the logs: one value if all runs agree, else all values."""
    keys = list(dict.fromkeys(key for run in runs for key in run.hyperparameters))
    rows = []
    for key in keys:
        values: dict[str, list[str]] = {}
        for run in runs:
            values.setdefault(str(run.hyperparameters.get(key, "-")), []).append(run.name)
        shown = next(iter(values))
        if len(values) > 1:
            shown = "; ".join(f"{value} ({_few(names)})" for value, names in values.items())
        rows.append([("", key), ("long", shown)])
    if not rows:
        return ""
    return "<h2>Hyperparameters</h2>" + table(("Name", "Value"), rows)


def _sources(runs: Sequence[Run]) -> str:
    """The log files of each run, and the errors in them."""
    rows = [
        [
            ("", run.name),
            ("", run.source),
            ("", " / ".join(filter(None, (run.organization, run.platform))) or "-"),
            ("", run.division or "-"),
            ("long", ", ".join(str(path) for path in run.files)),
        ]
        for run in runs
    ]
    found = "<h2>Logs</h2>" + table(("Run", "Kind", "Platform", "Division", "Files"), rows)
    for title, notes in (
        ("Notices of the runs", summary.notices(runs)),
        ("Faults in the logs", summary.faults(runs)),
    ):
        if notes:
            items = "".join(f"<li><code>{html.escape(note)}</code></li>" for note in notes)
            found += f"<h2>{title}</h2><ul>{items}</ul>"
    return found


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} runs"
