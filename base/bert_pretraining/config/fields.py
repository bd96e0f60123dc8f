"""How a setting is declared: default, help text, bounds, and whether it influences a resume."""

from __future__ import annotations

from dataclasses import field

# A setting's group in --help and `config show`, and its title.
GROUPS = {
    "run": "configuration and device",
    "data": "data and files",
    "training": "training",
    "optimizer": "optimizer",
    "evaluation": "evaluation and target",
    "logging": "logs and checkpoints",
    "submission": "MLPerf submission",
    "upstream": "upstream's switches that this design has no need of; they change nothing",
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
) -> object:
    """A dataclass field.

    minimum, maximum: inclusive. changes_numbers: whether losses and weights follow from it; a
    run that resumes with another value is then not bit-identical, and says so.
    """
    metadata = {
        "group": group,
        "help": help_text,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "changes_numbers": changes_numbers,
    }
    return field(default=default, metadata=metadata)
