"""The cluster environment: what torchrun, mpirun, Slurm or Kubernetes say about this process. Pure.

Variables: torch.distributed's `env://` and torchrun; Open MPI's `mpirun`; MPICH's and Intel's
`mpiexec`; "OUTPUT ENVIRONMENT VARIABLES" of Slurm's srun manual; Kubeflow's PyTorchJob and
TrainJob. They may be left over in a shell: those that contradict each other are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bert_pretraining.errors import UserError
from bert_pretraining.launch.network import LOCAL_ADDRESS
from bert_pretraining.runtime import torch_variables
from bert_pretraining.runtime.rank_variables import check_below, port, text, whole_number
from bert_pretraining.runtime.words import counted

# Launcher -> its variables for rank, ranks, rank on its machine, ranks on its machine.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_VARIABLES = {
    "torchrun": _TORCHRUN,
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
# Ranks of launchers that are not known here, or without their other variables -> number of ranks.
_FOREIGN = {
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",
    "PMI_RANK": "PMI_SIZE",
    "MV2_COMM_WORLD_RANK": "MV2_COMM_WORLD_SIZE",
    "PMIX_RANK": "PMIX_SIZE",
    "NODE_RANK": "NNODES",
}
_SLURM_TASKS, _SLURM_NODES = "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"


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
class StartedMachine:
    """This process is to start all ranks of one machine of a job.

    launcher: what has started it, with the variables that say so.
    variables: what to unset where they are left over.
    """

    launcher: str
    variables: str
    node_rank: int
    num_nodes: int
    master_addr: str | None
    master_port: int | None = None


def external_rank(environment: Mapping[str, str]) -> ExternalRank | None:
    """The rank that this process is; None if no other launcher has started it as one.

    Raises UserError for variables that are no numbers, contradict each other, or are half missing
    where that would start one job for each process.
    """
    for launcher, names in _VARIABLES.items():
        values = [whole_number(environment, name) for name in names]
        if None in values:
            continue
        rank, size, local, local_size = values
        check_below(environment, names[0], rank, names[1], size)
        check_below(environment, names[2], local, names[3], local_size)
        if local_size > size:
            raise UserError(
                f"the environment variable {names[3]}={local_size} is more than {names[1]}={size}",
                f"set both as {launcher} does, or run 'unset {' '.join(names)}'",
            )
        address = text(environment, "MASTER_ADDR")
        if address is None and local_size == size:
            address = LOCAL_ADDRESS
        return ExternalRank(launcher, rank, size, local, local_size, address)
    tasks, nodes = _slurm_step(environment)
    if tasks > nodes:
        because = f"{_SLURM_TASKS}={tasks}"
        rank, local, node = (
            _needed(environment, name, because)
            for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
        )
        check_below(environment, "SLURM_PROCID", rank, _SLURM_TASKS, tasks)
        here = _tasks_of_node(environment, node, because)
        address = text(environment, "MASTER_ADDR") or _first_host(environment, because)
        return ExternalRank("Slurm", rank, tasks, local, here, address)
    if tasks == 1:
        _refuse_half_of_mpi(environment)
    return None


def started_machine(environment: Mapping[str, str]) -> StartedMachine | None:
    """Which machine of a job of one process a machine this is; None elsewhere.

    Slurm starts such a step with as many tasks as nodes; a PyTorchJob one process in each pod.
    Raises UserError as `external_rank` does.
    """
    if external_rank(environment) is not None:
        return None
    tasks, nodes = _slurm_step(environment)
    if nodes > 1 and tasks == nodes:
        because = f"{_SLURM_NODES}={nodes}"
        node = _needed(environment, "SLURM_NODEID", because)
        check_below(environment, "SLURM_NODEID", node, _SLURM_NODES, nodes)
        address = text(environment, "MASTER_ADDR") or _first_host(environment, because)
        said = f"Slurm ({_SLURM_NODES}={nodes}, SLURM_NODEID={node})"
        return StartedMachine(said, f"{_SLURM_TASKS} {_SLURM_NODES}", node, nodes, address)
    if text(environment, "LOCAL_RANK") or text(environment, "LOCAL_WORLD_SIZE"):
        return None
    for names in (("PET_NODE_RANK", "PET_NNODES"), ("RANK", "WORLD_SIZE")):
        machine = _pod(environment, *names)
        if machine is not None:
            return machine
    return None


def _pod(environment: Mapping[str, str], rank_name: str, size_name: str) -> StartedMachine | None:
    """The machine that a PyTorchJob (RANK: the pod's number) or TrainJob (PET_...) makes of this.

    An operator that is told how many ranks a pod has puts all ranks in WORLD_SIZE, and the pods in
    PET_NNODES.
    """
    of_torchrun = size_name == "PET_NNODES"
    size = _machines(environment) if of_torchrun else whole_number(environment, size_name)
    rank = whole_number(environment, rank_name)
    if rank is None and of_torchrun and size is not None:
        rank_name, rank = "RANK", whole_number(environment, "RANK")
        if rank is None and size > 1:
            raise UserError(
                f"the environment variable PET_NNODES={size} says that this is one of several "
                "machines, but neither PET_NODE_RANK nor RANK says which one",
                "set PET_NODE_RANK and PET_MASTER_ADDR on each machine, or run 'unset PET_NNODES'",
            )
    if rank is None or size is None:
        return None
    check_below(environment, rank_name, rank, size_name, size)
    if size == 1:
        return None
    address = text(environment, "PET_MASTER_ADDR") or text(environment, "MASTER_ADDR")
    return StartedMachine(
        f"the environment ({size_name}={size}, {rank_name}={rank}, as in a pod of a PyTorchJob)",
        f"{rank_name} {size_name} MASTER_ADDR MASTER_PORT",
        rank,
        size,
        address,
        port(environment, "PET_MASTER_PORT") or port(environment, "MASTER_PORT"),
    )


def _machines(environment: Mapping[str, str]) -> int | None:
    """PET_NNODES, which may be MIN:MAX. UserError where these differ: ranks come and go then."""
    least, colon, most = (text(environment, "PET_NNODES") or "").partition(":")
    if colon and least.isdigit() and most.isdigit():
        if int(least) == int(most):
            return int(least)
        raise UserError(
            f"the environment variable PET_NNODES={least}:{most} is of an elastic job, whose "
            "number of machines changes, and this program needs a fixed one",
            "give the job a fixed number of workers, or run 'unset PET_NNODES' and pass --nnodes, "
            "--node_rank and --master_addr on each machine",
        )
    return whole_number(environment, "PET_NNODES")


def notices(environment: Mapping[str, str]) -> list[str]:
    """What the user should know of variables that are ignored."""
    found = (
        ignored_variables(environment),
        foreign_variables(environment),
        wrong_threads(environment),
        torch_variables.notice(environment),
    )
    return [notice for notice in found if notice is not None]


def ignored_variables(environment: Mapping[str, str]) -> str | None:
    """A notice of variables that look like a rank's, but are not all there."""
    given = [name for name in _TORCHRUN if text(environment, name) is not None]
    missing = [name for name in _TORCHRUN if name not in given]
    size = whole_number(environment, "WORLD_SIZE")
    if not given or size in (0, 1) or external_rank(environment) or started_machine(environment):
        return None
    said = ", ".join(f"{name}={text(environment, name)}" for name in given)
    return (
        f"ignoring {said} of the environment, since {' and '.join(missing)} "
        f"{'is' if len(missing) == 1 else 'are'} not set: this launch starts all ranks itself"
    )


def foreign_variables(environment: Mapping[str, str]) -> str | None:
    """A notice of a rank's variables that no launcher known here sets, or not these alone."""
    if external_rank(environment) or started_machine(environment):
        return None
    in_step_of_one = text(environment, _SLURM_TASKS) == "1"
    given = [
        f"{rank}={text(environment, rank)}"
        for rank, size in _FOREIGN.items()
        if text(environment, rank) is not None and text(environment, size) not in ("0", "1")
    ]
    if not given or in_step_of_one:
        return None
    return f"ignoring {', '.join(given)} of the environment: this launch starts all ranks itself"


def user_set_threads(environment: Mapping[str, str]) -> bool:
    """Whether OMP_NUM_THREADS is there because the user exported it, and is a number of threads.

    torchrun exports OMP_NUM_THREADS=1 to its ranks when the user has not set the variable and it
    starts more than one rank on the machine. A 1 under torchrun is therefore taken for
    torchrun's own. A user who wants one thread there passes --threads 1.
    """
    threads = text(environment, "OMP_NUM_THREADS")
    several = environment.get("LOCAL_WORLD_SIZE", "1") != "1"
    by_torchrun = threads == "1" and "TORCHELASTIC_RUN_ID" in environment and several
    return threads is not None and wrong_threads(environment) is None and not by_torchrun


def wrong_threads(environment: Mapping[str, str]) -> str | None:
    """A notice if OMP_NUM_THREADS is no number of threads; OpenMP would use all CPUs."""
    threads = text(environment, "OMP_NUM_THREADS")
    # OpenMP takes a list too, for parallel regions inside each other: "4,2".
    if threads is None or re.fullmatch(r"0*[1-9]\d*( *, *0*[1-9]\d*)*", threads):
        return None
    return (
        f"ignoring OMP_NUM_THREADS={threads} of the environment, which is no number of threads, 1 "
        "or more: each rank gets as many as its CPUs"
    )


def check_size(started: ExternalRank, nnodes: int, nproc_per_node: int) -> None:
    """Raise UserError unless the job has as many ranks as the configuration wants."""
    launcher, here = started.launcher, started.local_world_size
    if (started.world_size, here) != (nnodes * nproc_per_node, nproc_per_node):
        raise UserError(
            f"{launcher} has started {counted(started.world_size, 'rank')}, {here} of them on "
            f"this machine, but the configuration wants {nnodes} x {nproc_per_node}",
            f"start as many, or pass --nnodes {-(-started.world_size // here)} "
            f"--nproc_per_node {here}",
        )
    if started.master_addr is None:
        raise UserError(
            f"{launcher} has started ranks on several machines, but MASTER_ADDR is not set",
            "export MASTER_ADDR, the address of the first machine, to all ranks",
        )


def _slurm_step(environment: Mapping[str, str]) -> tuple[int, int]:
    """(tasks, nodes) of the Slurm step; (1, 1) outside of one."""
    tasks, nodes = whole_number(environment, _SLURM_TASKS), whole_number(environment, _SLURM_NODES)
    if tasks is None and (nodes or 1) > 1:
        tasks = _needed(environment, _SLURM_TASKS, f"{_SLURM_NODES}={nodes}")
    tasks, nodes = 1 if tasks is None else tasks, 1 if nodes is None else nodes
    if not 1 <= nodes <= tasks:
        raise UserError(
            f"the environment variables {_SLURM_TASKS}={tasks} and {_SLURM_NODES}={nodes} "
            "contradict each other",
            f"start with srun, which sets both, or run 'unset {_SLURM_TASKS} {_SLURM_NODES}'",
        )
    return tasks, nodes


def _needed(environment: Mapping[str, str], name: str, because: str) -> int:
    value = whole_number(environment, name)
    if value is None:
        raise _half(name, because)
    return value


def _half(name: str, because: str) -> UserError:
    return UserError(
        f"the environment has {because} of a Slurm step, but {name} is not set",
        f"start with srun, which sets both, or run 'unset {_SLURM_TASKS} {_SLURM_NODES}'",
    )


def _first_host(environment: Mapping[str, str], because: str) -> str:
    """ "gpu[07-09,12]" -> "gpu07"."""
    hosts = text(environment, "SLURM_STEP_NODELIST") or text(environment, "SLURM_JOB_NODELIST")
    if hosts is None:
        raise _half("SLURM_STEP_NODELIST", because)
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", hosts)
    return "".join(part or "" for part in found.groups()) if found else LOCAL_ADDRESS


def _tasks_of_node(environment: Mapping[str, str], node: int, because: str) -> int:
    """The tasks of a machine. "8(x2)" or "8,4": machines may have different numbers of them."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    tasks_per_node = text(environment, name)
    if tasks_per_node is None:
        raise _half(name, because)
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        counts += [int(count)] * int(times or 1)
    if node >= len(counts) or counts[node] == 0:
        raise UserError(
            f"the environment variable {name}={tasks_per_node} names no tasks of machine "
            f"SLURM_NODEID={node}",
            f"start with srun, which sets both, or run 'unset {_SLURM_TASKS} {_SLURM_NODES}'",
        )
    return counts[node]


def _refuse_half_of_mpi(environment: Mapping[str, str]) -> None:
    """Raise UserError where mpirun has started several processes, and each would start a job."""
    for launcher in ("Open MPI", "MPI"):
        names = _VARIABLES[launcher]
        missing = [name for name in names if text(environment, name) is None]
        size = whole_number(environment, names[1])
        if missing and size is not None and size > 1:
            raise UserError(
                f"the environment has {names[1]}={size} of {launcher}, but {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set",
                f"start with mpirun, which sets all, or run 'unset {' '.join(names)}'",
            )
