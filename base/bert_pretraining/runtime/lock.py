"""One run at a time in a folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TextIO

from bert_pretraining.errors import UserError

NAME = ".lock"


class FolderLock:
    """Held from its making until `release`, or until the process ends, however it ends.

    UserError where another process holds it, or the folder cannot be written to. Where the file
    system knows no locks, as some network ones do, nothing is held.
    """

    def __init__(self, folder: Path) -> None:
        self._file: TextIO | None = None
        path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+", encoding="ascii")  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"cannot write to output_dir {folder} ({error.strerror}); pass --output_dir"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            raise UserError(
                f"output_dir {folder} is in use by another run (process {holder}); wait for it, or "
                "pass another --output_dir"
            ) from error
        except OSError:
            return
        self._file.truncate(0)
        self._file.write(f"{os.getpid()} on {os.uname().nodename}\n")
        self._file.flush()

    def release(self) -> None:
        """Let the next run in."""
        if self._file is not None:
            self._file.close()
            self._file = None
