"""A process that ends with the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG in <sys/prctl.h>; it stays set after exec


def end_with_parent(parent: int) -> None:
    """Ask Linux to end this process when its parent dies, even by SIGKILL.

    parent: its process id. A process whose parent has died already ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
