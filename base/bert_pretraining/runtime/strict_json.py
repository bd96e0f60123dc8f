"""JSON that every program reads: a number that is not finite is a text there.

Python's json writes NaN and Infinity, which no standard JSON has, and which many readers refuse.
Where nobody reads the numbers again, null is enough, as in PerfLog.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_NAMES = {math.inf: "Infinity", -math.inf: "-Infinity"}


def dumps(content: object, indent: int | None = None) -> str:
    """As `json.dumps`, with "NaN", "Infinity" and "-Infinity" for such numbers."""
    return json.dumps(_named(content), indent=indent, allow_nan=False)


def numbers_again(content: object) -> object:
    """What `json.loads` gave, with the numbers that `dumps` made texts of."""
    if isinstance(content, dict):
        return {name: numbers_again(value) for name, value in content.items()}
    if isinstance(content, list):
        return [numbers_again(value) for value in content]
    return _NUMBERS.get(content, content) if isinstance(content, str) else content


def _named(content: object) -> object:
    if isinstance(content, Mapping):
        return {name: _named(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_named(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return _NAMES.get(content, "NaN")
    return content
