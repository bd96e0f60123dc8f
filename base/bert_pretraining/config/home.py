"""`~` at the start of a path, which a shell expands only where a word begins with it.

bash leaves --data_dir=~/x as it is, and nothing expands a path in a configuration's file.
"""

from __future__ import annotations

import os
import re

from bert_pretraining.errors import UserError


def expanded(value: str) -> str:
    """The value with ~ or ~USER at its start replaced by the home folder.

    Raises UserError if that folder is not known. A folder that is called ~ is ./~.
    """
    found = re.match(r"~[^/]*(?=/|$)", value)
    if found is None:
        return value
    path = os.path.expanduser(value)
    if path == value:
        raise UserError(
            f"{value}: the home folder {found[0]} is not known",
            "write the whole path" + (", or export HOME" if found[0] == "~" else ""),
        )
    return path


def expanded_argument(argument: str) -> str:
    """A word of a command line, "--flag=~/x" or "~/x", with its home folder written out."""
    flag, equals, value = argument.partition("=")
    if argument.startswith("--") and equals:
        return f"{flag}={expanded(value)}"
    return expanded(argument)
