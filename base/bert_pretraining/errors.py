"""Exit codes and the two kinds of failure a run can end with.

`UserError` is for everything a user can mend: it is shown as one line, without a
traceback. Any other exception is a defect of the program or the machine and keeps
its traceback.
"""

EXIT_CONVERGED = 0
EXIT_CRASH = 1
EXIT_USAGE = 2
EXIT_NOT_CONVERGED = 3
EXIT_STOPPED = 4  # by a signal, after saving what is needed to resume
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Bad usage, configuration, data or checkpoint: exit code 2.

    The message is one line that says what is wrong, where, and how to mend it. Where many
    tensors are at fault, further lines list them.
    """


class TrainingError(Exception):
    """Training cannot go on (a loss that is not finite, say): exit code 1.

    The message is one line; the place in the code would not help the user. `detail`: what
    stands above it, in a library's words.
    """

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail
