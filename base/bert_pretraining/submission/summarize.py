"""`submission summarize`: the figures of each system's runs, and the scored time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.errors import UserError
from bert_pretraining.submission.rcp import MISSING
from bert_pretraining.submission.rulesets import require_ruleset
from bert_pretraining.submission.score import RunFigures, Score, run_figures, score
from bert_pretraining.submission.series import STATE_FILE, series_logs
from bert_pretraining.submission.tree import RESULT_NAME, ResultLog, System, read_result, systems


@dataclass(frozen=True)
class Summary:
    """The runs of one system and their score."""

    name: str
    ruleset: str
    division: str | None
    global_batch_size: int | None
    runs: list[RunFigures]
    score: Score

    def to_json(self) -> dict:
        point = self.score.point
        return {
            "name": self.name,
            "ruleset": self.ruleset,
            "division": self.division,
            "global_batch_size": self.global_batch_size,
            "score_minutes": self.score.minutes,
            "mean_minutes": self.score.mean_minutes,
            "scale_factor": self.score.scale_factor,
            "mean_samples": self.score.mean_samples,
            "fault": self.score.fault,
            "rcp": None
            if point is None
            else {**dataclasses.asdict(point), "least_passing_mean": point.least_mean()},
            "runs": [
                {**dataclasses.asdict(run), "counts": run.log in self.score.counted}
                for run in self.runs
            ],
        }

    def to_markdown(self) -> str:
        """A heading, the score in words, and a table of the runs."""
        size = self.global_batch_size
        about = [f"ruleset {self.ruleset}", f"{self.division or 'no'} division"]
        if size is not None:
            about.append(f"global batch size {size:,}")
        lines = [f"## {self.name}", "", f"{', '.join(about)}.", "", *self._score_lines(), ""]
        head = ["Run", "Log", "Seed", "Status", "Minutes", "Counts", "Samples", "MLM accuracy",
                "Evaluations", "Init minutes"]  # fmt: skip
        rows = [
            [
                str(index), run.log, _shown(run.seed, "d"), run.status, _shown(run.minutes, ".3f"),
                self._counts(run),
                _shown(run.samples, ",d"), _shown(run.accuracy, ".5f"), str(run.evaluations),
                _shown(run.init_minutes, ".2f"),
            ]
            for index, run in enumerate(self.runs)
        ]  # fmt: skip
        return "\n".join([*lines, *_table(head, rows)])

    def _counts(self, run: RunFigures) -> str:
        if not self.score.counted:
            return ""
        return "yes" if run.log in self.score.counted else "dropped"

    def _score_lines(self) -> list[str]:
        score = self.score
        lines = [f"**No score:** {score.fault}."]
        if score.minutes is not None:
            lines = [
                f"**{score.minutes:.3f} minutes**: mean of {len(score.counted)} of "
                f"{len(self.runs)} runs, {score.mean_minutes:.3f} minutes, times scale factor "
                f"{score.scale_factor:.4f}."
            ]
        point, samples = score.point, score.mean_samples
        if point is None or samples is None:
            return lines
        if point.basis == MISSING:
            return [*lines, f"RCP: {point.describe()}."]
        least = point.least_mean(len(self.runs))
        verdict = "passes" if point.passes(samples, len(self.runs)) else "**fails**"
        return [
            *lines,
            f"RCP: {samples:,.0f} samples in the mean, RCP mean {point.mean_samples:,.0f}, at "
            f"least {least:,.0f}: {verdict} ({point.describe()}).",
        ]


def summarize(paths: Sequence[Path], ruleset: str) -> list[Summary]:
    """One summary for each system.

    Args:
        paths: one submission's directory, one series', one of result_*.txt, or the logs of
            one system.

    Raises UserError if there are no logs, or one cannot be read.
    """
    require_ruleset(ruleset)
    return [_summary(name, logs, ruleset) for name, logs in _groups(paths)]


def _groups(paths: Sequence[Path]) -> list[tuple[str, list[ResultLog]]]:
    first = paths[0]
    if len(paths) > 1 or first.is_file():
        return [("logs", [read_result(path) for path in paths])]
    if (first / STATE_FILE).is_file():
        groups = [(first.name, series_logs(first))]
    elif (first / "results").is_dir():
        groups = [(each.name, _logs(each)) for each in systems(first)]
    else:
        groups = [(Path(os.path.abspath(first)).name, _logs(System(first.name, first, first)))]
    groups = [(name, logs) for name, logs in groups if logs]
    if not groups:
        raise UserError(
            f"{first} holds no logs",
            f"pass a submission's directory, a series', or logs ({RESULT_NAME.pattern})",
        )
    return groups


def _logs(system: System) -> list[ResultLog]:
    return [read_result(path) for path in system.result_paths]


def _summary(name: str, logs: list[ResultLog], ruleset: str) -> Summary:
    return Summary(
        name=name,
        ruleset=ruleset,
        division=logs[0].division,
        global_batch_size=logs[0].global_batch_size,
        runs=[run_figures(log) for log in logs],
        score=score(logs, ruleset),
    )


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table with aligned columns, for the terminal too."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
