"""The runs as text: a table and conclusions, the same for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence

from bert_pretraining.logs.reading.runs import Run
from bert_pretraining.report import speeds
from bert_pretraining.report.compare import Reference, Series, outcome
from bert_pretraining.report.view import View, duration

COLUMNS = (
    "Run", "Outcome", "Batch", "Seed", "Sequences", "Time", "MLM accuracy", "Loss", "Sequences/s",
    "Init",
)  # fmt: skip
RIGHT_ALIGNED = frozenset(COLUMNS[2:])
SHOWN_FAULTS = 10


def cells(run: Run) -> tuple[str, ...]:
    """One run's row, a cell for each of COLUMNS; "-" for what its logs do not say.

    Sequences and time are those to the target where it was reached, accuracy and loss the
    evaluation's there; else those of the whole run and of its last evaluation.
    """
    last = run.evaluations[-1] if run.evaluations else None
    point = run.target_point or last
    samples = run.target_point.samples if run.target_point else run.train_samples
    seconds = run.target_point.seconds if run.target_point else run.run_seconds
    return (
        run.name,
        outcome(run),
        _number(run.global_batch_size),
        "-" if run.seed is None else str(run.seed),
        _number(samples),
        "-" if seconds is None else duration(seconds),
        _number(point and point.accuracy, ".4f"),
        _number(point and point.loss, ".3f"),
        _number(run.sequences_per_second, ",.0f"),
        "-" if run.init_seconds is None else duration(run.init_seconds),
    )


def text(view: View) -> str:
    """The whole summary for a terminal."""
    lines = [_table([COLUMNS, *map(cells, view.runs)], RIGHT_ALIGNED), ""]
    fast = speeds.table(view.runs)
    if fast:
        lines += [_table([speeds.COLUMNS, *fast], speeds.RIGHT_ALIGNED), ""]
    lines += conclusions(view)
    told = notices(view.runs)
    if told:
        lines += ["", "Notices of the runs:", *(f"  {note}" for note in told)]
    notes = faults(view.runs)
    if notes:
        lines += ["", "Faults in the logs:", *(f"  {note}" for note in notes)]
    return "\n".join(lines)


def conclusions(view: View) -> list[str]:
    """The results of the series, and the comparison with the reference, one sentence each."""
    series = [_of_series(each, view) for each in view.series]
    return [line for line in series if line] + [
        _of_reference(reference, view) for reference in view.references
    ]


def notices(runs: Sequence[Run]) -> list[str]:
    """What the runs themselves said was going wrong."""
    return [f"{run.name}: {text}" for run in runs for text in run.notices]


def faults(runs: Sequence[Run]) -> list[str]:
    """The first ten malformed lines."""
    found = [fault for run in runs for fault in run.faults]
    more = [f"and {len(found) - SHOWN_FAULTS} more"] if len(found) > SHOWN_FAULTS else []
    return found[:SHOWN_FAULTS] + more


def _of_series(series: Series, view: View) -> str:
    """How many runs reached the target, and how their mean compares; "" for nothing to say."""
    points = [run.target_point for run in series.reached]
    parts = []
    if len(series.runs) > 1:
        part = f"{len(points)} of {len(series.runs)} runs reached the target"
        samples = [point.samples for point in points if point.samples is not None]
        if samples:
            low, high = min(samples), max(samples)
            part += f", after {low:,} " + (f"to {high:,} " if high > low else "") + "sequences"
        parts.append(part)
    mean = series.mean_samples
    if mean is not None and len(series.runs) > 1:
        parts.append(f"mean of {series.mean_of}: {mean:,.0f}")
    reference = next((each for each in view.references if series.runs[0] in each.runs), None)
    if mean is not None and reference is not None and reference.point is not None:
        ratio = mean / reference.point.mean_samples
        more = "more" if ratio >= 1 else "fewer"
        parts.append(f"{abs(ratio - 1):.1%} {more} sequences than the reference's mean")
    return f"{series.label}: {'; '.join(parts)}." if parts else ""


def _of_reference(reference: Reference, view: View) -> str:
    whose = "" if len(view.references) == 1 else f" for {_names(reference.runs)}"
    if reference.point is None:
        return f"No reference convergence point{whose}: {reference.reason}."
    point = reference.point
    line = (
        f"Reference convergence point{whose} (ruleset {point.ruleset}, batch "
        f"{point.global_batch_size:,}, {point.describe()}): mean {point.mean_samples:,.0f} "
        f"sequences, standard deviation {point.standard_deviation:,.0f}."
    )
    if any(run.eval_samples is None for run in reference.runs):
        line += " It holds for MLPerf's data set; these logs do not say what they evaluated on."
    return line


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(run.name for run in runs) if len(runs) <= 3 else f"{len(runs)} runs"


def _number(value: float | None, style: str = ",") -> str:
    return "-" if value is None else format(value, style)


def _table(rows: Sequence[Sequence[str]], right_aligned: frozenset[str]) -> str:
    """Aligned columns; the first row has their names."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = [
            cell.rjust(width) if name in right_aligned else cell.ljust(width)
            for name, cell, width in zip(rows[0], row, widths, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
