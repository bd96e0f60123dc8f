"""Launchers that have started this process already: torchrun, mpirun, Slurm. Pure.

Variables: torch.distributed's `env://` and torchrun; Open MPI's `mpirun`; MPICH's and Intel's
`mpiexec`; "OUTPUT ENVIRONMENT VARIABLES" of Slurm's srun manual.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bert_pretraining.errors import UserError

LOCAL_ADDRESS = "127.0.0.1"

# rank, ranks, rank on its machine, ranks on its machine
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
class Placed:
    """This process is one rank of a job that `launcher` has started."""

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


def placed_rank(environment: Mapping[str, str]) -> Placed | None:
    """The rank that this process already is; None if nobody has started ranks."""
    for launcher, names in _VARIABLES.items():
        if all(name in environment for name in names):
            rank, size, local, local_size = (int(environment[name]) for name in names)
            address = environment.get("MASTER_ADDR")
            if address is None and local_size == size:
                address = LOCAL_ADDRESS
            return Placed(launcher, rank, size, local, local_size, address)
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
    if tasks > nodes:
        return Placed(
            "Slurm",
            int(environment["SLURM_PROCID"]),
            tasks,
            int(environment["SLURM_LOCALID"]),
            # "8(x2)" or "8,4"; ranks on machines of different sizes have different places.
            _tasks_of_node(environment["SLURM_STEP_TASKS_PER_NODE"], environment["SLURM_NODEID"]),
            environment.get("MASTER_ADDR") or _first_host(environment),
        )
    return None


def slurm_node(environment: Mapping[str, str]) -> SlurmNode | None:
    """This machine's place in a Slurm step of one task a machine; None elsewhere."""
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
    if nodes < 2 or int(environment["SLURM_STEP_NUM_TASKS"]) != nodes:
        return None
    address = environment.get("MASTER_ADDR") or _first_host(environment)
    return SlurmNode(int(environment["SLURM_NODEID"]), address)


def check_size(placed: Placed, nnodes: int, nproc_per_node: int) -> None:
    """UserError unless the job is of the size that the configuration wants."""
    if (placed.world_size, placed.local_world_size) != (nnodes * nproc_per_node, nproc_per_node):
        machines = -(-placed.world_size // placed.local_world_size)
        raise UserError(
            f"{placed.launcher} has started {placed.world_size} ranks, {placed.local_world_size} "
            f"here, but the configuration wants {nnodes} x {nproc_per_node}: start as many, or "
            f"pass --nnodes {machines} --nproc_per_node {placed.local_world_size}"
        )
    if placed.master_addr is None:
        raise UserError(
            f"{placed.launcher} has started ranks on several machines, but MASTER_ADDR is not set: "
            "export it, the address of the first of them, to all ranks"
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
