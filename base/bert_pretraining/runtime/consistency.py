"""The consistency check: all machines of a job must have the same settings and code."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from bert_pretraining.runtime import packages

CODE = "the code's sha256"
FIX = "run the same command, from the same checkout, on both"
_NAMED = 3  # how many differences a message names


def describe(settings: Mapping[str, object]) -> dict[str, str]:
    """What must be the same on all machines: every setting, this package's code, and versions.

    Of Python's version the first two numbers count, of PyTorch's all. Takes milliseconds.
    """
    return {
        **{f"--{name}": str(value) for name, value in settings.items()},
        CODE: _digest_of_the_code(),
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "PyTorch": str(packages.installed_version("torch")),
    }


def difference(described: Sequence[tuple[str, Mapping[str, str]]]) -> str | None:
    """One line: what differs between the first place and another; None if nothing differs.

    described: a machine's or rank's name, and what `describe` returned there. FIX is what the
    user can do.
    """
    (first_place, first), *others = described
    for place, other in others:
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            differing = "; ".join(
                f"{name} is {first.get(name)} on {first_place} and {other.get(name)} on {place}"
                for name in names[:_NAMED]
            )
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            return f"{differing}{more}"
    return None


def _digest_of_the_code() -> str:
    package = Path(__file__).parents[1]  # the whole package, not only this folder
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
