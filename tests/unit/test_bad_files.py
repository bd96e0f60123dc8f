"""Every command that reads a file ends in one line, whatever kind of file it gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from bad_files import COMMANDS, faults_of
from bad_kinds import CONTENTS, KINDS, good_files


@pytest.fixture(scope="module")
def good(mini_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_files(tmp_path_factory.mktemp("sweep"), mini_data)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_in_one_line_with_every_kind_of_bad_file(
    name: str, good: Path, tmp_path: Path
) -> None:
    if name == "report":
        pytest.importorskip("matplotlib", reason="the report needs matplotlib")
    assert faults_of(name, good, tmp_path) == {}


def test_the_sweep_is_as_wide_as_it_says() -> None:
    assert len(COMMANDS) >= 25
    assert len(KINDS) >= 30
    assert set(CONTENTS) < set(KINDS)
