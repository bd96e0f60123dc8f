"""The picture of `data verify --plot`: how long the sequences of a data set are."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from bert_pretraining.errors import UserError
from bert_pretraining.preparation.verify_report import VerifyReport
from bert_pretraining.runtime import packages
from bert_pretraining.runtime.file_kind import cannot_write
from bert_pretraining.runtime.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_plot(path: Path) -> None:
    """Raise UserError where `plot_lengths` would fail, before the files are read for hours."""
    formats = _figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UserError(
            f"--plot {path}: no picture's ending", f"end the name in one of .{', .'.join(formats)}"
        )
    folder = path.absolute().parent
    number = 0
    if not os.path.exists(folder):
        number = errno.ENOENT
    elif not os.path.isdir(folder):
        number = errno.ENOTDIR
    elif os.path.isdir(path):
        number = errno.EISDIR
    elif not os.access(folder, os.W_OK | os.X_OK):
        number = errno.EACCES
    if number:
        raise cannot_write(path, OSError(number, os.strerror(number)), "pass another --plot FILE")


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "the plot needs matplotlib",
            f"install it: {packages.how_to_install(['matplotlib'])}",
        ) from error
    return Figure(figsize=(8, 4.5), layout="constrained")


def plot_lengths(report: VerifyReport, path: Path) -> None:
    """Draw the histogram of sequence lengths of each set into an image file.

    Raises UserError if matplotlib is missing, or if `path` cannot be written.
    """
    figure = _figure()
    axes = figure.add_subplot(xlabel="tokens in a sequence", ylabel="share of the set's sequences")
    for part in report.sets:
        edges = [low for low, _, _ in part.histogram] + [part.histogram[-1][1] + 1]
        shares = [count / max(1, part.sequences) for _, _, count in part.histogram]
        axes.stairs(shares, edges, label=f"{part.name}, mean {part.mean_length:.1f}")
    axes.legend()
    try:
        write_whole(path, lambda place: figure.savefig(place, format=path.suffix[1:].lower()))
    except (OSError, ValueError) as error:
        raise cannot_write(path, error, "pass another --plot FILE") from error
