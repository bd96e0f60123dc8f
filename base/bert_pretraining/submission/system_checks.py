"""Checks of a submission's directories and its system descriptions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from bert_pretraining.errors import UserError
from bert_pretraining.submission.findings import Finding, warning
from bert_pretraining.submission.system import FIELDS, NEEDED_FIELDS, STATUS_IN_DESCRIPTION
from bert_pretraining.submission.tree import (
    BENCHMARK,
    ResultLog,
    System,
    number,
    read_result,
)

SCRIPTS = ("README.md", "setup.sh", "init_datasets.sh", "run_and_time.sh")
BYPASSES = "package_checker_params"
OTHER_RESULT_FILES = (BYPASSES, "scaling.json", "power")


def read_logs(system: System) -> tuple[list[ResultLog], list[Finding]]:
    """The readable logs of a system, and a finding for each log that cannot be read."""
    logs, found = [], []
    for path in system.result_paths:
        try:
            logs.append(read_result(path))
        except UserError as error:
            found.append(Finding(path, None, str(error)))
    return logs, found


def check_tree(folder: Path, systems: list[System]) -> Iterator[Finding]:
    """Check the directories: every system has a description, and the code is there."""
    if not systems:
        yield Finding(folder / "results", None, "holds no system's directory")
    described = {system.name for system in systems}
    for path in sorted((folder / "systems").glob("*.json")):
        if path.stem not in described:
            yield warning(path, None, f"describes a system without results/{path.stem}/")
    implementations = folder / "benchmarks" / BENCHMARK / "implementations"
    found = sorted(path for path in implementations.glob("*") if path.is_dir())
    if not found:
        yield Finding(
            implementations, None, "holds no implementation: the code of the runs goes there"
        )
    for path in found:
        for name in SCRIPTS:
            if not (path / name).is_file():
                yield Finding(path, None, f"no {name}")


def check_folder(system: System) -> Iterator[Finding]:
    """Check for files beside the logs that do not belong there."""
    if not system.folder.is_dir():
        yield Finding(system.folder.parent, None, f"no {BENCHMARK}/ in it")
        return
    logs = system.result_paths
    for path in sorted(system.folder.iterdir()):
        if path not in logs and path.name not in OTHER_RESULT_FILES:
            yield Finding(path, None, "does not belong beside result_0.txt to result_9.txt")
    bypasses = system.folder / BYPASSES
    if bypasses.is_file():
        words = " ".join(bypasses.read_text(errors="replace").split())
        yield warning(bypasses, None, f"asks the package checker to let things pass: {words}")


def check_scaling(system: System, score_factor: float) -> Iterator[Finding]:
    """Check that scaling.json, if there is one, agrees with the logs."""
    path = system.folder / "scaling.json"
    if not path.is_file():
        return
    try:
        factor = number(json.loads(path.read_text())["scaling_factor"])
    except (ValueError, KeyError, TypeError):
        factor = None
    if factor is None or abs(factor - score_factor) > 1e-6:
        yield Finding(path, None, f"scaling_factor {factor}, but the logs give {score_factor:.6f}")


def check_description(
    system: System, logs: list[ResultLog], organization: str
) -> Iterator[Finding]:
    """Check systems/NAME.json by itself, and against the directory and the logs."""
    path = system.description
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except FileNotFoundError:
        yield Finding(path, None, f"is missing: results/{system.name}/ needs its description")
        return
    except (OSError, ValueError) as error:
        yield Finding(path, None, f"cannot be read as JSON ({error})")
        return
    if not isinstance(content, dict):
        yield Finding(path, None, "is no JSON object")
        return
    yield from _fields(path, text, content)
    yield from _against_logs(path, text, content, logs)
    submitter = content.get("submitter")
    if isinstance(submitter, str) and submitter and submitter != organization:
        yield warning(
            path, _line(text, "submitter"),
            f"submitter is '{submitter}', but the directory is {organization}/",
        )  # fmt: skip


def _fields(path: Path, text: str, content: dict) -> Iterator[Finding]:
    for field in FIELDS:
        if field not in content:
            yield Finding(path, None, f"no field '{field}'")
            continue
        value, kind = content[field], dict if field == "other_software_stack" else str
        if not isinstance(value, kind):
            wanted = "an object" if kind is dict else "text in quotes"
            yield Finding(
                path, _line(text, field), f"'{field}' is {json.dumps(value)}, not {wanted}"
            )
        elif field in NEEDED_FIELDS and not value.strip():
            yield Finding(path, _line(text, field), f"'{field}' is blank")


def _against_logs(path: Path, text: str, content: dict, logs: list[ResultLog]) -> Iterator[Finding]:
    pairs = (
        ("division", "submission_division", {}),
        ("submitter", "submission_org", {}),
        ("status", "submission_status", STATUS_IN_DESCRIPTION),
    )
    for field, key, spelling in pairs:
        described = content.get(field)
        events = [(log, log.first(key)) for log in logs if log.first(key)]
        differing = [
            (log, event)
            for log, event in events
            if described not in (event.value, spelling.get(str(event.value), event.value))
        ]
        for log, event in differing:
            what = (
                f"{key} is {json.dumps(event.value)}, but {field} in {path.name} (line "
                f"{_line(text, field)}) is {json.dumps(described)}"
            )
            if field == "division" and described != "closed":
                what += ": MLPerf's package checker then skips the seed and RCP checks"
            yield Finding(log.path, event.line, what)


def _line(text: str, field: str) -> int | None:
    """The line of a field in a JSON file."""
    for line_number, line in enumerate(text.splitlines(), 1):
        if f'"{field}"' in line:
            return line_number
    return None
