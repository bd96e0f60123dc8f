"""Jobs that another launcher has started are recognised, and joined."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bert_pretraining.errors import UserError
from bert_pretraining.launch.cluster import (
    ExternalRank,
    SlurmNode,
    check_size,
    external_rank,
    slurm_node,
    user_set_threads,
)
from helpers import ROOT
from launching import in_the_trainers_place

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}  # fmt: skip
# srun --ntasks-per-node 1 and --ntasks-per-node 8, on machines gpu07, gpu08, gpu09
SLURM = {"SLURM_JOB_NODELIST": "gpu[07-09]", "SLURM_STEP_NUM_NODES": "3", "SLURM_NODEID": "2"}
A_MACHINE = {**SLURM, "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
             "SLURM_STEP_TASKS_PER_NODE": "1(x3)"}  # fmt: skip
A_RANK = {**SLURM, "SLURM_STEP_NUM_TASKS": "24", "SLURM_PROCID": "19", "SLURM_LOCALID": "3",
          "SLURM_STEP_TASKS_PER_NODE": "8(x3)"}  # fmt: skip


def test_ranks_that_were_started() -> None:
    assert external_rank({}) is None
    assert external_rank({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert external_rank(TORCHRUN) == ExternalRank("torchrun", 5, 8, 1, 4, "10.0.0.1")
    assert external_rank(OPEN_MPI) == ExternalRank("Open MPI", 3, 4, 3, 4, "127.0.0.1")
    assert external_rank(A_RANK) == ExternalRank("Slurm", 19, 24, 3, 8, "gpu07")
    assert external_rank(A_MACHINE) is None
    uneven = {**A_RANK, "SLURM_STEP_TASKS_PER_NODE": "9(x2),6"}
    assert external_rank(uneven).local_world_size == 6


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("gpu07", "gpu07"), ("gpu[07-09,12]", "gpu07"), ("a,b", "a"), ("r[1,3]-ib", "r1-ib")],
)
def test_a_task_a_machine(hosts: str, first: str) -> None:
    assert slurm_node({**A_MACHINE, "SLURM_JOB_NODELIST": hosts}) == SlurmNode(2, first)
    assert slurm_node({**A_MACHINE, "MASTER_ADDR": "10.1.1.1"}) == SlurmNode(2, "10.1.1.1")


@pytest.mark.parametrize("environment", [{}, A_RANK, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_no_task_a_machine(environment: dict[str, str]) -> None:
    assert slurm_node(environment) is None


def test_a_job_of_another_size_is_refused() -> None:
    check_size(external_rank(TORCHRUN), 2, 4)
    message = (
        r"torchrun has started 8 ranks, 4 of them on this machine, .* wants 1 x 8; .*pass "
        r"--nnodes 2 --nproc_per_node 4$"
    )
    with pytest.raises(UserError, match=message):
        check_size(external_rank(TORCHRUN), 1, 8)
    lost = {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "8"}
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        check_size(external_rank(lost), 2, 4)


def test_one_thread_under_torchrun_is_not_the_users() -> None:
    by_torchrun = {**TORCHRUN, "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
    assert not user_set_threads(by_torchrun)
    assert not user_set_threads(TORCHRUN)
    assert user_set_threads({**by_torchrun, "OMP_NUM_THREADS": "2"})
    assert user_set_threads({**by_torchrun, "LOCAL_WORLD_SIZE": "1"}), "torchrun leaves it alone"
    assert user_set_threads({"OMP_NUM_THREADS": "1"})
    assert user_set_threads({**OPEN_MPI, "OMP_NUM_THREADS": "1"})


# A program in the trainer's place, which tells what the trainer would have got.
TELLING = "tell(f'rank{rank}', os.environ['OMP_NUM_THREADS'] + ' ' + ' '.join(sys.orig_argv[5:]))"


def torchrun(environment: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    """`launch` as two ranks that torchrun starts."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "bert_pretraining", "launch", *map(str, words)],
        env=environment, cwd=environment["TEST_HERE"], capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def test_ranks_without_flags_make_the_mini_data_once(tmp_path: Path) -> None:
    environment = in_the_trainers_place(tmp_path, TELLING)
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = torchrun(environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training and") == 1, "one rank makes it, the other waits for it"
    assert [path.name for path in tmp_path.glob("data/datasets/[!.]*")] == ["bert_mini"]
    assert (tmp_path / "rank0").exists()
    assert (tmp_path / "rank1").exists()


def test_threads_of_ranks_under_torchrun(
    mini_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = in_the_trainers_place(tmp_path, TELLING)
    flags = ["--name", "mini", "--config", "CPUx1x2", "--device", "cpu", "--data_dir", mini_data]
    done = torchrun(environment, *flags, "--threads", 3, "--exit_zero_without_target")
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        threads, *words = (tmp_path / f"rank{rank}").read_text().split()
        assert threads == "3", "not the 1 that torchrun exports"
        assert words[-1] == "--exit_zero_without_target"


def test_training_under_torchrun(mini_data: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "bert_pretraining", "launch", "--name", "mini", "--config", "CPUx1x2", "--device",
         "cpu", "--data_dir", str(mini_data), "--max_steps", "2", "--exit_zero_without_target"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "base")}, cwd=tmp_path, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Started by torchrun: no launcher of its own") == 1
    assert "| CPU x2 |" in done.stdout
