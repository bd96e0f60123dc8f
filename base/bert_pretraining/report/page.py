"""The report as one HTML file: the pictures are embedded, it has no script and loads nothing."""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bert_pretraining import __version__
from bert_pretraining.logs.reading.runs import Run
from bert_pretraining.report import summary
from bert_pretraining.report.figures import Picture
from bert_pretraining.report.style import DARK, LIGHT
from bert_pretraining.report.view import View

# The page may load nothing, so that it is safe to open a page that came by mail.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = f"""
:root {{ color-scheme: light dark; --text: {LIGHT.text}; --muted: {LIGHT.muted};
  --line: {LIGHT.grid}; --back: {LIGHT.background}; --good: #0a6b4d; --bad: #a33d00; }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: {DARK.text}; --muted: {DARK.muted};
  --line: {DARK.grid}; --back: {DARK.background}; --good: #2fc79b; --bad: #ff8c4d; }} }}
body {{ margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--back);
  color: var(--text); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }}
h1 {{ font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; }}
h2 {{ font-size: 1.2rem; margin: 2.75rem 0 .5rem; }}
p {{ margin: .4rem 0; max-width: 60rem; }}
.muted, figcaption {{ color: var(--muted); font-size: .92rem; }}
figure {{ margin: .5rem 0 0; }}
img {{ width: 100%; min-width: 44rem; height: auto; display: block; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line);
  text-align: left; white-space: nowrap; vertical-align: top; }}
th {{ color: var(--muted); font-weight: 600; }}
.number {{ text-align: right; }}
.long {{ white-space: normal; overflow-wrap: anywhere; min-width: 18rem; }}
.good {{ color: var(--good); }} .bad {{ color: var(--bad); }}
code {{ font-size: .9em; overflow-wrap: anywhere; }}
@media print {{ figure {{ break-inside: avoid; }} }}
"""


@dataclass(frozen=True)
class DrawnPicture:
    """A picture and its PNG bytes, for light pages and for dark ones."""

    picture: Picture
    light: bytes
    dark: bytes


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
        *(_picture(each) for each in drawn),
        _settings(view.runs),
        _sources(view.runs),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _picture(drawn: DrawnPicture) -> str:
    light, dark = (
        "data:image/png;base64," + base64.b64encode(image).decode("ascii")
        for image in (drawn.light, drawn.dark)
    )
    picture = drawn.picture
    return (
        f"<h2>{html.escape(picture.title)}</h2>\n<figure><div class=wide><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(picture.caption)}"></picture>'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def _runs(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        kinds = ["number" if name in summary.RIGHT_ALIGNED else "" for name in summary.COLUMNS]
        kinds[1] = "good" if run.target_point else "bad"
        rows.append(list(zip(kinds, summary.cells(run), strict=True)))
    return _table(summary.COLUMNS, rows)


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
    return "<h2>Hyperparameters</h2>" + _table(("Name", "Value"), rows)


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
    found = "<h2>Logs</h2>" + _table(("Run", "Kind", "Platform", "Division", "Files"), rows)
    for title, notes in (
        ("Notices of the runs", summary.notices(runs)),
        ("Faults in the logs", summary.faults(runs)),
    ):
        if notes:
            items = "".join(f"<li><code>{html.escape(note)}</code></li>" for note in notes)
            found += f"<h2>{title}</h2><ul>{items}</ul>"
    return found


def _table(names: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]]) -> str:
    """A table from rows of (CSS class, text). A head cell has the class of its first row's cell."""
    kinds = [kind if kind == "number" else "" for kind, _ in rows[0]]
    head = "".join(_cell("th", kind, name) for kind, name in zip(kinds, names, strict=True))
    body = "".join(
        "<tr>" + "".join(_cell("td", kind, text) for kind, text in row) + "</tr>\n" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _cell(tag: str, kind: str, text: str) -> str:
    return f"<{tag}{f' class={kind}' if kind else ''}>{html.escape(text)}</{tag}>"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} runs"
