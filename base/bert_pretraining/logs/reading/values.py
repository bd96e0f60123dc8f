"""Values of log records, which may be of any JSON type, as what they should be, or None."""

from __future__ import annotations

import math


def number(value: object) -> float | None:
    """A finite number."""
    usable = (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    )
    return float(value) if usable else None


def whole(value: object) -> int | None:
    """A whole number."""
    found = number(value)
    return int(found) if found is not None and found == int(found) else None


def text(value: object) -> str | None:
    """Text that is not empty."""
    return value if isinstance(value, str) and value else None


def entry(value: object, name: str) -> object:
    """What an object of the record has under a name."""
    return value.get(name) if isinstance(value, dict) else None
