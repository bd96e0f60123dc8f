"""`submission check`: MLPerf's checkers, checks of what they miss, and one verdict."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.runtime.files import real
from bert_pretraining.runtime.words import counted
from bert_pretraining.submission import official
from bert_pretraining.submission.findings import Finding, warning
from bert_pretraining.submission.log_checks import check_log
from bert_pretraining.submission.official import Verdict
from bert_pretraining.submission.rulesets import DEFAULT_RULESET, mlperf_directory, require_ruleset
from bert_pretraining.submission.score import score
from bert_pretraining.submission.series_checks import check_copies, check_series
from bert_pretraining.submission.system_checks import (
    check_description,
    check_folder,
    check_scaling,
    check_tree,
    read_logs,
)
from bert_pretraining.submission.tree import ResultLog, System, systems

OWN = "own checks"


@dataclass(frozen=True)
class CheckReport:
    """All findings, errors first, and the verdict of each tool."""

    folder: Path
    ruleset: str
    verdicts: list[Verdict]
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        return not any(finding.is_error for finding in self.findings)

    def describe(self) -> str:
        """The report as text: the findings, a table of the tools, and the verdict."""
        errors = sum(finding.is_error for finding in self.findings)
        warnings = len(self.findings) - errors
        counts = f"{counted(errors, 'error')}, {counted(warnings, 'warning')}"
        verdict = "passes" if self.passed else "does not pass"
        return "\n".join(
            [
                *map(str, self.findings),
                *(f"{verdict.tool:<22} {verdict.summary}" for verdict in self.verdicts),
                f"{self.folder} {verdict} ruleset {self.ruleset}: {counts}",
            ]
        )

    def to_json(self) -> dict:
        """The report as a JSON object."""
        return {
            "folder": str(self.folder),
            "ruleset": self.ruleset,
            "passed": self.passed,
            "tools": {
                verdict.tool: {"passed": verdict.passed, "summary": verdict.summary}
                for verdict in self.verdicts
            },
            "findings": [
                {**dataclasses.asdict(finding), "path": str(finding.path)}
                for finding in self.findings
            ],
        }


def check(folder: Path, ruleset: str = DEFAULT_RULESET) -> CheckReport:
    """Check a submission's tree, without changing it.

    Raises UserError for a directory that holds no results/, a ruleset without BERT, or a
    machine without MLPerf's tools.
    """
    require_ruleset(ruleset)
    mlperf_directory()
    found = systems(folder)
    own, failed = own_findings(folder, found, ruleset)
    verdicts = [
        official.compliance(found, ruleset),
        official.package(folder, ruleset),
        official.repository(folder, ruleset),
        official.description(found, ruleset),
        Verdict(OWN, not any(each.is_error for each in own), counted(len(own), "finding"), own),
    ]
    findings = []
    for verdict in verdicts:
        if not verdict.passed and not verdict.findings:
            what = f"{verdict.tool}: {verdict.summary}, but it does not say why"
            findings.append(Finding(folder, None, what))
        findings += verdict.findings
    findings = [_tolerated(finding, failed) for finding in dict.fromkeys(findings)]
    findings.sort(key=lambda each: (not each.is_error, str(each.path), each.line or 0))
    return CheckReport(folder, ruleset, verdicts, findings)


def own_findings(
    folder: Path, found: list[System], ruleset: str
) -> tuple[list[Finding], set[Path]]:
    """The findings that MLPerf's tools miss, and the logs of tolerated unconverged runs."""
    findings, failed = [*check_tree(folder, found)], set()
    everything: list[ResultLog] = []
    for system in found:
        logs, unreadable = read_logs(system)
        everything += logs
        findings += [*unreadable, *check_folder(system)]
        for log in logs:
            findings += check_log(log, ruleset)
        findings += check_series(system, logs, ruleset)
        findings += check_description(system, logs, real(folder).name)
        findings += check_scaling(system, score(logs, ruleset).scale_factor)
        unconverged = {log.path for log in logs if log.status != "success"}
        failed |= unconverged if len(unconverged) == 1 else set()
    findings += check_copies(everything)
    return findings, failed


def _tolerated(finding: Finding, failed: set[Path]) -> Finding:
    """The finding as a warning if it concerns the one run that is allowed not to converge."""
    excusable = finding.what.startswith(("compliance checker: ", "no run_stop"))
    if finding.is_error and finding.path in failed and excusable:
        return warning(finding.path, finding.line, finding.what)
    return finding
