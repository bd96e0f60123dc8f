"""Files of the user that are called like modules: where one stands, and in PYTHONPATH."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

NAMES = ["queue", "random", "torch", "numpy", "string", "tempfile", "typing", "data", "config"]


def command(folder: Path, path: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.run(
        [sys.executable, "-m", "bert_pretraining", *words], cwd=folder, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_files_where_one_stands_hide_nothing(mini_data: Path, tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    done = command(tmp_path, str(ROOT / "base"), "data", "verify", str(mini_data))
    assert done.returncode == 0, done.stderr
    # The ranks and the processes that they start stand there too.
    flags = ["--name", "mini", "--config", "CPUx1x2", "--device", "cpu", "--max_steps", "1",
             "--train_batch_size", "8", "--num_eval_examples", "8"]  # fmt: skip
    done = command(tmp_path, str(ROOT / "base"), "launch", *flags, "--data_dir", str(mini_data))
    assert done.returncode == 3, done.stderr


@pytest.mark.parametrize("name", ["queue", "random", "torch", "numpy"])
def test_a_file_in_pythonpath_that_hides_a_module_is_named(
    mini_data: Path, tmp_path: Path, name: str
) -> None:
    file = tmp_path / f"{name}.py"
    file.write_text("x = 1\n")
    path = f"{tmp_path}:{ROOT / 'base'}"
    done = command(ROOT, path, "checkpoint", "inspect", f"{mini_data}/model.ckpt-28252.apex.pt")
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"Error: {file} hides the module {name}, which this program needs; rename that file, or "
        "take its folder out of PYTHONPATH\n"
    )
