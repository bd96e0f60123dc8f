"""The terminal: whole lines on stdout, with a progress bar below them on a TTY."""

from __future__ import annotations

import os
import sys

from tqdm import tqdm

BOLD, NORMAL = "\033[1m", "\033[0m"
BAR = "{n_fmt}/{total_fmt} {bar} {desc}"


class Terminal:
    """Lines and, on a terminal, a bar below them.

    Args:
        total_steps: the bar's length.

    Attributes:
        has_bar_alone: whether the bar shows the figures, so that step lines are not printed.
    """

    def __init__(self, total_steps: int) -> None:
        self._bar = None
        self._bold = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, bar_format=BAR, dynamic_ncols=True, leave=False)
        self.has_bar_alone = self._bar is not None and sys.stdout.isatty()

    def line(self, text: str) -> None:
        """One line, above the bar."""
        if self._bar is not None:
            self._bar.clear()
        # One write: what an interruption leaves is a whole line or none.
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        if self._bar is not None:
            self._bar.refresh()

    def highlight(self, text: str) -> None:
        """One or more lines that stand out: bold on a terminal."""
        self.line(f"{BOLD}{text}{NORMAL}" if self._bold else text)

    def begin_at(self, step: int) -> None:
        """Start the bar at `step`: the number of steps already done."""
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()

    def advance(self, steps: int, figures: str) -> None:
        """Advance the bar, with `figures` beside it."""
        if self._bar is not None:
            self._bar.set_description_str(figures, refresh=False)
            self._bar.update(steps)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


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


def results_table(rows: dict[str, str]) -> str:
    """One row of figures under their names, as a Markdown table."""
    widths = [max(len(name), len(value)) for name, value in rows.items()]

    def line(cells: list[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(list(rows)), rule, line(list(rows.values()))])
