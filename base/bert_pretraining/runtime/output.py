"""stdout and stderr of a command, made so that output that goes away costs no work.

`prepare` replaces both streams by ones that

- show a character that their encoding lacks as an escape, in place of a UnicodeEncodeError;
- write nothing, without an error, where the stream was closed before the command started;
- report once that stdout cannot be written to any more, and write nothing from then on. What
  happens then is the command's choice, see `when_lost`. That stderr is lost is never reported.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

from bert_pretraining.errors import UserError

EXIT_BROKEN_PIPE = 128 + 13  # as a shell reports a program that SIGPIPE ended
ENCODING_ERRORS = "bert_pretraining.escape"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutputLost(BaseException):
    """stdout cannot be written to.

    It is no Exception, because it ends a command as a signal does: what handles errors must not
    take it for one of a file that the command reads or writes.

    Attributes:
        is_full: whether there is no space left; else the reader or the terminal is gone.
        reason: in the words of the operating system.
    """

    def __init__(self, error: OSError) -> None:
        self.reason = error.strerror or str(error)
        self.is_full = error.errno in _FULL
        super().__init__(self.reason)

    def as_error(self) -> UserError:
        """For a command that cannot show its results."""
        return UserError(
            f"cannot write to stdout ({self.reason})",
            "free disk space, or send the output elsewhere",
        )


def end_command(lost: OutputLost) -> None:
    """For a command whose results nobody can read any more."""
    raise lost


_act: Callable[[OutputLost], None] = end_command


def when_lost(act: Callable[[OutputLost], None]) -> None:
    """From now on call `act` when stdout is lost. Without it, OutputLost is raised there."""
    global _act
    _act = act


def prepare() -> None:
    """Replace stdout and stderr as the module says. Streams that were replaced before stay."""
    replaced = sys.stdout is not sys.__stdout__, sys.stderr is not sys.__stderr__
    for descriptor in range(3):
        _reserve(descriptor)
    if not replaced[0]:
        sys.stdout = _stream(sys.__stdout__, 1)
    if not replaced[1]:
        sys.stderr = _stream(sys.__stderr__, 2)


def _reserve(descriptor: int) -> None:
    """Open /dev/null as a standard stream that is closed, else the next file would get its number.

    Processes that this one starts inherit it.
    """
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        os.dup2(opened, descriptor)
        if opened != descriptor:
            os.close(opened)


def _stream(before: TextIO | None, descriptor: int) -> TextIO:
    """The stream that takes the place of stdout or stderr; `before` is None if it was closed."""
    raw: io.RawIOBase = _Descriptor(descriptor)
    if before is None:
        raw = io.FileIO(os.devnull, "w")
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before else "utf-8",
        errors=ENCODING_ERRORS,
        # stderr, and both of `python -u`, show each line at once.
        line_buffering=before is not None and (before.line_buffering or before.write_through),
    )


class _Descriptor(io.FileIO):
    """The file descriptor of stdout or stderr."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._is_stdout = descriptor == 1
        self._is_lost = False

    def write(self, data: memoryview) -> int:
        while not self._is_lost:
            try:
                written = super().write(data)
            except OSError as error:
                self._is_lost = True
                if self._is_stdout:
                    _act(OutputLost(error))
            else:
                if written is not None:
                    return written
                # Another process made this terminal or pipe non-blocking, and it is full.
                select.select([], [self], [])
        return len(data)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """A byte of a file name that is no UTF-8 stays that byte; other characters become an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    code = ord(error.object[error.start])
    error.end = error.start + 1
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds such a byte
        return bytes([code - 0xDC00]), error.end
    return codecs.backslashreplace_errors(error)


codecs.register_error(ENCODING_ERRORS, _escape)
