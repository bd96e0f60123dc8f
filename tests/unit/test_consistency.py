"""The consistency check notices any change of the package's code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bert_pretraining.runtime import consistency
from helpers import ROOT

PACKAGE = ROOT / "base" / "bert_pretraining"


def digest_of(base: Path) -> str:
    """What the package in `base` says of its own code."""
    program = (
        "from bert_pretraining.runtime import consistency\n"
        "print(consistency.__file__, consistency.describe({})[consistency.CODE])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(base)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    path, digest = done.stdout.split()
    assert Path(path).is_relative_to(base)
    return digest


def test_any_change_of_the_code_is_noticed(tmp_path: Path) -> None:
    copy = tmp_path / "bert_pretraining"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    unchanged = digest_of(tmp_path)
    assert unchanged == consistency.describe({})[consistency.CODE]
    # One module of each folder, nested ones too, and one of the root.
    modules = {path.parent: path for path in sorted(copy.rglob("*.py"))}
    assert {copy, copy / "logs" / "reading"} <= modules.keys()
    for path in modules.values():
        before = path.read_bytes()
        path.write_bytes(before + b"# changed\n")
        assert digest_of(tmp_path) != unchanged, path
        path.write_bytes(before)
    (copy / "kernels" / "new.py").touch()
    assert digest_of(tmp_path) != unchanged, "one module more"
    (copy / "kernels" / "new.py").unlink()
    assert digest_of(tmp_path) == unchanged
