"""What a check found, for people and for machines."""

from __future__ import annotations

from dataclasses import asdict, dataclass

OK, NOTE, PROBLEM = "OK", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """One line: `status` is OK, note (training starts all the same) or problem."""

    what: str
    status: str
    text: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        """what, status, text, fix."""
        return asdict(self)


def has_problem(findings: list[Finding]) -> bool:
    """Whether training could not start."""
    return any(finding.status == PROBLEM for finding in findings)


def describe(findings: list[Finding]) -> str:
    """A line a finding, its fix below it, and a verdict."""
    lines = []
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        first, *rest = finding.text.splitlines()
        lines.append(f"{finding.status:<7}  {finding.what:<{width}}  {first}")
        lines += [f"{'':<{width + 11}}{line}" for line in rest]
        if finding.fix:
            lines.append(f"{'':<{width + 11}}-> {finding.fix}")
    problems = sum(finding.status == PROBLEM for finding in findings)
    verdict = "Training can start." if not problems else "Training could not start."
    notes = sum(finding.status == NOTE for finding in findings)
    return "\n".join([*lines, "", f"{verdict} Problems: {problems}, notes: {notes}."])
