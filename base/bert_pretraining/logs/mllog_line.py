"""One event -> its `:::MLLOG` line, by mlperf_logging where that is installed.

A run does not need that package: `plain_line` writes the same fields, which a test holds to
what mllog writes.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

SOURCE_ROOT = Path(__file__).resolve().parents[2]
START, END, POINT = "INTERVAL_START", "INTERVAL_END", "POINT_IN_TIME"

# (kind of event, key, value, metadata, Unix time in ms or None for now, how many calls above the
# caller the code is that the metadata names) -> the line, without its end
LineMaker = Callable[[str, str, object, "dict | None", "int | None", int], str]


def line_maker() -> LineMaker:
    """mllog's way to make a line, or `plain_line` without mlperf_logging."""
    try:
        from mlperf_logging.mllog import mllog
    except ModuleNotFoundError:
        return plain_line

    taken = _Taken()
    logger = logging.Logger("bert_pretraining.mlperf", logging.INFO)
    logger.addHandler(taken)
    # mllog takes root_dir for a regular expression.
    maker = mllog.MLLogger(logger=logger, root_dir=re.escape(str(SOURCE_ROOT)))
    methods = {START: maker.start, END: maker.end, POINT: maker.event}

    def line(
        kind: str, key: str, value: object, metadata: dict | None, time_ms: int | None, depth: int
    ) -> str:
        methods[kind](key, value, metadata=metadata, time_ms=time_ms, stack_offset=depth + 2)
        return taken.message()

    return line


def plain_line(
    kind: str, key: str, value: object, metadata: dict | None, time_ms: int | None, depth: int
) -> str:
    """The line as mllog writes it: the same fields in the same order."""
    caller = sys._getframe(depth + 1)
    place = caller.f_code.co_filename.removeprefix(f"{SOURCE_ROOT}/")
    record = {
        "namespace": "",
        "time_ms": int(time.time() * 1000) if time_ms is None else time_ms,
        "event_type": kind,
        "key": key,
        "value": value,
        "metadata": {"file": place, "lineno": caller.f_lineno, **(metadata or {})},
    }
    return f":::MLLOG {json.dumps(record)}"


class _Taken(logging.Handler):
    """Takes mllog's lines, for the caller to write: mllog hides what goes wrong in writing."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)

    def message(self) -> str:
        """The line just made. Raises ValueError for what mllog could not encode."""
        records, self._records = self._records, []
        if len(records) != 1 or records[0].levelno != logging.INFO:
            raise ValueError("; ".join(record.getMessage().strip() for record in records))
        return records[0].getMessage()
