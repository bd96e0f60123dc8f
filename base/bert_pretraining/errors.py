"""Exit codes, the two kinds of failure that a run can end with, and why something is unavailable.

`UserError` is for everything that a user can fix: it is shown as one line, without a
traceback. Any other exception is a defect of the program or the machine and keeps
its traceback.
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_CONVERGED = 0
EXIT_CRASH = 1
EXIT_USAGE = 2
EXIT_NOT_CONVERGED = 3
EXIT_STOPPED = 4  # by a signal, after saving what is needed to resume
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Bad usage, configuration, data or checkpoint: exit code 2.

    The message is one line, "problem; fix". Where many tensors are at fault, further lines
    list them.

    Args:
        problem: what is wrong, and where.
        fix: what the user can do, as an order: "pass --data_dir DIR".
    """

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem, fix)  # both, so that another process can unpickle it
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem}; {self.fix}"


class TrainingError(Exception):
    """Training cannot continue, for example after a loss that is not finite: exit code 1.

    The message is one line; the place in the code would not help the user. `detail`: text that is
    printed above the message, such as a library's own error.
    """

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


@dataclass(frozen=True)
class Unavailable:
    """Why a provider of kernels or of an optimizer cannot run on a device.

    fix: what the user can do, if anything.
    """

    reason: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.reason}; {self.fix}" if self.fix else self.reason


@dataclass(frozen=True)
class NotInstalled(Unavailable):
    """The provider's package is not installed."""
