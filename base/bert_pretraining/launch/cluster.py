"""The cluster environment: what torchrun, mpirun or Slurm say about this process. Pure.

Variables: torch.distributed's `env://` and torchrun; Open MPI's `mpirun`; MPICH's and Intel's
`mpiexec`; "OUTPUT ENVIRONMENT VARIABLES" of Slurm's srun manual.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bert_pretraining.errors import UserError

LOCAL_ADDRESS = "127.0.0.1"

# Launcher -> its variables for rank, ranks, rank on its machine, ranks on its machine.
_VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


@dataclass(frozen=True)
class ExternalRank:
    """This process is one rank of a job whose ranks another launcher has started."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str | None


@dataclass(frozen=True)
class SlurmNode:
    """This process is to start all ranks of one machine of a Slurm job."""

    node_rank: int
    master_addr: str


def external_rank(environment: Mapping[str, str]) -> ExternalRank | None:
    """The rank that this process is; None if no other launcher has started it as one."""
    for launcher, names in _VARIABLES.items():
        if all(name in environment for name in names):
            rank, size, local, local_size = (int(environment[name]) for name in names)
            address = environment.get("MASTER_ADDR")
            if address is None and local_size == size:
                address = LOCAL_ADDRESS
            return ExternalRank(launcher, rank, size, local, local_size, address)
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
    if tasks > nodes:
        return ExternalRank(
            "Slurm",
            int(environment["SLURM_PROCID"]),
            tasks,
            int(environment["SLURM_LOCALID"]),
            # "8(x2)" or "8,4": machines may have different numbers of ranks.
            _tasks_of_node(environment["SLURM_STEP_TASKS_PER_NODE"], environment["SLURM_NODEID"]),
            environment.get("MASTER_ADDR") or _first_host(environment),
        )
    return None


def slurm_node(environment: Mapping[str, str]) -> SlurmNode | None:
    """This machine's number in a Slurm step of one task a machine; None elsewhere."""
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
    if nodes < 2 or int(environment["SLURM_STEP_NUM_TASKS"]) != nodes:
        return None
    address = environment.get("MASTER_ADDR") or _first_host(environment)
    return SlurmNode(int(environment["SLURM_NODEID"]), address)


def user_set_threads(environment: Mapping[str, str]) -> bool:
    """Whether OMP_NUM_THREADS is there because the user exported it.

    torchrun exports OMP_NUM_THREADS=1 to its ranks when the user has not set the variable and it
    starts more than one rank on the machine. A 1 under torchrun is therefore taken for
    torchrun's own. A user who wants one thread there passes --threads 1.
    """
    threads = environment.get("OMP_NUM_THREADS")
    several = environment.get("LOCAL_WORLD_SIZE", "1") != "1"
    by_torchrun = threads == "1" and "TORCHELASTIC_RUN_ID" in environment and several
    return threads is not None and not by_torchrun


def check_size(started: ExternalRank, nnodes: int, nproc_per_node: int) -> None:
    """Raise UserError unless the job has as many ranks as the configuration wants."""
    launcher, here = started.launcher, started.local_world_size
    if (started.world_size, here) != (nnodes * nproc_per_node, nproc_per_node):
        raise UserError(
            f"{launcher} has started {started.world_size} ranks, {here} of them on this machine, "
            f"but the configuration wants {nnodes} x {nproc_per_node}",
            f"start as many, or pass --nnodes {-(-started.world_size // here)} "
            f"--nproc_per_node {here}",
        )
    if started.master_addr is None:
        raise UserError(
            f"{launcher} has started ranks on several machines, but MASTER_ADDR is not set",
            "export MASTER_ADDR, the address of the first machine, to all ranks",
        )


def _first_host(environment: Mapping[str, str]) -> str:
    """ "gpu[07-09,12]" -> "gpu07"."""
    hosts = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", hosts)
    return "".join(part or "" for part in found.groups()) if found else LOCAL_ADDRESS


def _tasks_of_node(tasks_per_node: str, node: str) -> int:
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        counts += [int(count)] * int(times or 1)
    return counts[int(node)]
