"""The picture of `data verify --plot`: how long the sequences of a data set are."""

from __future__ import annotations

from pathlib import Path

from bert_pretraining.errors import UserError
from bert_pretraining.preparation.verify_report import VerifyReport


def plot_lengths(report: VerifyReport, path: Path) -> None:
    """Draw the histogram of sequence lengths of each set into an image file.

    Raises UserError if matplotlib is missing, or if `path` cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "the plot needs matplotlib", "install it: python -m pip install matplotlib"
        ) from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens in a sequence", ylabel="share of the set's sequences")
    for part in report.sets:
        edges = [low for low, _, _ in part.histogram] + [part.histogram[-1][1] + 1]
        shares = [count / max(1, part.sequences) for _, _, count in part.histogram]
        axes.stairs(shares, edges, label=f"{part.name}, mean {part.mean_length:.1f}")
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path} ({error})", "name another file") from error
