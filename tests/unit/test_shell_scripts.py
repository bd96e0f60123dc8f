"""Rules of the shell scripts that no linter here knows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a link to the launcher, and one that CDPATH would lead to."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "train").symlink_to(ROOT / "run_training.sh")
    (folder / "other" / ROOT.name).mkdir(parents=True)
    return folder


@pytest.mark.parametrize("shell", ["sh", "bash", "bash --posix"])
def test_the_launcher_runs_from_anywhere_and_under_any_shell(elsewhere: Path, shell: str) -> None:
    """By a link or a relative path, without variables, and in spite of CDPATH."""
    flags = ["--name", "mini", "--config", "CPUx1x1", "--dry_run"]
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable}
    for script, folder, more in (
        ("./train", elsewhere, {}),
        (f"{ROOT.name}/run_training.sh", ROOT.parent, {"CDPATH": str(elsewhere / "other")}),
    ):
        done = subprocess.run(
            [*shell.split(), script, *flags], cwd=folder, env={**environment, **more},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "1 machine x 1" in done.stdout


STARTED = [path for path in SCRIPTS if path.name not in ("environment.sh", "train.sbatch")]


@pytest.mark.parametrize("path", STARTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_starts_itself_in_bash_and_knows_where_it_is(path: Path) -> None:
    text = path.read_text()
    first = next(line for line in text.splitlines() if line and not line.startswith("#"))
    assert first.startswith('[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"')
    assert 'dirname "${BASH_SOURCE' not in text, "a link would lead to another folder"


def test_the_rule_finds_what_breaks_it() -> None:
    assert unguarded('a=()\nrun "${a[@]}" ${a[@]+"${a[@]}"}\nb=("$@" x)\nrun "${b[@]}"\n') == ["a"]
