"""A log's file: whole lines only."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO


class LineFile:
    """A new file of whole lines, each flushed as it is written."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = open(path, "x", encoding="utf-8")  # noqa: SIM115

    def line(self, text: str) -> None:
        self._file.write(text + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
