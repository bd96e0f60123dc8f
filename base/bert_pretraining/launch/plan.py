"""The plan of a launch: everything that it will do, decided before anything starts."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from bert_pretraining import config as configuration
from bert_pretraining import topology
from bert_pretraining.config import Resolved
from bert_pretraining.errors import UserError
from bert_pretraining.launch import cluster, network
from bert_pretraining.launch.network import LOCAL_ADDRESS
from bert_pretraining.launch.rank import EXIT_ZERO_FLAG, RankSetup, trainer_command
from bert_pretraining.runtime import rank_variables, screen
from bert_pretraining.runtime.words import counted, plural

DEFAULT_PORT = 29500
INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
HANG_TIMEOUT = 600.0
RENDEZVOUS_TIMEOUT = 300.0
STARTED_VARIABLE = "BERT_PRETRAINING_STARTED"  # of the ranks: when the launcher began, in seconds
EXIT_ZERO_HELP = (
    "exit with code 0, not 3, when training finishes without reaching the target. Use it under "
    "launchers that take every code but 0 for a failure: torchrun turns a rank's exit code 3 "
    "into 1 and prints an error, srun and mpirun may end the job (default: off)"
)


@dataclass(frozen=True)
class LaunchFlags:
    """The flags that concern only the launcher. Timeouts in seconds; `hang_timeout` 0: no limit."""

    node_rank: int = 0
    master_addr: str | None = None  # None: this machine is the only one
    master_port: int | None = None
    bind: str = "auto"
    hyper_threads: bool = False
    threads: int | None = None  # of each rank
    max_restarts: int = 0
    hang_timeout: float = HANG_TIMEOUT
    rendezvous_timeout: float = RENDEZVOUS_TIMEOUT
    log_dir: str | None = None
    exit_zero_without_target: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Plan:
    """What a launch does: its ranks, their bindings, the environment and the trainer's flags."""

    resolved: Resolved
    flags: LaunchFlags
    bindings: list[topology.Binding]
    binder: str  # numactl, affinity or none
    trainer_flags: list[str]
    environment: dict[str, str]
    notices: tuple[str, ...] = ()  # what the user should know before the launch
    cpus: float = float("inf")  # that the ranks of this machine share

    @property
    def first_rank(self) -> int:
        return self.flags.node_rank * self.resolved.config.nproc_per_node

    def threads(self, local_rank: int) -> int | None:
        """A rank's OMP_NUM_THREADS: --threads, or the number that fits its binding.

        None where the user has exported OMP_NUM_THREADS, which then stays as it is.
        """
        if self.flags.threads is not None:
            return self.flags.threads
        if cluster.user_set_threads(os.environ):
            return None
        return self.bindings[local_rank].threads

    def rank_setup(self, local_rank: int) -> RankSetup:
        """How that rank binds itself before it becomes a trainer."""
        binding = self.bindings[local_rank]
        return {
            "prefix": binding.numactl() if self.binder == "numactl" else [],
            "cpus": list(binding.cpus) if self.binder == "affinity" else [],
            "threads": self.threads(local_rank),
        }

    def table(self) -> str:
        """The map of ranks to CPUs."""
        return topology.table(self.bindings, self.first_rank, self.binder)

    def summary(self) -> str:
        """The same in one line, for people."""
        count = len(self.bindings)
        threads = [binding.threads for binding in self.bindings]
        fewest, most = min(threads), max(threads)
        number = f"{most}" if fewest == most else f"{fewest} to {most}"
        each = " each" if count > 1 else ""
        return (
            f"Binding: {self.binder}, {counted(count, 'rank')} of {number} "
            f"{plural(most, 'thread')}{each} (--dry_run shows the CPUs)"
        )

    def print_bindings(self, stream: TextIO) -> None:
        """The table where programs read the stream, one line where people do."""
        text = self.summary() if screen.is_watched(stream) else self.table()
        print(text, file=stream, flush=True)


def add_launch_flags(parser: configuration.FlagParser) -> None:
    """The flags of LaunchFlags."""
    group = parser.add_argument_group("launch")
    add = group.add_argument
    add("--node_rank", type=int, metavar="N",
        help="this machine's number, 0 to NNODES - 1 (default: that of Slurm or the pod, else "
        "0)")  # fmt: skip
    add("--master_addr", metavar="ADDRESS",
        help="name or address of machine 0 (default: Slurm's first machine or the pod's "
        f"MASTER_ADDR, else {LOCAL_ADDRESS})")  # fmt: skip
    add("--master_port", type=_port, metavar="PORT",
        help="TCP port on machine 0, 1 to 65535 (default: a free one; with several machines "
        f"{DEFAULT_PORT})")  # fmt: skip
    add("--bind", choices=("auto", "none", "required"), default="auto",
        help="bind ranks to CPU cores: where possible, never, or fail where it is not possible "
        "(default: auto)")  # fmt: skip
    add("--hyper_threads", action="store_true",
        help="give each rank both hardware threads of its cores (default: one)")  # fmt: skip
    add("--threads", type=_at_least(1), metavar="N",
        help="CPU threads of each rank, 1 or more (default: OMP_NUM_THREADS if you exported it, "
        "else one for each CPU of the rank; the OMP_NUM_THREADS=1 that torchrun sets by itself "
        "is ignored)")  # fmt: skip
    add("--max_restarts", type=_at_least(0), default=0, metavar="N",
        help="how often all ranks are started again after a crash or hang, 0 or more "
        "(default: 0)")  # fmt: skip
    add("--hang_timeout", type=_seconds, default=HANG_TIMEOUT, metavar="SECONDS",
        help="end all ranks when one makes no progress for this time; 0: never (default: "
        f"{HANG_TIMEOUT:g})")  # fmt: skip
    add("--rendezvous_timeout", type=_seconds, default=RENDEZVOUS_TIMEOUT, metavar="SECONDS",
        help="how long the launcher waits for the other machines (default: "
        f"{RENDEZVOUS_TIMEOUT:g})")  # fmt: skip
    add("--log_dir", metavar="DIR",
        help="write each rank's output to DIR/rank_N.log too, and put the rank before each line "
        "on the terminal (default: no files)")  # fmt: skip
    add(EXIT_ZERO_FLAG, action="store_true", help=EXIT_ZERO_HELP)
    add("--dry_run", action="store_true",
        help="print the plan (ranks, CPUs, environment, commands, configuration), start nothing "
        "(default: off)")  # fmt: skip


def _at_least(minimum: int) -> Callable[[str], int]:
    """A type for flags: an integer that is not below `minimum`."""

    def parse(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)

    return parse


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) <= rank_variables.HIGHEST_PORT):
        raise argparse.ArgumentTypeError(f"{text} is no port, 1 to {rank_variables.HIGHEST_PORT}")
    return int(text)


def _seconds(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds, 0 or more")
    return float(text)


def split_flags(values: dict[str, object]) -> tuple[LaunchFlags, dict[str, object]]:
    """Split the parsed flags into the launcher's and the configuration's."""
    names = [field.name for field in dataclasses.fields(LaunchFlags)]
    given = {name: values[name] for name in names if values[name] is not None}
    machine = cluster.started_machine(os.environ)
    started = {} if machine is None else _flags_of(machine)
    flags = LaunchFlags(**{**started, **given})
    return flags, {name: value for name, value in values.items() if name not in names}


def _flags_of(machine: cluster.StartedMachine) -> dict[str, object]:
    """The flags that the started machine stands for."""
    flags = {name: getattr(machine, name) for name in ("node_rank", "master_addr", "master_port")}
    return {name: value for name, value in flags.items() if value is not None}


def make_plan(resolved: Resolved, flags: LaunchFlags, arguments: list[str]) -> Plan:
    """Decide the ranks, their bindings, the environment and the command; start nothing.

    arguments: the trainer's flags, as they will stand in its command line.
    """
    settings = resolved.config
    flags = _check_machines(resolved, flags)
    use_gpus = settings.device != "cpu"
    machine = topology.read_machine(
        Path("/"),
        topology.query_nvidia_smi() if use_gpus else None,
        topology.visible_devices(os.environ),
    )
    bindings = topology.place_ranks(machine, settings.nproc_per_node, use_gpus, flags.hyper_threads)
    num_cpus = sum(len(core.threads) for core in machine.cores)
    binder = "none" if flags.bind == "none" else "numactl"
    fault = topology.numactl_fault(bindings) if binder == "numactl" else None
    if fault:
        if flags.bind == "required":
            raise UserError(f"--bind required: {fault}", "install numactl, or pass --bind auto")
        binder = "affinity"
    numactl = f"{fault}; binding by CPU affinity instead" if fault else None
    return Plan(
        resolved=resolved,
        flags=flags,
        bindings=bindings,
        binder=binder,
        trainer_flags=arguments,
        environment=rank_environment(settings.nnodes, flags.master_addr),
        notices=tuple(filter(None, [numactl, *cluster.notices(os.environ)])),
        cpus=min(num_cpus, machine.cpu_quota or num_cpus),
    )


def describe(plan: Plan) -> str:
    """The plan as `--dry_run` prints it: ranks, CPUs, environment, commands, configuration."""
    settings, flags = plan.resolved.config, plan.flags
    port = flags.master_port or (DEFAULT_PORT if settings.nnodes > 1 else "a free port")
    lines = [
        f"# {counted(settings.world_size, 'rank')}: {counted(settings.nnodes, 'machine')} x "
        f"{settings.nproc_per_node}; this is machine {flags.node_rank}",
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


def _check_machines(resolved: Resolved, flags: LaunchFlags) -> LaunchFlags:
    """The flags, with an address; UserError if they name no machine of the configuration's."""
    settings = resolved.config
    asked = resolved.sources["nnodes"] == "flag"
    what = f"--nnodes {settings.nnodes}" if asked else f"--config {settings.config}"
    machine = cluster.started_machine(os.environ)
    if machine is not None and _flags_of(machine).items() <= dataclasses.asdict(flags).items():
        if settings.nnodes == 1 and asked:
            flags = dataclasses.replace(flags, node_rank=0, master_addr=None, master_port=None)
        elif settings.nnodes != machine.num_nodes:
            raise UserError(
                f"{machine.launcher} says that this is machine {machine.node_rank} of "
                f"{machine.num_nodes}, but {what} wants {settings.nnodes}",
                f"pass --nnodes {machine.num_nodes}; or --nnodes 1 to train on this machine alone; "
                f"or, if the variables are left over, run 'unset {machine.variables}'",
            )
    if settings.nnodes > 1 and flags.master_addr is None:
        raise UserError(
            f"{what} wants {settings.nnodes} machines, but --master_addr is not given",
            "run this command on each machine with --master_addr ADDRESS (of machine 0, the same "
            f"on all) and --node_rank 0 to {settings.nnodes - 1}; or pass --nnodes 1",
        )
    if not 0 <= flags.node_rank < settings.nnodes:
        raise UserError(
            f"--node_rank {flags.node_rank} is no machine of --nnodes {settings.nnodes}",
            f"pass --node_rank 0 to {settings.nnodes - 1}",
        )
    return dataclasses.replace(flags, master_addr=flags.master_addr or LOCAL_ADDRESS)


def rank_environment(nnodes: int, master_addr: str) -> dict[str, str]:
    """The variables that the ranks get beside torchrun's own."""
    environment = {STARTED_VARIABLE: f"{time.time():.3f}"}
    if rank_variables.text(os.environ, INTERFACE_VARIABLE) is None:
        # Without it, gloo looks up the host's own name. In many containers that fails, or gives
        # an address that other machines cannot reach.
        interface = "lo" if nnodes == 1 else network.interface_to(master_addr)
        if interface:
            environment[INTERFACE_VARIABLE] = interface
    if nnodes > 1 and "TORCH_CPP_LOG_LEVEL" not in os.environ:
        # Without it, PyTorch warns of every address without a name and of every attempt to
        # connect.
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    return environment
