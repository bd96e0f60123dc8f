"""The command `report`: logs in; pictures, a page and a summary out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining import config
from bert_pretraining.errors import UserError
from bert_pretraining.logs.reading.loading import load_runs
from bert_pretraining.report import compare, figures, summary
from bert_pretraining.report.document import DrawnPicture
from bert_pretraining.report.page import page
from bert_pretraining.report.style import DARK, LIGHT
from bert_pretraining.report.view import View
from bert_pretraining.runtime.files import write_whole
from bert_pretraining.submission.rulesets import DEFAULT_RULESET, RULESETS

PAGE_NAME = "report.html"


def main(arguments: list[str]) -> None:
    """`report LOG... --output_dir DIR`."""
    parser = config.FlagParser(
        prog="python -m bert_pretraining report",
        allow_abbrev=False,
        description="Learning curves, throughput and a page of runs, beside MLPerf's reference "
        "convergence points. A LOG is an MLPerf log or a DeepSparkHub PerfLog from any program, "
        "a run's folder, or a folder of runs or of result_*.txt.",
    )
    add = parser.add_argument
    add("logs", nargs="+", metavar="LOG", help="a log file, or a folder that holds logs")
    add(
        "--output_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="where report.html and the PNG files are written (required)",
    )
    add(
        "--ruleset",
        default=DEFAULT_RULESET,
        metavar="VERSION",
        help=f"MLPerf Training ruleset: {', '.join(RULESETS)} (default: {DEFAULT_RULESET})",
    )
    add(
        "--title",
        metavar="TEXT",
        help="title of the page (default: the run's name or the number of runs)",
    )
    values = parser.parse(arguments)

    made = make_report(values.logs, values.output_dir, values.ruleset, values.title)
    print(made.summary, end="\n\n")
    for path in made.files:
        print(f"Wrote {path}")


@dataclass(frozen=True)
class Report:
    """A report's summary, and its files, the page first."""

    summary: str
    files: tuple[Path, ...]


def make_report(
    logs: Sequence[str | Path],
    output_dir: Path,
    ruleset: str = DEFAULT_RULESET,
    title: str | None = None,
) -> Report:
    """Read logs, draw them, write the page and its pictures into `output_dir`.

    Raises:
        UserError: no matplotlib, no such ruleset, a file that is no log, or an `output_dir` that
            cannot be written. Except in the last case nothing has been written.
    """
    figures.require_matplotlib()
    runs = load_runs(logs)
    compare.require_points(runs)
    view = View(tuple(compare.series_of(runs)), tuple(compare.references(runs, ruleset)))
    drawn = [
        DrawnPicture(each, figures.png(each, view, LIGHT), figures.png(each, view, DARK))
        for each in figures.pictures(view)
    ]
    what = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    contents = {PAGE_NAME: page(title or f"BERT pretraining: {what}", view, drawn).encode("utf-8")}
    contents.update((f"{each.picture.name}.png", each.light) for each in drawn)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_whole(output_dir / name, content)
    except OSError as error:
        raise UserError(
            f"cannot write to {output_dir} ({error.strerror})", "pass another --output_dir"
        ) from error
    return Report(summary.text(view), tuple(output_dir / name for name in contents))
