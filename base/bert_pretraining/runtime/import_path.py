"""Files of the user that hide Python's own modules: queue.py or random.py where one stands.

Python -m puts the current folder first on its path. Only this package needs nothing from there. A
folder in PYTHONPATH stays on the path, and a file there that hides a module is named if the
command fails. This module is imported before all others, and imports nothing that can be hidden.
"""

from __future__ import annotations

import os
import sys

PACKAGES = ("torch", "numpy", "h5py", "tqdm", "tokenizers", "safetensors")
# Python 3.11 and later then leave the current folder out in every process that this one starts.
SAFE_PATH_VARIABLE = "PYTHONSAFEPATH"


def leave_out_the_current_folder() -> None:
    """Take the folder that `python -m` has put first off the path, unless the package is in it.

    An error before the command begins, while modules are imported, ends with exit code 2 if a
    file hides a module.
    """
    first = sys.path[0] if sys.path else None
    is_current = first is not None and os.path.realpath(first) == os.path.realpath(os.curdir)
    if is_current and not os.path.isdir(os.path.join(first, __name__.partition(".")[0])):
        del sys.path[0]
    os.environ.setdefault(SAFE_PATH_VARIABLE, "1")
    sys.excepthook = _explain


def hiding_file() -> str | None:
    """The first file of PYTHONPATH that was imported in place of a module of Python or a package.

    Also of the current folder. A package that this one needs is a folder; a single file of its
    name is another thing.
    """
    # An empty entry stands for the current folder, from where Python 3.10 may have taken it too.
    entries = ("", *os.environ.get("PYTHONPATH", "").split(os.pathsep))
    folders = {os.path.realpath(folder or os.curdir) for folder in entries}
    for name in (*sorted(sys.stdlib_module_names), *PACKAGES):
        module = sys.modules.get(name)
        path = getattr(module, "__file__", None)
        if path is None or (name in PACKAGES and hasattr(module, "__path__")):
            continue
        if os.path.dirname(os.path.realpath(path)) in folders:
            return path
    return None


def hidden(path: str) -> str:
    """The error for a file that `hiding_file` has found, one line."""
    name = os.path.splitext(os.path.basename(path))[0]
    return (
        f"{path} hides the module {name}, which this program needs; rename that file, or take its "
        "folder out of PYTHONPATH"
    )


def _explain(kind: type[BaseException], error: BaseException, trace: object) -> None:
    path = hiding_file() if issubclass(kind, Exception) else None
    if path is None:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"Error: {hidden(path)}", file=sys.stderr, flush=True)
    os._exit(2)  # Python's exit code after this function would be 1
