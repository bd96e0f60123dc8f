"""What examples/ says works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

# A Slurm of two machines: srun's flags are dropped, the rest runs once for each of them.
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do echo "$1" >>"$SRUN_FLAGS"; shift; done
for node in 0 1; do
    SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 SLURM_STEP_NUM_NODES=2 \\
        SLURM_STEP_NUM_TASKS=2 "$@" || exit
done
"""


def run(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_slurm_script_starts_both_machines(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    done = run(
        "bash", ROOT / "examples" / "train.sbatch", "--dry_run", cwd=tmp_path,
        PATH=f"{tmp_path}:{os.environ['PATH']}", SRUN_FLAGS=str(tmp_path / "flags"),
        SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="71234", SLURM_JOB_NODELIST="gpu[3-4]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for machine in (0, 1):
        assert f"# 16 ranks: 2 machines x 8; this is machine {machine}" in done.stdout
        assert f"RANK={8 * machine + 7} LOCAL_RANK=7" in done.stdout
    assert done.stdout.count("MASTER_ADDR=gpu3 MASTER_PORT=21234 WORLD_SIZE=16") == 2
    assert "--kill-on-bad-exit=0" in (tmp_path / "flags").read_text().split()


@pytest.mark.slow
def test_the_smoke_test(tmp_path: Path) -> None:
    script = ROOT / "examples" / "smoke_test.sh"
    done = run("bash", script, "--max_steps", 5, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stdout.splitlines()[-1] == "Smoke test passed."
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


# Runs here what would run there, in its own folder; "-n -o OPTION HOST COMMAND" comes in.
SSH = """#!/bin/sh
echo "$4" >>"$SSH_HOSTS"
cd / && exec sh -c "$5"
"""


def test_the_ssh_script_starts_all_machines(tmp_path: Path) -> None:
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    folder = tmp_path / "a folder"
    folder.mkdir()
    done = run(
        "bash", ROOT / "examples" / "train_ssh.sh", "gpu4", "--name", "iluvatar", "--config",
        "V100x2x8", "--output_dir", "two words", "--dry_run", cwd=folder,
        PATH=f"{tmp_path}:{os.environ['PATH']}", SSH_HOSTS=str(tmp_path / "hosts"),
        MASTER_ADDR="127.0.0.2", MASTER_PORT="21234",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hosts").read_text() == "gpu4\n"
    for machine in (0, 1):
        assert f"# 16 ranks: 2 machines x 8; this is machine {machine}" in done.stdout
    assert done.stdout.count("MASTER_ADDR=127.0.0.2 MASTER_PORT=21234 WORLD_SIZE=16") == 2
    assert done.stdout.count('output_dir = "two words"') == 2
