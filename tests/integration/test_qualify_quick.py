"""`qualify --quick` as a user calls it: all stages, the page, the figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bert_pretraining.qualify.stages import STAGES
from helpers import command


@pytest.mark.slow
def test_a_quick_qualification_of_this_machine(tmp_path: Path) -> None:
    """No stage fails; a busy machine may give notes."""
    words = ["qualify", "--quick", "--device", "cpu", "--output_dir", tmp_path / "out"]
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out/qualification.json").read_text())
    assert [stage["name"] for stage in found["stages"]] == [stage.name for stage in STAGES]
    assert found["verdict"] in ("pass", "note")
    page = (tmp_path / "out/qualification.html").read_text()
    assert all(stage.asks in page for stage in STAGES)
    again = command("qualify", "compare", *[tmp_path / "out/qualification.json"] * 2, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
