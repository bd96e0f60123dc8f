"""The result of a check, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass

OK, NOTE, PROBLEM = "OK", "note", "problem"


@dataclass(frozen=True)
class CheckResult:
    """The result of one check. `status`: OK, note (training can start) or problem (it cannot)."""

    what: str
    status: str
    text: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        """The fields what, status, text and fix."""
        return asdict(self)


def has_problem(results: list[CheckResult]) -> bool:
    """Whether training could not start."""
    return any(result.status == PROBLEM for result in results)


def describe(results: list[CheckResult]) -> str:
    """One line for each result, its fix below it, and the verdict at the end."""
    lines = []
    width = max(len(result.what) for result in results)
    for result in results:
        first, *rest = result.text.splitlines()
        lines.append(f"{result.status:<7}  {result.what:<{width}}  {first}")
        lines += [f"{'':<{width + 11}}{line}" for line in rest]
        if result.fix:
            lines.append(f"{'':<{width + 11}}-> {result.fix}")
    problems = sum(result.status == PROBLEM for result in results)
    verdict = "Training can start." if not problems else "Training could not start."
    notes = sum(result.status == NOTE for result in results)
    return "\n".join([*lines, "", f"{verdict} Problems: {problems}, notes: {notes}."])
