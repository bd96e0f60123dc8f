"""A lock on a folder: one process at a time works in it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import TextIO

from bert_pretraining.errors import UserError

NAME = ".lock"


class FolderLock:
    """Held from its creation until `release`, or until the process ends, however it ends.

    Also a context manager that releases the lock at its end. On a file system without locks,
    as some network file systems are, nothing is held.

    Args:
        folder: is created where it does not exist.
        holder: what messages call the process that has the lock.
        name: what messages call the folder.
        fix: what messages tell the user to do.
        wait: wait until the lock is free.

    Raises:
        UserError: another process holds the lock and `wait` is false, or the folder cannot be
            written to.
    """

    def __init__(
        self,
        folder: Path,
        holder: str = "run",
        name: str = "output_dir",
        fix: str = "pass another --output_dir",
        wait: bool = False,
    ) -> None:
        self._file: TextIO | None = None
        path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+", encoding="ascii")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot write to {name} {folder} ({error.strerror})", fix) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            self._file.seek(0)
            process = self._file.read().strip() or "unknown"
            self.release()
            raise UserError(
                f"{name} {folder} is in use by another {holder} (process {process})",
                f"wait for it, or {fix}",
            ) from error
        except OSError:  # this file system has no locks
            return
        self._file.truncate(0)
        self._file.write(f"{os.getpid()} on {os.uname().nodename}\n")
        self._file.flush()

    def release(self) -> None:
        """Let the next process take the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
