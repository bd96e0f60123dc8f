"""`submission assemble`: write a submission's tree from logs, system description and code."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.errors import UserError
from bert_pretraining.runtime.files import write_whole
from bert_pretraining.runtime.words import counted
from bert_pretraining.submission.implementation import write_implementation
from bert_pretraining.submission.rulesets import RUNS
from bert_pretraining.submission.series import SYSTEM_FILE, find_log, load_series
from bert_pretraining.submission.system import (
    FIELDS,
    STATUS_IN_DESCRIPTION,
    blanks,
    describe_machine,
)
from bert_pretraining.submission.tree import BENCHMARK, ResultLog, number, read_result

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Runs:
    """The logs of one system in launch order, its description, and the flags of the runs."""

    logs: list[ResultLog]
    description: dict[str, object]
    flags: tuple[str, ...]
    lost: list[str]  # runs that left no log


@dataclass(frozen=True)
class Assembled:
    """What was written: ORG's directory, the description, its blank fields, remarks to print."""

    folder: Path
    description: Path
    blanks: list[str]
    remarks: list[str]


def runs_of_series(directory: Path) -> Runs:
    """The runs of a series. Raises UserError if it cannot be read."""
    series = load_series(directory)
    paths = {run.folder: find_log(directory / run.folder) for run in series.runs}
    description = _read_object(directory / SYSTEM_FILE)
    return Runs(
        logs=[read_result(path) for path in paths.values() if path],
        description=description,
        flags=series.flags,
        lost=[folder for folder, path in paths.items() if path is None],
    )


def runs_of_logs(paths: Sequence[Path], flags: Sequence[str]) -> Runs:
    """The runs of some logs, in launch order, with this machine as their system."""
    logs = sorted((read_result(path) for path in paths), key=_start)
    return Runs(logs, describe_machine(), tuple(flags), [])


def assemble(
    runs: Runs, output_dir: Path, system: str, implementation: str, fields: Path | None
) -> Assembled:
    """Write ORG/ into `output_dir`; ORG is the logs' submission_org.

    A system that exists there is never changed; a new system of the same ORG is put beside it.

    Args:
        system, implementation: names of their directories.
        fields: a JSON file of description fields, which replace those that were found.

    Raises:
        UserError: no logs, logs of different organizations, a missing configuration, a name
            that cannot be a directory's, a system that exists, or an unknown field.
    """
    _require_name("--system", system)
    _require_name("--implementation", implementation)
    if not runs.logs:
        raise UserError(
            "no run has left a log",
            "make the runs first, with python -m bert_pretraining submission run",
        )
    organization = str(_shared(runs.logs, "submission_org"))
    _require_name("submission_org", organization)
    if organization == "unknown":
        raise UserError(
            f"{runs.logs[0].path}: submission_org is 'unknown'",
            "make the runs with --submission_org ORG",
        )
    description = _description(runs, system, organization, fields)
    root = output_dir / organization
    results = root / "results" / system
    for path in (results, root / "systems" / f"{system}.json"):
        if path.exists():
            raise UserError(f"{path} is there already", "pass another --system or --output_dir")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="assemble-", dir=output_dir) as temporary:
            staging = Path(temporary)
            _write(staging, runs, description, system, implementation)
            kept = _move(staging, root, system, implementation)
    except OSError as error:
        raise UserError(
            f"cannot write to {output_dir} ({error.strerror})", "pass another --output_dir"
        ) from error
    remarks = [f"{kept} exists already; its code was kept"] if kept else []
    if len(runs.logs) != RUNS:
        remarks.append(f"{counted(len(runs.logs), 'log')}; a submission has {RUNS}")
    if runs.lost:
        remarks.append(f"no log of {', '.join(runs.lost)}, which ended before the log began")
    path = root / "systems" / f"{system}.json"
    return Assembled(root, path, blanks(description), remarks)


def _write(
    staging: Path,
    runs: Runs,
    description: dict[str, object],
    system: str,
    implementation: str,
) -> None:
    write_implementation(staging / implementation, runs.flags, len(runs.logs))
    write_whole(staging / f"{system}.json", json.dumps(description, indent=4) + "\n")
    folder = staging / "results" / BENCHMARK
    folder.mkdir(parents=True)
    for index, log in enumerate(runs.logs):
        shutil.copyfile(log.path, folder / f"result_{index}.txt")


def _move(staging: Path, root: Path, system: str, implementation: str) -> Path | None:
    """Move the complete parts to ORG/, the results last. Returns the code that was kept, if any."""
    code = root / "benchmarks" / BENCHMARK / "implementations" / implementation
    kept = code if code.exists() else None
    moves = [
        (staging / implementation, code),
        (staging / f"{system}.json", root / "systems" / f"{system}.json"),
        (staging / "results", root / "results" / system),
    ]
    for source, target in moves[1:] if kept else moves:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
    return kept


def _description(
    runs: Runs, system: str, organization: str, fields: Path | None
) -> dict[str, object]:
    status = _shared(runs.logs, "submission_status")
    description = {
        **runs.description,
        "submitter": organization,
        "division": _shared(runs.logs, "submission_division"),
        "status": STATUS_IN_DESCRIPTION.get(str(status), str(status)),
        "system_name": system,
    }
    if fields is not None:
        own = _read_object(fields)
        unknown = sorted(set(own) - set(FIELDS))
        if unknown:
            raise UserError(
                f"{fields}: no such field of a system description: {unknown[0]}",
                "correct its name or leave it out",
            )
        description |= own
    return {field: description.get(field, "") for field in FIELDS}


def _shared(logs: list[ResultLog], key: str) -> object:
    """The value of this key, which all logs must share."""
    values = {json.dumps(log.value(key)): log for log in logs}
    if len(values) > 1:
        (value, log), (other, other_log) = list(values.items())[:2]
        raise UserError(
            f"{key} is {value} in {log.path}, but {other} in {other_log.path}",
            "assemble the runs of one system",
        )
    value = logs[0].value(key)
    if not isinstance(value, str) or not value:
        raise UserError(f"{logs[0].path} has no {key}", "make the runs with --submission_org ORG")
    return value


def _require_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise UserError(
            f"{what} '{name}' cannot be the name of a submission's directory",
            "use letters, digits and . _ + - only, with a letter or a digit first",
        )


def _read_object(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error})", "correct the file, or name another"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object", 'write one: {"FIELD": VALUE, ...}')
    return content


def _start(log: ResultLog) -> float:
    event = log.first("run_start") or log.first("init_start")
    time_ms = number(event.time_ms) if event else None
    if time_ms is None:
        raise UserError(
            f"{log.path}: neither run_start nor init_start says when the run was launched",
            "leave this log out",
        )
    return time_ms
