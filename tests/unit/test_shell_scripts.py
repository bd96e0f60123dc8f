"""Rules of the shell scripts that no linter here knows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from helpers import ROOT

SCRIPTS = sorted(
    path
    for pattern in ("*.sh", "*/*.sh", "examples/*.sbatch", ".ci/run")
    for path in ROOT.glob(pattern)
    if not path.relative_to(ROOT).parts[0].startswith(".venv")
)
EXPANSION = re.compile(r'(?<!\+)"\$\{(\w+)\[@\]\}"')


def unguarded(text: str) -> list[str]:
    """Arrays that may be empty and are expanded without a guard.

    Before bash 4.4, `set -u` calls "${a[@]}" of an empty array an unbound variable;
    ${a[@]+"${a[@]}"} is right in every version.
    """
    empty = set(re.findall(r"^\s*(?:local )?(?:-\w+ )?(\w+)=\(\)", text, re.MULTILINE))
    empty |= set(re.findall(r"read -r?a (\w+)", text))
    return [name for name in EXPANSION.findall(text) if name in empty]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_they_are_sound(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert unguarded(path.read_text()) == []


def test_the_rule_finds_what_breaks_it() -> None:
    assert unguarded('a=()\nrun "${a[@]}" ${a[@]+"${a[@]}"}\nb=("$@" x)\nrun "${b[@]}"\n') == ["a"]
