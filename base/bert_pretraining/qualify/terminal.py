"""What a qualification shows on the terminal while it runs; plain lines where programs read it."""

from __future__ import annotations

import shlex
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from bert_pretraining.qualify.record import FAIL, NOTE, PASS, VERDICTS, Qualification, StageResult
from bert_pretraining.qualify.stages import Stage
from bert_pretraining.report.view import duration
from bert_pretraining.runtime import screen
from bert_pretraining.runtime.words import counted

COLORS = {PASS: "\033[1;32m", NOTE: "\033[1;33m", FAIL: "\033[1;31m"}
NARROW = 80  # columns, below which reasons stand below their stage
INDENT, NARROW_INDENT = 29, 6
SHOWN_NOTES = 4  # of a stage; the page has all
TICK_SECONDS = 1.0


class Shown:
    """Prints the verdict of each stage when it has ended, and the worst reasons at the end.

    On a terminal the last line tells what runs, for how long, and its limit. Every line of another
    kind is printed above it.

    notice: a line for the user before all stages; empty for none.
    """

    def __init__(self, done: Qualification, stages: Sequence[Stage], notice: str = "") -> None:
        self._done, self._stages = done, list(stages)
        self._is_watched = screen.is_watched(sys.stdout)
        self._is_live = screen.takes_codes(sys.stdout)
        self._is_coloured = screen.takes_bold(sys.stdout)
        self._started = time.monotonic()
        self._stage: Stage | None = None
        self._limit, self._stage_started, self._text = 0.0, 0.0, ""
        self._lock, self._over = threading.Lock(), threading.Event()
        machine, ranks = done.machine, done.settings["ranks"]
        self._wrapped(
            f"Qualifying {machine['devices']} x {machine['device']} on {machine['host']}, torch "
            f"{machine['versions']['torch']}, {counted(ranks, 'rank')}",
            "",
        )
        if notice:
            self._write(f"Notice: {notice}")  # unbroken, as it has a command to be copied
        if self._is_live:
            threading.Thread(target=self._tick, daemon=True).start()

    def begins(self, stage: Stage, limit: float) -> None:
        """A stage has begun. limit: seconds after which it has failed."""
        with self._lock:
            self._stage, self._limit, self._stage_started = stage, limit, time.monotonic()
            self._text = stage.asks
            self._draw()

    def progress(self, text: str) -> None:
        """What the present stage does now."""
        with self._lock:
            if self._stage is not None:
                self._text = text.removeprefix(f"{self._stage.name}: ")
            self._draw()

    def ended(self, result: StageResult) -> None:
        """The verdict of a stage and its reason; its notes, unless it passed."""
        with self._lock:
            self._stage = None
            head = f"{result.verdict:<5} {result.name:<12} {result.seconds:>6.1f} s"
            indent = " " * INDENT
            if self._is_watched and screen.columns(sys.stdout) < NARROW:
                indent = " " * NARROW_INDENT
                self._write(self._painted(head, result.verdict))
                self._wrapped(result.reason, indent, indent)
            else:
                lines = self._lines(f"{head:<{INDENT - 2}}  {_one_line(result.reason)}", indent)
                self._write("\n".join([self._painted(lines[0], result.verdict), *lines[1:]]))
            notes = [] if result.verdict == PASS else result.notes
            for note in notes[:SHOWN_NOTES]:
                self._wrapped(f"- {note}", f"{indent}  ", indent)
            if len(notes) > SHOWN_NOTES:
                self._wrapped(f"- {len(notes) - SHOWN_NOTES} more: see the page", indent, indent)

    def finished(self, page: Path, record: Path) -> None:
        """The verdict of the whole, the worst reasons again, and what to do now."""
        self.close()
        counts = [stage.verdict for stage in self._done.stages]
        told = ", ".join(f"{counts.count(one)} {one}" for one in VERDICTS)
        verdict = self._done.verdict
        self._write("")
        word = f"{COLORS[verdict]}{verdict}{screen.NORMAL}" if self._is_coloured else verdict
        self._write(f"Verdict: {word} ({told}), {duration(time.monotonic() - self._started)}")
        if verdict != PASS:
            for stage in self._done.stages:
                if stage.verdict == verdict:
                    self._wrapped(f"- {stage.name}: {stage.reason}", "    ", "  ")
        self._write(f"Page:    {page}")
        self._write(f"Figures: {record}")
        word = shlex.quote(str(record))
        self._write(f"Compare: python -m bert_pretraining qualify compare BEFORE.json {word}")

    def close(self) -> None:
        """Remove the line of what runs."""
        self._over.set()
        with self._lock:
            self._stage = None
            if self._is_live:
                sys.stdout.write(screen.CLEAR_LINE)
                sys.stdout.flush()

    def _tick(self) -> None:
        while not self._over.wait(TICK_SECONDS):
            with self._lock:
                self._draw()

    def _draw(self) -> None:
        """The line of what runs, in place of the one before."""
        if not self._is_live or self._stage is None or self._over.is_set():
            return
        number = self._stages.index(self._stage) + 1
        passed = time.monotonic() - self._stage_started
        head = (
            f"{number}/{len(self._stages)} {self._stage.name} {passed:.0f} s of at most "
            f"{self._limit:.0f}: "
        )
        # A full line would move the terminal's text.
        text = (head + _one_line(self._text))[: screen.columns(sys.stdout) - 1]
        sys.stdout.write(screen.CLEAR_LINE + text)
        sys.stdout.flush()

    def _painted(self, line: str, verdict: str) -> str:
        """The line, whose first word is the verdict, in its colour."""
        if not self._is_coloured:
            return line
        return f"{COLORS[verdict]}{verdict}{screen.NORMAL}{line.removeprefix(verdict)}"

    def _wrapped(self, text: str, indent: str, first: str = "") -> None:
        """A text in lines of the terminal's width. indent: of the second and later ones."""
        self._write("\n".join(self._lines(first + _one_line(text), indent)))

    def _lines(self, text: str, indent: str) -> list[str]:
        """Programs and files get one line."""
        if not self._is_watched:
            return [text]
        return textwrap.wrap(
            text, screen.columns(sys.stdout), subsequent_indent=indent, break_on_hyphens=False
        )

    def _write(self, text: str) -> None:
        sys.stdout.write((screen.CLEAR_LINE if self._is_live else "") + text + "\n")
        sys.stdout.flush()


def _one_line(text: str) -> str:
    """Without line breaks, and without characters that move a terminal's text."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())
