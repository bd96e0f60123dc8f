"""MLPerf's own checkers, run as subprocesses, and their messages as findings.

Most of them exit with 0 whatever they find, so their words decide.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.submission.findings import Finding, warning
from bert_pretraining.submission.rulesets import missing
from bert_pretraining.submission.tree import System

PACKAGE_SUCCESS = "PACKAGE CHECKER FOUND NO ERRORS, SUCCESS !"
REPOSITORY_SUCCESS = "ALL CHECKS PASSED"
SYSTEM_SUCCESS = "System description checker passed"
FIRST_REPOSITORY_RULESET = "2.0.0"  # its checks are the same for all of them
SEPARATOR = "\n" + "-" * 30 + "\n"
# Messages of the package checker that our own checks or the other tools give more precisely.
REPEATED = ("Seed checker failed and found", "System description")


@dataclass(frozen=True)
class Verdict:
    """The verdict of one of MLPerf's tools: a short `summary`, and its findings."""

    tool: str
    passed: bool
    summary: str
    findings: list[Finding]


@dataclass(frozen=True)
class _Answer:
    exit_code: int
    records: list[tuple[str, str]]  # (INFO, WARNING or ERROR; text of one or more lines)
    crash: str | None  # last line of a traceback


def compliance(systems: list[System], ruleset: str) -> Verdict:
    """Run the compliance checker on every log."""
    paths = [path for system in systems for path in system.result_paths]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        answers = list(pool.map(lambda path: _run_compliance(path, ruleset), paths))
    passed = sum(answer.exit_code == 0 for answer in answers)
    findings = [
        finding
        for path, answer in zip(paths, answers, strict=True)
        for finding in _compliance_findings(path, answer)
    ]
    summary = f"{passed} of {len(paths)} logs pass"
    return Verdict("compliance checker", passed == len(paths), summary, findings)


def package(folder: Path, ruleset: str) -> Verdict:
    """Run the package checker (number of logs, seeds, RCP, system descriptions).

    It writes scaling.json beside the logs, so it sees a copy of links.
    """
    with tempfile.TemporaryDirectory(prefix="bert_pretraining_") as temporary:
        copy = Path(temporary) / "ORG"
        for part in ("systems", "results"):
            if (folder / part).is_dir():
                shutil.copytree(
                    (folder / part).resolve(), copy / part, copy_function=os.symlink,
                    ignore=shutil.ignore_patterns("scaling.json"),
                )  # fmt: skip
        answer = _run("package_checker", str(copy), "training", ruleset)
        findings = []
        where = folder
        for level, text in answer.records:
            words = " ".join(text.replace(str(copy), str(folder)).split())
            if level == "INFO" and words.startswith("Running compliance checks in dir "):
                where = Path(words.removeprefix("Running compliance checks in dir "))
            if level == "ERROR" and not words.startswith(REPEATED):
                findings.append(Finding(where, None, f"package checker: {words}"))
    passed = answer.exit_code == 0 and any(PACKAGE_SUCCESS in text for _, text in answer.records)
    if answer.crash:
        crash = answer.crash.replace(str(copy), str(folder))
        findings.append(Finding(where, None, f"package checker crashed: {crash}"))
    basis = [text for _, text in answer.records if text.startswith("RCP Test Passed")]
    summary = f"no errors ({'; '.join(basis)})" if basis else "no errors (no RCP test)"
    return Verdict("package checker", passed, summary if passed else "errors", findings)


def repository(folder: Path, ruleset: str) -> Verdict:
    """Run the repo checker: file names that git refuses, large files, broken links."""
    version = max(ruleset, FIRST_REPOSITORY_RULESET)
    answer = _run("repo_checker", str(folder), "training", version)
    passed = answer.exit_code == 0 and any(REPOSITORY_SUCCESS in text for _, text in answer.records)
    findings = []
    for level, text in answer.records:
        paths = [line for line in re.findall(r"(\S.*)", text) if str(folder) in line]
        for line in paths if level == "ERROR" else []:
            reason, _, name = line.rpartition(": ")
            reason = reason or findings[-1].what.removeprefix("repo checker: ")
            findings.append(Finding(Path(name.strip()), None, f"repo checker: {reason}"))
    if answer.crash:
        findings.append(Finding(folder, None, f"repo checker crashed: {answer.crash}"))
    return Verdict("repo checker", passed, "passed" if passed else "failed", findings)


def description(systems: list[System], ruleset: str) -> Verdict:
    """Run the system description checker on every system's JSON file."""
    findings, passed = [], 0
    paths = [system.description for system in systems if system.description.is_file()]
    for path in paths:
        answer = _run("system_desc_checker", str(path), "training", ruleset)
        good = answer.exit_code == 0 and any(SYSTEM_SUCCESS in text for _, text in answer.records)
        passed += good
        for level, text in answer.records:
            if level == "ERROR":
                reason = " ".join(text.split()).removeprefix("System description checker ")
                findings.append(Finding(path, None, f"system description checker: {reason}"))
        if answer.crash:
            what = f"system description checker crashed: {answer.crash}"
            findings.append(Finding(path, None, what))
    summary = f"{passed} of {len(systems)} pass"
    return Verdict("system descriptions", passed == len(paths), summary, findings)


def _run_compliance(path: Path, ruleset: str) -> _Answer:
    return _run("compliance_checker", "--usage", "training", "--ruleset", ruleset, str(path))


def _run(tool: str, *arguments: str) -> _Answer:
    done = subprocess.run(
        [sys.executable, "-m", f"mlperf_logging.{tool}", *arguments, "--log_output", os.devnull],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    lacking = re.search(r"^ModuleNotFoundError: No module named '(\w+)", done.stderr, re.M)
    if lacking:
        raise missing(lacking[1])
    crash = None
    if done.returncode and "Traceback (most recent call last)" in done.stderr:
        crash = done.stderr.strip().splitlines()[-1]
    parts = re.split(r"^(INFO|WARNING|ERROR) - ", done.stderr, flags=re.M)[1:]
    records = [(level, text.strip()) for level, text in zip(parts[::2], parts[1::2], strict=True)]
    return _Answer(done.returncode, records, crash)


def _compliance_findings(path: Path, answer: _Answer) -> list[Finding]:
    """One finding for each message; the checker puts them all into one warning."""
    make = warning if answer.exit_code == 0 else Finding
    found = []
    for level, text in answer.records:
        if level != "WARNING" or text.startswith(("Found parsing errors", ":::MLLOG", "^^")):
            continue
        for message in text.split(SEPARATOR):
            found.append(make(path, _line_of(path, message), f"compliance checker: "
                                                             f"{_gist(message)}"))  # fmt: skip
    if answer.crash:
        found.append(Finding(path, None, f"compliance checker crashed: {answer.crash}"))
    if answer.exit_code and not found:
        found.append(Finding(path, None, "compliance checker: failed without a reason"))
    return found


def _gist(message: str) -> str:
    """The line of a message that names the problem."""
    lines = [line.strip() for line in message.strip().splitlines()]
    failed = [line for line in lines if line.startswith("failed test: ")]
    key = re.match(r"CHECK for '(\w+)'", lines[0])
    if failed:
        test = failed[0] if len(failed[0]) < 200 else f"{failed[0][:200]} ..."
        return f"'{key[1]}' {test}" if key else test
    if lines[0].startswith("Failed executing CHECK") and len(lines) > 1:
        return f"cannot evaluate: {lines[1]}"
    return lines[0]


def _line_of(path: Path, message: str) -> int | None:
    """The line of the file that a message quotes."""
    quoted = re.search(r"^:::MLLOG .*$", message, re.M)
    if quoted is None:
        return None
    with open(path, encoding="latin-1") as file:
        for line_number, line in enumerate(file, 1):
            if quoted[0].strip() in line:
                return line_number
    return None
