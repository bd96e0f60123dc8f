"""A log's file: whole lines only."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path


class LineFile:
    """A new file of whole lines, each written at once, without a buffer.

    `line` raises OSError with the file's path where a line cannot be written; of that line nothing
    stays in the file.

    Attributes:
        name: its path.
        seconds: that writing has taken so far.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115
        self.name, self.seconds = str(path), 0.0

    def line(self, text: str) -> None:
        data = memoryview((text + "\n").encode("utf-8", "backslashreplace"))
        before, began = self._file.tell(), time.monotonic()
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(before)
            raise OSError(error.errno, error.strerror, self.name) from error
        finally:
            self.seconds += time.monotonic() - began

    def close(self) -> None:
        self._file.close()
