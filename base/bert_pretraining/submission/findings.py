"""What `submission check` finds: one line each, with its place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """One error or warning.

    Attributes:
        path: the file or directory that is at fault.
        line: in that file, from 1; None if the whole file or directory is meant.
        what: the problem, one line.
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
