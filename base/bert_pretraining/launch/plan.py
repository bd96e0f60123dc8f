"""Everything that a launch will do, decided before it does it."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining import config as configuration
from bert_pretraining import topology
from bert_pretraining.config import Resolved
from bert_pretraining.errors import UserError
from bert_pretraining.launch import cluster, network
from bert_pretraining.launch.cluster import LOCAL_ADDRESS
from bert_pretraining.launch.rank import Place, trainer_command

DEFAULT_PORT = 29500
HANG_TIMEOUT = 600.0
RENDEZVOUS_TIMEOUT = 300.0


@dataclass(frozen=True)
class LaunchFlags:
    """The flags that concern only the launcher. Timeouts in seconds; `hang_timeout` 0 for none."""

    node_rank: int = 0
    master_addr: str = LOCAL_ADDRESS
    master_port: int | None = None
    bind: str = "auto"
    hyper_threads: bool = False
    max_restarts: int = 0
    hang_timeout: float = HANG_TIMEOUT
    rendezvous_timeout: float = RENDEZVOUS_TIMEOUT
    log_dir: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Plan:
    """What a launch does: ranks, their places, environment and trainer's flags."""

    resolved: Resolved
    flags: LaunchFlags
    bindings: list[topology.Binding]
    binder: str  # numactl, affinity or none
    trainer_flags: list[str]
    environment: dict[str, str]
    notice: str | None = None  # what the user should know before the launch

    @property
    def first_rank(self) -> int:
        return self.flags.node_rank * self.resolved.config.nproc_per_node

    def threads(self, local_rank: int) -> int | None:
        """Threads follow the binding; a number that the user exported stays (None)."""
        return None if "OMP_NUM_THREADS" in os.environ else self.bindings[local_rank].threads

    def place(self, local_rank: int) -> Place:
        """What that rank does before it becomes a trainer."""
        binding = self.bindings[local_rank]
        return {
            "prefix": binding.numactl() if self.binder == "numactl" else [],
            "cpus": list(binding.cpus) if self.binder == "affinity" else [],
            "threads": self.threads(local_rank),
        }

    def table(self) -> str:
        """The map of ranks to CPUs."""
        return topology.table(self.bindings, self.first_rank, self.binder)


def add_launch_flags(parser: configuration.FlagParser) -> None:
    """The flags of LaunchFlags."""
    group = parser.add_argument_group("launch")
    add = group.add_argument
    add("--node_rank", type=int, help="this machine's number, from 0 (Slurm's, or 0)")
    add("--master_addr", help=f"address of machine 0 (Slurm's first, or {LOCAL_ADDRESS})")
    add("--master_port", type=int, help=f"port on machine 0 (a free one, or {DEFAULT_PORT})")
    add("--bind", choices=("auto", "none", "required"), default="auto",
        help="bind ranks to cores: where possible, never, or else fail")  # fmt: skip
    add("--hyper_threads", action="store_true",
        help="give ranks both hardware threads of their cores")  # fmt: skip
    add("--max_restarts", type=_at_least_0, default=0, help="restarts after a failure (0)")
    add("--hang_timeout", type=_seconds, default=HANG_TIMEOUT, metavar="SECONDS",
        help=f"end ranks without progress for so long; 0: never ({HANG_TIMEOUT:g})")  # fmt: skip
    add("--rendezvous_timeout", type=_seconds, default=RENDEZVOUS_TIMEOUT, metavar="SECONDS",
        help=f"wait so long for the other machines ({RENDEZVOUS_TIMEOUT:g})")  # fmt: skip
    add("--log_dir", metavar="DIR",
        help="keep each rank's output there too; lines on the terminal get a prefix")  # fmt: skip
    add("--dry_run", action="store_true", help="print what would run, run nothing")


def _at_least_0(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return int(text)


def _seconds(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return float(text)


def split_flags(values: dict[str, object]) -> tuple[LaunchFlags, dict[str, object]]:
    """All parsed flags -> the launcher's, and the configuration's."""
    names = [field.name for field in dataclasses.fields(LaunchFlags)]
    given = {name: values[name] for name in names if values[name] is not None}
    node = cluster.slurm_node(os.environ)
    slurm = dataclasses.asdict(node) if node else {}
    flags = LaunchFlags(**{**slurm, **given})
    return flags, {name: value for name, value in values.items() if name not in names}


def make_plan(resolved: Resolved, flags: LaunchFlags, arguments: list[str]) -> Plan:
    """Decide ranks, bindings, environment and command; starts nothing.

    arguments: the trainer's flags as they are to appear in its command.
    """
    settings = resolved.config
    _check_machines(resolved, flags)
    use_gpus = settings.device != "cpu"
    machine = topology.read_machine(
        Path("/"),
        topology.query_nvidia_smi() if use_gpus else None,
        os.environ.get("CUDA_VISIBLE_DEVICES"),
    )
    bindings = topology.place_ranks(machine, settings.nproc_per_node, use_gpus, flags.hyper_threads)
    binder = "none" if flags.bind == "none" else "numactl"
    fault = topology.numactl_fault(bindings) if binder == "numactl" else None
    if fault:
        if flags.bind == "required":
            raise UserError(f"--bind required: {fault}; install numactl, or pass --bind auto")
        binder = "affinity"
    return Plan(
        resolved=resolved,
        flags=flags,
        bindings=bindings,
        binder=binder,
        trainer_flags=arguments,
        environment=_environment(settings.nnodes, flags.master_addr),
        notice=f"{fault}; binding by CPU affinity instead" if fault else None,
    )


def describe(plan: Plan) -> str:
    """The plan for people: ranks, bindings, environment, commands, configuration."""
    settings, flags = plan.resolved.config, plan.flags
    port = flags.master_port or (DEFAULT_PORT if settings.nnodes > 1 else "a free port")
    lines = [
        f"# {settings.world_size} ranks: {settings.nnodes} machines x {settings.nproc_per_node}; "
        f"this is machine {flags.node_rank}",
        f"MASTER_ADDR={flags.master_addr} MASTER_PORT={port} WORLD_SIZE={settings.world_size}",
        *(f"{name}={value}" for name, value in plan.environment.items()),
        "",
        plan.table(),
        "",
    ]
    for local_rank, binding in enumerate(plan.bindings):
        prefix = {
            "numactl": binding.numactl(),
            "affinity": ["taskset", "--cpu-list", binding.cpu_list],
            "none": [],
        }[plan.binder]
        variables = f"RANK={plan.first_rank + local_rank} LOCAL_RANK={local_rank}"
        if threads := plan.threads(local_rank):
            variables += f" OMP_NUM_THREADS={threads}"
        command = [*prefix, *trainer_command("train", plan.trainer_flags)]
        lines.append(f"{variables} {shlex.join(command)}")
    return "\n".join([*lines, "", configuration.show(plan.resolved)])


def _check_machines(resolved: Resolved, flags: LaunchFlags) -> None:
    settings = resolved.config
    if settings.nnodes > 1 and flags.master_addr in (LOCAL_ADDRESS, "localhost"):
        asked = resolved.sources["nnodes"] == "flag"
        what = f"--nnodes {settings.nnodes}" if asked else f"--config {settings.config}"
        raise UserError(
            f"{what} wants {settings.nnodes} machines: run this command on each of them, with "
            "--master_addr ADDRESS (machine 0's, the same on all) and "
            f"--node_rank 0 to {settings.nnodes - 1}; or pass --nnodes 1"
        )
    if not 0 <= flags.node_rank < settings.nnodes:
        raise UserError(
            f"--node_rank {flags.node_rank}: must be from 0 to {settings.nnodes - 1} (--nnodes "
            f"{settings.nnodes})"
        )


def _environment(nnodes: int, master_addr: str) -> dict[str, str]:
    """What the ranks find beside torchrun's own variables."""
    environment = {"BERT_PRETRAINING_STARTED": f"{time.time():.3f}"}
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        # Otherwise gloo looks the host's own name up, which fails in many containers, or gives
        # an address that only this host knows.
        interface = "lo" if nnodes == 1 else network.interface_to(master_addr)
        if interface:
            environment["GLOO_SOCKET_IFNAME"] = interface
    if nnodes > 1 and "TORCH_CPP_LOG_LEVEL" not in os.environ:
        # Its warnings that addresses have no names, and of every try to connect.
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    return environment
