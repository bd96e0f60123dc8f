"""Whether all machines of a job were given the same settings and the same code."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

CODE = "the code's sha256"
_NAMED = 3  # differing things that a message names


def describe(settings: Mapping[str, object]) -> dict[str, str]:
    """What must be the same everywhere: every setting, this package's code, versions.

    Milliseconds. Major and minor version of Python, PyTorch's whole version.
    """
    return {
        **{f"--{name}": str(value) for name, value in settings.items()},
        CODE: _digest_of_the_code(),
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "PyTorch": metadata.version("torch"),
    }


def difference(described: Sequence[tuple[str, Mapping[str, str]]]) -> str | None:
    """One line: what differs first from the first place, and how to fix it; None if nothing.

    described: where (a machine's or rank's name), and what `describe` gave there.
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
            return f"{differing}{more}: run the same command, from the same checkout, on both"
    return None


def _digest_of_the_code() -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
