"""Reading events from log files: MLPerf's `:::MLLOG` and DeepSparkHub's `[PerfLog]` lines.

A log may have other lines between its events, and other text before an event on its line (a
rank, a progress bar). `run_of_events.py` makes a run of the events.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.errors import UserError

MLLOG_TOKEN = ":::MLLOG "
PERFLOG_TOKEN = "[PerfLog] "
INTERVAL_START, INTERVAL_END, POINT_IN_TIME = "INTERVAL_START", "INTERVAL_END", "POINT_IN_TIME"
_PROBE_BYTES = 65536


@dataclass(frozen=True)
class Event:
    """One event of a log.

    Attributes:
        line: the number of its line, from 1.
        kind: "INTERVAL_START", "INTERVAL_END" or "POINT_IN_TIME". If the record does not
            say it, the ending of the key does.
        key: MLLOG's `key` or PerfLog's `event`.
        value: any JSON value; None where the record has none.
        time_ms: milliseconds of Unix time; None where the record has none.
        metadata: {} where the record has none.
        namespace: of MLLOG; "" where the record has none.
    """

    line: int
    kind: str
    key: str
    value: object
    time_ms: int | None
    metadata: dict
    namespace: str = ""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a line that has the token of an event."""

    line: int
    what: str


@dataclass(frozen=True)
class LogFile:
    """Every event of a file, in the order of its lines, and every fault.

    A record without value, time or metadata is both an event and a fault.
    """

    path: Path
    mllog: list[Event]
    perflog: list[Event]
    faults: list[Fault]


def mllog_events(path: str | Path, strict: bool = True) -> list[Event]:
    """The events of a file's `:::MLLOG` lines.

    Args:
        strict: whether a malformed line raises UserError. If not, as much of it is read as
            possible.

    Raises:
        UserError: the file cannot be read, is not text, or, if `strict`, has a malformed line,
            which is named by its number.
    """
    return _events(read_log(path, (MLLOG_TOKEN,)), strict).mllog


def perflog_events(path: str | Path, strict: bool = True) -> list[Event]:
    """The events of a file's `[PerfLog]` lines, with the arguments and errors of `mllog_events`."""
    return _events(read_log(path, (PERFLOG_TOKEN,)), strict).perflog


def read_log(path: str | Path, tokens: tuple[str, ...] = (MLLOG_TOKEN, PERFLOG_TOKEN)) -> LogFile:
    """The events of both kinds in a file, and the faults.

    Raises:
        UserError: the file cannot be read or is not text.
    """
    log = LogFile(Path(path), [], [], [])
    into = {MLLOG_TOKEN: (_mllog_event, log.mllog), PERFLOG_TOKEN: (_perflog_event, log.perflog)}
    for number, text in _lines(log.path):
        for token in tokens:
            parse, events = into[token]
            if token in text:
                _take(number, text, token, parse, events, log.faults)
    return log


def _events(log: LogFile, strict: bool) -> LogFile:
    if strict and log.faults:
        fault = log.faults[0]
        raise UserError(
            f"{log.path}:{fault.line}: {fault.what}", "repair that line, or pass another log"
        )
    return log


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines. A carriage return ends a record too, as in MLPerf's own readers."""
    try:
        with open(path, "rb") as file:
            if b"\0" in file.read(_PROBE_BYTES):
                raise UserError(f"{path}: not a text file", "pass a log")
            file.seek(0)
            for number, line in enumerate(file, 1):
                for text in line.decode("utf-8", errors="replace").rstrip("\n").split("\r"):
                    yield number, text
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})", "pass a log") from error


def _take(
    number: int,
    text: str,
    token: str,
    parse: Callable[[int, dict, list[str]], Event | None],
    events: list[Event],
    faults: list[Fault],
) -> None:
    """Parse every record of a line. More than one is a fault: MLPerf's own readers keep one."""
    records = text.split(token)[1:]
    wrong: list[str] = []
    if len(records) > 1:
        wrong.append(f"{len(records)} {token.strip()} records on one line")
    for record in records:
        try:
            content = json.loads(record)
        except (ValueError, RecursionError) as error:
            wrong.append(f"not a whole {token.strip()} record ({error})")
            continue
        if not isinstance(content, dict):
            wrong.append(f"the {token.strip()} record is no JSON object")
            continue
        event = parse(number, content, wrong)
        if event is not None:
            events.append(event)
    faults += [Fault(number, what) for what in wrong]


def _mllog_event(number: int, record: dict, wrong: list[str]) -> Event | None:
    key = record.get("key")
    if not isinstance(key, str) or not key:
        wrong.append("the record has no 'key'")
        return None
    for name in ("value", "metadata", "time_ms"):
        if name not in record:
            wrong.append(f"'{key}' has no '{name}'")
    metadata = _metadata(key, record, wrong)
    return Event(
        number,
        str(record.get("event_type") or _kind(key)),
        key,
        record.get("value"),
        _time_ms(key, record.get("time_ms"), wrong),
        metadata,
        str(record.get("namespace") or ""),
    )


def _perflog_event(number: int, record: dict, wrong: list[str]) -> Event | None:
    key = record.get("event")
    if not isinstance(key, str) or not key:
        wrong.append("the record has no 'event'")
        return None
    metadata = _metadata(key, record, wrong)
    time_ms = _time_ms(key, metadata.get("time_ms"), wrong)
    return Event(number, _kind(key), key, record.get("value"), time_ms, metadata)


def _metadata(key: str, record: dict, wrong: list[str]) -> dict:
    metadata = record.get("metadata", {})
    if isinstance(metadata, dict):
        return metadata
    wrong.append(f"'{key}' has metadata that is no JSON object")
    return {}


def _time_ms(key: str, value: object, wrong: list[str]) -> int | None:
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return int(value)
    wrong.append(f"'{key}' has a time_ms that is no number: {value!r}")
    return None


def _kind(key: str) -> str:
    ending = key.lower().rsplit("_", 1)[-1]
    if ending in ("start", "begin"):
        return INTERVAL_START
    return INTERVAL_END if ending in ("stop", "end") else POINT_IN_TIME
