"""The declaration of a setting: default, help text, bounds, and whether it affects a resume."""

from __future__ import annotations

from dataclasses import field

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
) -> object:
    """A dataclass field.

    minimum, maximum: inclusive. changes_numbers: whether the setting affects losses and weights. A
    run that resumes with another value is then not bit-identical, and says so. fix: what to do
    about a value that is none of `choices`.
    """
    metadata = {
        "group": group,
        "help": help_text,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "changes_numbers": changes_numbers,
        "fix": fix,
    }
    return field(default=default, metadata=metadata)
