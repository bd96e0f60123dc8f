"""`[PerfLog]` lines, as tooling for DeepSparkHub's logs reads them."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence

PREFIX = "[PerfLog] "


class PerfLog:
    """One JSON event a line: {"event", "value", "metadata": {file, lineno, time_ms, rank}}.

    Args:
        sinks: called with each line; none on ranks other than 0.
        rank: for the metadata.
    """

    def __init__(self, sinks: Sequence[Callable[[str], None]], rank: int) -> None:
        self._sinks = sinks
        self._rank = rank

    def log(self, event: str, value: dict | None = None, depth: int = 1) -> None:
        """Write one event; a float that is not finite becomes null, as JSON has none.

        depth: how many callers up the place to name in the metadata is.
        """
        if not self._sinks:
            return
        caller = sys._getframe(depth)
        record = {
            "event": event,
            "value": None if value is None else {key: _plain(item) for key, item in value.items()},
            "metadata": {
                "file": caller.f_code.co_filename,
                "lineno": caller.f_lineno,
                "time_ms": int(time.time() * 1000),
                "rank": self._rank,
            },
        }
        line = PREFIX + json.dumps(record)
        for sink in self._sinks:
            sink(line)


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
