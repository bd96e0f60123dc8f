"""The terminal: whole lines on stdout, with a progress bar below them on a TTY."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

from tqdm import tqdm


class Console:
    """Lines and, on a terminal, a bar. Only rank 0 shows anything.

    Args:
        enabled: False makes every method do nothing.
        total_steps: the bar's length.
    """

    def __init__(self, enabled: bool, total_steps: int) -> None:
        self.enabled = enabled
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True, leave=False)

    def line(self, text: str) -> None:
        """One line, above the bar."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def advance(self, steps: int, **figures: str) -> None:
        """Advance the bar; `figures`, if any, replace what it shows."""
        if self._bar is not None:
            if figures:
                self._bar.set_postfix(figures, refresh=False)
            self._bar.update(steps)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class LineFile:
    """A file of whole lines, each flushed as it is written."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = open(path, "x", encoding="utf-8")  # noqa: SIM115

    def line(self, text: str) -> None:
        self._file.write(text + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def results_table(rows: dict[str, str]) -> str:
    """One row of figures under their names, as a Markdown table."""
    widths = [max(len(name), len(value)) for name, value in rows.items()]

    def line(cells: list[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(list(rows)), rule, line(list(rows.values()))])
