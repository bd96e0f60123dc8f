"""What a check found: one line each, what and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        path: the file or directory it is wrong in.
        line: of that file, from 1; None where it concerns the whole.
        what: one line for people.
        is_error: False for a warning, which does not fail the check.
    """

    path: Path
    line: int | None
    what: str
    is_error: bool = True

    @property
    def where(self) -> str:
        return str(self.path) if self.line is None else f"{self.path}:{self.line}"

    def __str__(self) -> str:
        return f"{'error  ' if self.is_error else 'warning'} {self.where}: {self.what}"


def warning(path: Path, line: int | None, what: str) -> Finding:
    """A finding that does not fail the check."""
    return Finding(path, line, what, is_error=False)
