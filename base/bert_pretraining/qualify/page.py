"""The page of a qualification: verdict first, then a row a stage, pictures, tables.

It is one HTML file that loads nothing, see `report/document.py`. While the qualification runs, it
is written anew after each stage, and asks the browser to read it again.
"""

from __future__ import annotations

import html
import shlex
import sys
from pathlib import Path

from bert_pretraining import config as configuration
from bert_pretraining.errors import UserError
from bert_pretraining.qualify import tables
from bert_pretraining.qualify.pictures import Sketch, sketches
from bert_pretraining.qualify.record import (
    DAMAGES,
    FAIL,
    FIX,
    NOTE,
    VERDICTS,
    Qualification,
    StageResult,
    damaged,
    read,
    write_or_tell,
)
from bert_pretraining.qualify.stages import STAGES, Stage
from bert_pretraining.report import figures
from bert_pretraining.report.document import DrawnPicture, document, picture
from bert_pretraining.report.style import DARK, LIGHT
from bert_pretraining.report.view import duration

REFRESH_SECONDS = 15  # while the qualification runs
STYLE = """
:root { --note: #7a5200; } .note { color: var(--note); }
@media (prefers-color-scheme: dark) { :root { --note: #e8b949; } }
.verdict { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem 1.25rem;
  border-left: .5rem solid currentColor; padding-left: 1rem; margin-bottom: 1rem; }
.verdict h1 { font-size: 3.2rem; text-transform: uppercase; letter-spacing: .02em; margin: 0; }
.verdict p { color: var(--text); font-size: 1.1rem; margin: 0; }
.verdict .what { flex-basis: 100%; color: var(--muted); font-size: .95rem; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem; margin: 0; }
.facts dt { color: var(--muted); } .facts dd { margin: 0; overflow-wrap: anywhere; }
th { white-space: normal; vertical-align: bottom; }
.stages { list-style: none; margin: .5rem 0 0; padding: 0; }
.stages > li { display: grid; grid-template-columns: 5.5rem 8.5rem 1fr max-content; gap: 0 1rem;
  padding: .7rem 0; border-top: 1px solid var(--line); }
.stages b { text-transform: uppercase; } .stages p { overflow-wrap: anywhere; }
.stages .seconds { color: var(--muted); font-variant-numeric: tabular-nums; }
.stages .asks { color: var(--muted); margin: 0; } .stages div p { margin: .1rem 0; }
details { margin: .3rem 0; } summary { cursor: pointer; color: var(--muted); }
details ul { margin: .3rem 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
pre { overflow-x: auto; padding: .6rem .8rem; border: 1px solid var(--line); }
@media (max-width: 46rem) { .stages > li { grid-template-columns: max-content 1fr max-content; }
  .stages > li > div { grid-column: 1 / -1; grid-row: 2; } .verdict h1 { font-size: 2.4rem; } }
@media (max-width: 60rem) { th, td { padding-right: .35rem; } table { font-size: .8rem; } }
@media (max-width: 30rem) { .facts { grid-template-columns: 1fr; }
  .facts dd { margin: 0 0 .4rem; } }
"""
COLORS = dict(zip(VERDICTS, ("good", "note", "bad"), strict=True))
MEANS = dict(
    zip(
        VERDICTS,
        (
            "nothing is wrong",
            "it can be used; read the notes first",
            "something is wrong: see the stages that fail",
        ),
        strict=True,
    )
)
INTERRUPTED = "it was interrupted: stages that were asked for did not run"
TEXT = (
    "Draw the page of a qualification again, from its qualification.json. It is the page that "
    "'qualify' wrote, byte for byte where this package and matplotlib are the same."
)


def main(arguments: list[str]) -> int:
    """The command `qualify page`: draw the page of a file."""
    parser = configuration.FlagParser(
        prog="python -m bert_pretraining qualify page", allow_abbrev=False, description=TEXT
    )
    parser.add_argument("file", nargs="*", metavar="FILE", help="a qualification.json")
    parser.add_argument(
        "--output", type=Path, metavar="PAGE",
        help="the page's file (default: beside FILE, with the ending .html)",
    )  # fmt: skip
    values = parser.parse(arguments, intermixed=True)
    if len(values.file) != 1:
        raise UserError(f"page needs one file, but there are {len(values.file)}", FIX)
    file = Path(values.file[0])
    done = read(file)
    output = values.output or file.with_suffix(".html")
    if output.resolve() == file.resolve():
        raise UserError(f"{output}: the page would replace the figures", "pass another --output")
    if output.exists() and not output.is_file():
        raise UserError(f"{output}: no regular file, so the page cannot replace it", "pass a file")
    try:
        Page(output).write(done)
    except DAMAGES as error:
        raise damaged(str(file), error) from error
    print(f"Page: {output}")
    return 0


class Page:
    """The file of a qualification's page."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._drawn: dict[str, tuple[Sketch, DrawnPicture]] = {}

    def write(self, done: Qualification, running: Stage | None = None) -> None:
        """Write it whole. running: the stage that runs now; None where none will follow.

        UserError where the system refuses.
        """
        name = "" if running is None else running.name
        refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">\n' if name else ""
        title = f"{_word(done, name)}: {done.machine.get('device')} on {done.machine.get('host')}"
        parts = [
            _headline(done, name),
            _worst(done),
            tables.facts(done),
            "<h2>Stages</h2>",
            self._stages(done, name),
            *self._pictures(done),
            *tables.of_figures(done),
            tables.how_to_compare(done),
        ]
        write_or_tell(self._path, document(f"Qualification {title}", parts, STYLE, refresh))

    def finish(self, done: Qualification) -> None:
        """Write the last page; where the system refuses, remove the one before, which says "runs".

        UserError where the system refuses.
        """
        try:
            self.write(done)
        except UserError:
            try:
                is_old = self._path.exists()
                self._path.unlink(missing_ok=True)
                told = "was removed" if is_old else ""
            except OSError as error:
                told = f"is old, and cannot be removed ({error.strerror})"
            if told:
                record = self._path.with_suffix(".json")
                word = shlex.quote(str(record))
                again = f"; draw it later: python -m bert_pretraining qualify page {word}"
                print(
                    f"Notice: {self._path} {told}: the last page could not be written"
                    f"{again if record.is_file() else ''}",
                    file=sys.stderr,
                )
            raise

    def _stages(self, done: Qualification, running: str) -> str:
        rows = []
        for stage in STAGES:
            result = done.stage(stage.name)
            if result is not None:
                rows.append(_row(stage, result))
                continue
            state = "not run yet" if running else "did not run"
            if done.asked and stage.name not in done.asked:
                state = "not asked for"
            elif stage.name == running:
                state = "runs now"
            rows.append(
                f"<li class=muted><span>-</span><span>{stage.name}</span>"
                f"<div><p class=asks>{html.escape(stage.asks)}</p><p>{state}</p></div></li>"
            )
        return f"<ol class=stages>{''.join(rows)}</ol>"

    def _pictures(self, done: Qualification) -> list[str]:
        """The pictures as HTML, or the line why there are none."""
        wanted = sketches(done)
        if not wanted:
            return []
        missing = no_pictures()
        if missing:
            told = html.escape(missing)
            return [f"<h2>Pictures</h2><p>Notice: {told}. The tables have all figures.</p>"]
        return [self._picture(sketch) for sketch in wanted]

    def _picture(self, sketch: Sketch) -> str:
        """It is drawn only where its data have changed; a stage's page is read meanwhile."""
        name = sketch.picture.name
        if name not in self._drawn or self._drawn[name][0] != sketch:
            try:
                images = [figures.png(sketch.picture, sketch.data, theme)
                          for theme in (LIGHT, DARK)]  # fmt: skip
            except Exception as error:  # a picture must not cost the qualification
                why = html.escape(f"{type(error).__name__}: {error}")
                title = html.escape(sketch.picture.title)
                return f"<h2>{title}</h2><p>This picture could not be drawn ({why}).</p>"
            self._drawn[name] = (sketch, DrawnPicture(sketch.picture, *images))
        return picture(self._drawn[name][1])


def no_pictures() -> str:
    """Why pages have no pictures, and what to do; empty where they have."""
    try:
        figures.require_matplotlib()
    except UserError as error:
        return f"no pictures, matplotlib is missing; {error.fix}; 'qualify page' draws them later"
    return ""


def _word(done: Qualification, running: str) -> str:
    """The verdict, for people; "runs" as long as there is none."""
    if not done.stages:
        return "runs" if running else "no stage ran"
    return done.verdict


def _headline(done: Qualification, running: str) -> str:
    told = []
    if done.stages:
        counts = [stage.verdict for stage in done.stages]
        told.append(", ".join(f"{counts.count(one)} {one}" for one in VERDICTS))
        if len(done.stages) < len(STAGES):
            told.append(f"{len(done.stages)} of {len(STAGES)} stages ran")
    if running:
        told.append(f"so far: the stage {running} runs now")
    elif done.stages:
        is_cut = done.verdict != FAIL and any(done.stage(name) is None for name in done.asked)
        told.append(INTERRUPTED if is_cut else MEANS[done.verdict])
    color = COLORS[done.verdict] if done.stages else "muted"
    return (
        f'<div class="verdict {color}"><h1>{html.escape(_word(done, running))}</h1>'
        f"<p>{html.escape('; '.join(told))}</p>"
        f"<p class=what>{html.escape(tables.in_one_line(done))}</p></div>"
    )


def _worst(done: Qualification) -> str:
    """The reasons of the fails, or else of the notes."""
    if not done.stages or done.verdict not in (FAIL, NOTE):
        return ""
    lines = "".join(
        f"<li><b>{html.escape(stage.name)}</b>: {html.escape(stage.reason)}</li>"
        for stage in done.stages
        if stage.verdict == done.verdict
    )
    title = "What is wrong" if done.verdict == FAIL else "What to know"
    return f"<h2>{title}</h2><ul>{lines}</ul>"


def _row(stage: Stage, result: StageResult) -> str:
    """One stage; its further lines are folded, unless it failed."""
    notes = ""
    if result.notes:
        items = "".join(f"<li>{html.escape(note)}</li>" for note in result.notes)
        is_open = " open" if result.verdict == FAIL else ""
        many = f"{len(result.notes)} further line{'s' if len(result.notes) > 1 else ''}"
        notes = f"<details{is_open}><summary>{many}</summary><ul>{items}</ul></details>"
    return (
        f"<li><b class={COLORS[result.verdict]}>{result.verdict}</b><span>{stage.name}</span>"
        f"<div><p class=asks>{html.escape(stage.asks)}</p><p>{html.escape(result.reason)}</p>"
        f"{notes}</div><span class=seconds>{duration(result.seconds)}</span></li>"
    )
