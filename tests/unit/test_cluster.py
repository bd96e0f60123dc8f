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
    StartedMachine,
    check_size,
    external_rank,
    notices,
    started_machine,
    user_set_threads,
)
from bert_pretraining.runtime import rank_variables
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
    found = started_machine({**A_MACHINE, "SLURM_JOB_NODELIST": hosts})
    assert (found.node_rank, found.num_nodes, found.master_addr) == (2, 3, first)
    assert started_machine({**A_MACHINE, "MASTER_ADDR": "10.1.1.1"}).master_addr == "10.1.1.1"


# A PyTorchJob of Kubeflow's training operator with two pods, and one that knows the ranks a pod;
# a TrainJob of Kubeflow's trainer.
POD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
POD_OF_EIGHT = {**POD, "WORLD_SIZE": "16", "PET_NNODES": "2", "PET_NODE_RANK": "1",
                "PET_NPROC_PER_NODE": "8"}  # fmt: skip
TRAINER_POD = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "8",
               "PET_MASTER_ADDR": "job-master-0", "PET_MASTER_PORT": "23456"}  # fmt: skip


@pytest.mark.parametrize("pod", [POD, POD_OF_EIGHT, TRAINER_POD])
def test_a_pod_a_machine(pod: dict[str, str]) -> None:
    assert external_rank(pod) is None
    found = started_machine(pod)
    assert isinstance(found, StartedMachine)
    assert (found.node_rank, found.num_nodes) == (1, 2)
    assert (found.master_addr, found.master_port) == ("job-master-0", 23456)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        A_RANK,
        TORCHRUN,
        {**POD, **OPEN_MPI},
        {**TRAINER_POD, **TORCHRUN},
        {**POD, "RANK": "0", "WORLD_SIZE": "1"},
        {**POD, "LOCAL_RANK": "0"},
        {"SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_no_task_a_machine(environment: dict[str, str]) -> None:
    assert started_machine(environment) is None


def test_empty_variables_count_as_not_set() -> None:
    names = [*TORCHRUN, *OPEN_MPI, *A_RANK, *TRAINER_POD, "PMI_RANK", "PMI_SIZE", "OMP_NUM_THREADS"]
    for blank in ("", " "):
        environment = dict.fromkeys(names, blank)
        assert external_rank(environment) is None
        assert started_machine(environment) is None
        assert notices(environment) == []
        assert rank_variables.read(environment) == (0, 1, 0)
    assert external_rank({**OPEN_MPI, "MASTER_ADDR": ""}).master_addr == "127.0.0.1"


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "abc"}, r"RANK='abc' is not a whole number, 0 or more; run 'unset RANK'"),
        ({**TORCHRUN, "WORLD_SIZE": "-8"}, r"WORLD_SIZE='-8' is not a whole number"),
        ({**TORCHRUN, "LOCAL_RANK": "1.5"}, r"LOCAL_RANK='1.5' is not a whole number"),
        ({**TORCHRUN, "RANK": "8"}, r"RANK=8 is not below .*WORLD_SIZE=8.*unset RANK WORLD_SIZE'"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, r"LOCAL_RANK=4 is not below .*LOCAL_WORLD_SIZE=4"),
        ({**TORCHRUN, "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "7"}, "LOCAL_WORLD_SIZE=7 is more"),
        ({**POD, "RANK": "2"}, r"RANK=2 is not below .*WORLD_SIZE=2"),
        ({**POD, "MASTER_PORT": "99999"}, r"MASTER_PORT=99999 is no port, 1 to 65535"),
        ({**POD, "MASTER_PORT": "tcp://10.0.0.1:80"}, r"MASTER_PORT='tcp://10.0.0.1:80' is not a"),
        ({**TRAINER_POD, "PET_NNODES": "1:4"}, r"PET_NNODES=1:4 is of an elastic job, .*fixed"),
        ({"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "a:29400"}, r"NNODES=2 .* says which one; set"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, r"NUM_TASKS=8 .*SLURM_PROCID is not set; .*srun"),
        ({"SLURM_STEP_NUM_TASKS": "x"}, r"SLURM_STEP_NUM_TASKS='x' is not"),
        ({"SLURM_STEP_NUM_NODES": "2"}, r"NUM_NODES=2 .*SLURM_STEP_NUM_TASKS is not set"),
        ({**A_RANK, "SLURM_PROCID": "24"}, r"SLURM_PROCID=24 is not below .*NUM_TASKS=24"),
        ({**A_RANK, "SLURM_STEP_NUM_NODES": "32"}, "contradict each other; start with srun"),
        ({**A_RANK, "SLURM_NODEID": "3"}, r"PER_NODE=8\(x3\) names no tasks .*SLURM_NODEID=3"),
        ({**A_RANK, "SLURM_STEP_TASKS_PER_NODE": "?"}, r"TASKS_PER_NODE=\? names no tasks"),
        ({**A_MACHINE, "SLURM_NODEID": "3"}, r"SLURM_NODEID=3 is not below"),
        *[
            (without(A_RANK, name), f"{name} is not set; start with srun")
            for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID",
                         "SLURM_STEP_TASKS_PER_NODE")
        ],
        (without(A_RANK, "SLURM_JOB_NODELIST"), "SLURM_STEP_NODELIST is not set"),
        (without(A_MACHINE, "SLURM_JOB_NODELIST"), "SLURM_STEP_NODELIST is not set"),
        (without(A_MACHINE, "SLURM_NODEID"), "SLURM_NODEID is not set"),
        (
            without(OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK"),
            r"WORLD_SIZE=4 of Open MPI, but OMPI_COMM_WORLD_LOCAL_RANK is not set; .*unset",
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "MPI_LOCALRANKID and MPI_LOCALNRANKS are not set"),
    ],
)  # fmt: skip
def test_variables_that_contradict_each_other_are_refused(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        external_rank(environment)
        started_machine(environment)


def test_slurm_may_set_variables_of_mpi() -> None:
    assert external_rank({**A_RANK, "PMI_RANK": "19", "PMI_SIZE": "24"}).launcher == "Slurm"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            without(TORCHRUN, "LOCAL_WORLD_SIZE"),
            "ignoring RANK=5, WORLD_SIZE=8, LOCAL_RANK=1 of the environment, since "
            "LOCAL_WORLD_SIZE is not set: this launch starts all ranks itself",
        ),
        (
            {"RANK": "3"},
            "ignoring RANK=3 of the environment, since WORLD_SIZE and LOCAL_RANK and "
            "LOCAL_WORLD_SIZE are not set: this launch starts all ranks itself",
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "0"},
            "ignoring OMPI_COMM_WORLD_RANK=0 of the environment: this launch starts all ranks "
            "itself",
        ),
        (
            {"NODE_RANK": "1", "NNODES": "2", "MV2_COMM_WORLD_RANK": "0"},
            "ignoring MV2_COMM_WORLD_RANK=0, NODE_RANK=1 of the environment: this launch starts "
            "all ranks itself",
        ),
        (
            {"OMP_NUM_THREADS": "abc"},
            "ignoring OMP_NUM_THREADS=abc of the environment, which is no number of threads, 1 or "
            "more: each rank gets as many as its CPUs",
        ),
    ],
)
def test_what_is_ignored_is_said(environment: dict[str, str], said: str) -> None:
    assert notices(environment) == [said]


@pytest.mark.parametrize(
    "environment", [{}, TORCHRUN, POD, A_RANK, {"RANK": "0", "WORLD_SIZE": "1"},
                    {"NODE_RANK": "0", "NNODES": "1"}, {"PET_NNODES": "1:1"},
                    {"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"},
                    {"OMP_NUM_THREADS": "4,2"}],
)  # fmt: skip
def test_variables_that_are_right_need_no_word(environment: dict[str, str]) -> None:
    assert notices(environment) == []


def test_the_debug_mode_of_pytorch_is_said() -> None:
    for value, count in (("DETAIL", 1), ("detail", 1), ("INFO", 0), ("OFF", 0), ("", 0)):
        found = notices({"TORCH_DISTRIBUTED_DEBUG": value})
        assert len(found) == count
        assert all("DistributedDataParallel" in notice for notice in found)


def test_a_rank_of_its_own_launcher_reads_its_variables() -> None:
    assert rank_variables.read({}) == (0, 1, 0)
    assert rank_variables.read(TORCHRUN) == (5, 8, 1)
    for environment, message in (
        ({"RANK": "3"}, "RANK=3 is not below the number of them .WORLD_SIZE is not set"),
        (without(TORCHRUN, "MASTER_ADDR"), "WORLD_SIZE=8 is set, but MASTER_ADDR is not"),
        (without(TORCHRUN, "MASTER_PORT"), "WORLD_SIZE=8 is set, but MASTER_PORT is not"),
    ):
        with pytest.raises(UserError, match=message):
            rank_variables.read(environment)


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
    for wrong in ("", "abc", "0", "-3", "1.5"):
        assert not user_set_threads({"OMP_NUM_THREADS": wrong})
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
