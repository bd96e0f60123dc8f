"""Every command that reads a file ends in one line, whatever kind of file it gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from bad_files import COMMANDS, faults_of
from bad_kinds import CONTENTS, KINDS, good_files

# Kinds with which a command does not end rightly today -> why.
TAKEN_AS_TEXT = dict.fromkeys(
    ("web page", "LFS pointer", "tar", "Parquet"), "taken for text, as its bytes are UTF-8"
)
UNNAMED = "the error speaks of the text and does not name the file"
FEW_DOCUMENTS = (
    "empty", "zeros", "cut in the middle", "its first 100 bytes", "plain text", "web page", "XML",
    "JSON list", "LFS pointer", "tar", "Parquet", "pipe",
)  # fmt: skip
KNOWN: dict[str, dict[str, str]] = {
    "data create-examples --vocab": {"tar": TAKEN_AS_TEXT["tar"]},
    "data create-examples": TAKEN_AS_TEXT,
    "data prepare --eval_text": {**TAKEN_AS_TEXT},
    "data prepare --text_dir": TAKEN_AS_TEXT,
    "data make-mini --text": {**dict.fromkeys(FEW_DOCUMENTS, UNNAMED)},
    "report": {"link to itself": "Path.resolve() raises RuntimeError before Python 3.13"},
}


@pytest.fixture(scope="module")
def good(mini_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_files(tmp_path_factory.mktemp("sweep"), mini_data)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_in_one_line_with_every_kind_of_bad_file(
    name: str, good: Path, tmp_path: Path
) -> None:
    if name == "report":
        pytest.importorskip("matplotlib", reason="the report needs matplotlib")
    found = faults_of(name, good, tmp_path)
    known = KNOWN.get(name, {})
    assert {kind: fault for kind, fault in found.items() if kind not in known} == {}
    assert set(known) <= set(found), "it ends rightly now: take it out of KNOWN"


def test_the_sweep_is_as_wide_as_it_says() -> None:
    assert len(COMMANDS) >= 25
    assert len(KINDS) >= 30
    assert set(KNOWN) <= set(COMMANDS)
    assert set(CONTENTS) < set(KINDS)
