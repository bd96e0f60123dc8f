"""Exit codes and the two kinds of failure a run can end with.

`UserError` is for everything that a user can fix: it is shown as one line, without a
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
    """Training cannot go on (a loss that is not finite, say): exit code 1.

    The message is one line; the place in the code would not help the user. `detail`: what
    stands above it, in a library's words.
    """

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail
