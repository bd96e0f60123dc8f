"""The declaration of a setting: default, help text, bounds, and whether it affects a resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

# Groups of settings in --help and `config show`, with their titles.
GROUPS = {
    "run": "configuration and device",
    "data": "data and files",
    "training": "training",
    "optimizer": "optimizer",
    "evaluation": "evaluation and target",
    "logging": "logs and checkpoints",
    "submission": "MLPerf submission",
    "upstream": "upstream's switches that are accepted and change nothing",
}


def setting(
    default: object,
    group: str,
    help_text: str,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    changes_numbers: bool = True,
    fix: str | None = None,
    several: bool = False,
    fault: Callable[[Any], str | None] | None = None,
) -> object:
    """A dataclass field.

    minimum, maximum: inclusive. changes_numbers: whether the setting affects losses and weights. A
    run that resumes with another value is then not bit-identical, and says so. fix: what to do
    about a value that is refused. fault: tells what is wrong with a value, or None. several: the
    value is a text that holds any number of `choices`, between commas or blanks; the flag takes
    them as separate words, too.
    """
    metadata = {
        "group": group,
        "help": help_text,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "changes_numbers": changes_numbers,
        "fix": fix,
        "several": several,
        "fault": fault,
    }
    return field(default=default, metadata=metadata)
