"""An HTML file that loads nothing: pictures are embedded, and it has no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bert_pretraining.report.picture import Picture
from bert_pretraining.report.style import DARK, LIGHT

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


def document(title: str, parts: Iterable[str], style: str = "", head: str = "") -> str:
    """The whole file. parts: HTML; empty ones are left out. style: further CSS; head: elements."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{head}<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        "<body>\n" + "\n".join(part for part in parts if part) + "\n</body>\n</html>\n"
    )


def picture(drawn: DrawnPicture) -> str:
    """A picture under its heading, with its caption; it follows the reader's light or dark mode."""
    light, dark = (
        "data:image/png;base64," + base64.b64encode(image).decode("ascii")
        for image in (drawn.light, drawn.dark)
    )
    shown = drawn.picture
    return (
        f"<h2>{html.escape(shown.title)}</h2>\n<figure><div class=wide><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(shown.caption)}"></picture>'
        f"<figcaption>{html.escape(shown.caption)}</figcaption></figure>"
    )


def table(names: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]]) -> str:
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
