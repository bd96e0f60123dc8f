"""The terminal: whole lines on stdout, with a progress bar below them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

from tqdm import tqdm

from bert_pretraining.logs.bar import Bar, LinesAbove
from bert_pretraining.runtime import screen


class Terminal:
    """Lines on stdout and, where a terminal can show one, a bar below them.

    Args:
        total_steps: the bar's length.

    Attributes:
        name: for people.
        is_watched: whether people look at stdout; else programs read it, or it is kept in a file.
        seconds: that writing has taken so far, of the bar too.
        has_bar_alone: whether the bar shows the figures, so that step lines are not printed.
    """

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self.name, self.seconds = "stdout", 0.0
        self._bar: Bar | None = None
        self._lines_of_others: LinesAbove | None = None  # in the place of stderr, beside a bar
        self._bar_stream = screen.stream_of_the_bar()
        self._bold = screen.takes_bold(sys.stdout)
        self.is_watched = screen.is_watched(sys.stdout)
        self.has_bar_alone = self._bar_stream is not None and self.is_watched

    @property
    def columns(self) -> int:
        """Of stdout, at this moment."""
        return screen.columns(sys.stdout)

    def line(self, text: str) -> None:
        """One or more lines, above the bar."""
        with self._timed():
            if self._bar is not None:
                self._bar.write_above(sys.stdout, text + "\n")
            else:
                # One write: what an interruption leaves is a whole line or none.
                sys.stdout.write(text + "\n")
                sys.stdout.flush()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - began

    def highlight(self, text: str) -> None:
        """Lines that stand out: bold on a terminal, each on its own."""
        if self._bold:
            lines = text.split("\n")
            text = "\n".join(f"{screen.BOLD}{line}{screen.NORMAL}" for line in lines)
        self.line(text)

    def begin_at(self, step: int) -> None:
        """Draw the bar from now on; `step`: the number of steps already done."""
        if self._bar_stream is not None and self._bar is None:
            self._bar = Bar(self._total_steps, step, self._bar_stream)
            if screen.is_watched(sys.stderr):
                sys.stderr = self._lines_of_others = LinesAbove(self._bar, sys.stderr)

    def advance(self, steps: int, figures: Mapping[str, str]) -> None:
        """Advance the bar, with `figures` beside it: see `Bar`."""
        if self._bar is not None:
            with self._timed():
                self._bar.advance(steps, figures)

    def show(self, figures: Mapping[str, str]) -> None:
        """Draw the bar now, with `figures` beside it."""
        if self._bar is not None:
            with self._timed():
                self._bar.show(figures)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._lines_of_others is not None:
            sys.stderr = self._lines_of_others.end()
            self._lines_of_others = None


def duration(seconds: float) -> str:
    """ "8 s", "3 min 20 s" or "2 h 5 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def clock(seconds: float) -> str:
    """ "00:08", "03:20" or "2:05:00"."""
    return tqdm.format_interval(max(0, round(seconds)))
