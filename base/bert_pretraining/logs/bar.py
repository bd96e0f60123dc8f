"""The progress bar below the lines of a run: one line that never wraps."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import BinaryIO, TextIO

from tqdm import tqdm

from bert_pretraining.runtime import screen

# The figures beside the bar, as they stand, and with the most important one first.
SHOWN_ORDER = ("loss", "accuracy", "learning_rate", "speed", "evaluation", "target")
IMPORTANCE = ("target", "loss", "accuracy", "speed", "evaluation", "learning_rate")
MIN_BAR = 5  # columns of the bar itself
BAR_SHARE = 6  # the bar has a sixth of the columns beside its counter, or more:
ALL_FIGURES = 88  # columns that leave none out; the bar has what is left of a wider terminal
MARGIN = 5  # columns that stay free: a terminal writes ^C there, perhaps twice
SEPARATOR = ", "


def fitting(figures: Mapping[str, str], columns: int) -> str:
    """The most important figures that fit into so many columns, in SHOWN_ORDER.

    figures: name in SHOWN_ORDER -> text.
    """
    shown: dict[str, str] = {}
    for name in IMPORTANCE:
        if name not in figures:
            continue
        more = {**shown, name: figures[name]}
        if len(_joined(more)) > columns:
            break
        shown = more
    return _joined(shown)


def _joined(figures: Mapping[str, str]) -> str:
    return SEPARATOR.join(figures[name] for name in SHOWN_ORDER if name in figures)


class Bar(tqdm):
    """tqdm's bar, with as many figures as the terminal is wide at each drawing.

    In a terminal of one width its place and width stay the same, whichever figures there are.

    Args:
        total, done: steps.
        stream: a terminal that takes escape codes.
    """

    def __init__(self, total: int, done: int, stream: TextIO) -> None:
        self._figures: Mapping[str, str] = {}
        super().__init__(
            total=total,
            initial=done,
            file=stream,
            bar_format="{counter} {bar} {desc}",
            # tqdm's own ASCII bar ends in a digit, which reads as a number.
            ascii=False if screen.takes_unicode(stream) else " #",
            leave=False,
        )

    @property
    def format_dict(self) -> dict[str, object]:
        """What tqdm draws; it asks for this each time."""
        width = max(1, screen.columns(self.fp) - MARGIN)
        counter = f"{self.n}/{self.total}".ljust(len(f"{self.total}/{self.total}"))
        beside = width - len(f"{counter}  ")
        bar = max(MIN_BAR, beside // BAR_SHARE, beside - ALL_FIGURES)
        desc = fitting(self._figures, beside - bar)
        # tqdm gives the bar what the texts leave of ncols. Spaces behind them would wrap where the
        # terminal becomes narrower.
        ncols = min(width, len(f"{counter}  {desc}") + bar)
        return {**super().format_dict, "ncols": ncols, "prefix": desc, "counter": counter}

    @staticmethod
    def status_printer(file: TextIO) -> object:
        """What writes the line. tqdm's own fills up with spaces, which wrap after a resize."""

        def write(text: str) -> None:
            file.write(screen.CLEAR_LINE + text)
            file.flush()

        return write

    def advance(self, steps: int, figures: Mapping[str, str]) -> None:
        """Go on by `steps`, with these figures."""
        self._figures = figures
        self.update(steps)

    def show(self, figures: Mapping[str, str]) -> None:
        """Draw these figures now."""
        self._figures = figures
        self.refresh()

    def write_above(self, stream: TextIO, text: str) -> None:
        """Write whole lines to a stream that may show on the bar's terminal."""
        with self.get_lock():
            self.clear(nolock=True)
            # One write: what an interruption leaves is a whole line or none.
            stream.write(text)
            stream.flush()
            self.refresh(nolock=True)


class LinesAbove(io.TextIOBase):
    """Takes the place of stderr: whole lines of warnings and other parts, above the bar.

    Args:
        bar: on the same terminal.
        stream: stderr.
    """

    def __init__(self, bar: Bar, stream: TextIO) -> None:
        self._bar, self._stream = bar, stream
        self._rest = ""  # of a line without its end

    def write(self, text: str) -> int:
        lines, end, rest = (self._rest + text).rpartition("\n")
        self._rest = rest
        if end:
            self._bar.write_above(self._stream, lines + end)
        return len(text)

    def end(self) -> TextIO:
        """Write what is left; returns the stream whose place this one took."""
        self._stream.write(self._rest)
        self._stream.flush()
        return self._stream

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:
        return self._stream.encoding

    @property
    def buffer(self) -> BinaryIO:
        """Of bytes; what is written there is not kept apart from the bar."""
        return self._stream.buffer
