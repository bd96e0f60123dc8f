"""`launch`: flags -> ranks and their CPUs -> torchrun -> one trainer a rank."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import logging
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining import config as configuration
from bert_pretraining import outcome, topology
from bert_pretraining.config import Resolved
from bert_pretraining.errors import EXIT_CRASH, UserError

BINDINGS_VARIABLE = "BERT_PRETRAINING_BINDINGS"
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class LaunchFlags:
    """The flags that concern only the launcher."""

    node_rank: int
    master_addr: str
    master_port: int | None
    bind: str
    max_restarts: int
    log_dir: str | None
    dry_run: bool


@dataclass(frozen=True)
class Plan:
    """Everything that a launch will do, before it does it."""

    resolved: Resolved
    flags: LaunchFlags
    bindings: list[topology.Binding]
    binder: str  # numactl, affinity or none
    trainer_flags: list[str]
    environment: dict[str, str]


def add_launch_flags(parser: configuration.FlagParser) -> None:
    """The flags of LaunchFlags."""
    group = parser.add_argument_group("launch")
    group.add_argument("--node_rank", type=int, default=0, help="this machine's number, from 0")
    group.add_argument("--master_addr", default="127.0.0.1", help="address of machine 0")
    group.add_argument(
        "--master_port", type=int, help=f"port on machine 0 (a free one, or {DEFAULT_PORT})"
    )
    group.add_argument(
        "--bind", choices=("auto", "none", "required"), default="auto",
        help="bind ranks to cores: where possible, never, or else fail",
    )  # fmt: skip
    group.add_argument("--max_restarts", type=int, default=0, help="restarts after a failure")
    group.add_argument(
        "--log_dir", help="keep each rank's output here too; lines on the terminal get a prefix"
    )
    group.add_argument("--dry_run", action="store_true", help="print what would run, run nothing")


def split_flags(values: dict[str, object]) -> tuple[LaunchFlags, dict[str, object]]:
    """All parsed flags -> the launcher's, and the configuration's."""
    names = [field.name for field in dataclasses.fields(LaunchFlags)]
    flags = LaunchFlags(**{name: values[name] for name in names})
    return flags, {name: value for name, value in values.items() if name not in names}


def make_plan(resolved: Resolved, flags: LaunchFlags, arguments: list[str]) -> Plan:
    """Decide ranks, bindings, environment and command; starts nothing.

    arguments: the trainer's flags as they are to appear in its command.
    """
    settings = resolved.config
    if settings.nnodes > 1 and flags.master_addr in ("127.0.0.1", "localhost"):
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
    bindings = topology.split_cpus(topology.allowed_cpus(), settings.nproc_per_node)
    binder = "none" if flags.bind == "none" else "numactl"
    fault = topology.numactl_fault(bindings) if binder == "numactl" else None
    if fault:
        if flags.bind == "required":
            raise UserError(f"--bind required: {fault}; install numactl, or pass --bind auto")
        print(f"Notice: {fault}; binding by CPU affinity instead", file=sys.stderr)
        binder = "affinity"
    return Plan(
        resolved=resolved,
        flags=flags,
        bindings=bindings,
        binder=binder,
        trainer_flags=arguments,
        environment=_environment(settings.nnodes),
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
    ]
    for local_rank, binding in enumerate(plan.bindings):
        rank = flags.node_rank * settings.nproc_per_node + local_rank
        prefix = {
            "numactl": binding.numactl(),
            "affinity": ["taskset", "--cpu-list", binding.cpu_list],
            "none": [],
        }[plan.binder]
        variables = f"RANK={rank} LOCAL_RANK={local_rank}"
        if threads := _threads(plan, local_rank):
            variables += f" OMP_NUM_THREADS={threads}"
        lines.append(f"{variables} {shlex.join([*prefix, *_python('train', plan.trainer_flags)])}")
    return "\n".join([*lines, "", configuration.show(plan.resolved)])


def run(plan: Plan) -> int:
    """Start the ranks, wait for them, and return what they earned."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings, flags = plan.resolved.config, plan.flags
    port = _master_port(plan)
    if flags.log_dir:
        try:
            Path(flags.log_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write to --log_dir {flags.log_dir} ({error.strerror})"
            ) from error
    _quieten_torchrun()
    with tempfile.TemporaryDirectory(prefix="bert_pretraining_") as folder:
        os.environ.update(plan.environment)
        os.environ[outcome.FOLDER_VARIABLE] = folder
        os.environ[BINDINGS_VARIABLE] = json.dumps(
            [
                {"prefix": binding.numactl() if plan.binder == "numactl" else [],
                 "cpus": binding.cpus if plan.binder == "affinity" else [],
                 "threads": _threads(plan, local_rank)}
                for local_rank, binding in enumerate(plan.bindings)
            ]
        )  # fmt: skip
        launch_config = LaunchConfig(
            min_nodes=settings.nnodes,
            max_nodes=settings.nnodes,
            nproc_per_node=settings.nproc_per_node,
            run_id="bert_pretraining",
            rdzv_backend="static",
            rdzv_endpoint=f"{flags.master_addr}:{port}",
            rdzv_configs={"rank": flags.node_rank, "timeout": 900},
            max_restarts=flags.max_restarts,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(
                log_dir=flags.log_dir or folder, tee=Std.ALL if flags.log_dir else Std.NONE
            ),
        )
        interpreter, *entry = _python("rank", plan.trainer_flags)
        try:
            elastic_launch(launch_config, interpreter)(*entry)
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            return explain(Path(folder), codes)
        except SignalException as error:
            print(f"Ended by {error.sigval.name}", file=sys.stderr)
            return 128 + error.sigval.value
        finally:
            # This process is no rank: its own errors go to the terminal.
            del os.environ[outcome.FOLDER_VARIABLE]
        earned = outcome.read_finish(Path(folder))
    if earned is None:
        raise RuntimeError("the ranks ended without saying how")
    return earned


def run_rank(arguments: list[str]) -> None:
    """Become this local rank's bound trainer (torchrun starts one of these a rank)."""
    _end_with_the_launcher()
    place = json.loads(os.environ[BINDINGS_VARIABLE])[int(os.environ["LOCAL_RANK"])]
    if place["threads"]:
        os.environ["OMP_NUM_THREADS"] = str(place["threads"])
    if place["cpus"]:
        os.sched_setaffinity(0, place["cpus"])
    command = [*place["prefix"], *_python("train", arguments)]
    os.execvp(command[0], command)


def _end_with_the_launcher() -> None:
    """Ask Linux to end this rank when the launcher dies, even by SIGKILL."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in <sys/prctl.h>; it survives exec
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL))


def _python(command: str, flags: list[str]) -> list[str]:
    return [sys.executable, "-u", "-m", "bert_pretraining", command, *flags]


def _threads(plan: Plan, local_rank: int) -> int | None:
    """Threads follow the binding; a number that the user exported stays."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return plan.bindings[local_rank].threads


def _environment(nnodes: int) -> dict[str, str]:
    """What the ranks find beside torchrun's own variables."""
    environment = {"BERT_PRETRAINING_STARTED": f"{time.time():.3f}"}
    if nnodes == 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        # Otherwise gloo looks the host's own name up, which fails in many containers.
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return environment


def _master_port(plan: Plan) -> int:
    """A port that is free here, or on machine 0 if that is another one."""
    flags = plan.flags
    if flags.node_rank > 0:
        return flags.master_port or DEFAULT_PORT
    wanted = flags.master_port or (DEFAULT_PORT if plan.resolved.config.nnodes > 1 else 0)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--master_port {wanted} cannot be used ({getattr(error, 'strerror', error)}); "
                "choose another, or leave it out on one machine"
            ) from error
        return probe.getsockname()[1]


def _quieten_torchrun() -> None:
    """Its own account of a failure would bury the rank's."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def explain(folder: Path, exit_codes: dict[int, int]) -> int:
    """Say which rank failed first and why; return the exit code that fits.

    exit_codes: of the ranks that failed; negative for those that a signal ended. A rank
    that died without a word explains the others' lost connections; else the earliest
    record does.
    """
    failures = outcome.read_failures(folder)
    spoke = {failure.rank for failure in failures}
    silent = [(rank, code) for rank, code in sorted(exit_codes.items()) if rank not in spoke]
    if failures:
        # torchrun ends the others with SIGTERM, and lost connections may abort them.
        consequences = (-signal.SIGTERM, -signal.SIGABRT)
        silent = [(rank, code) for rank, code in silent if code not in consequences]
    # Without any record, a rank that torchrun did not end itself comes first.
    silent.sort(key=lambda item: item[1] == -signal.SIGTERM)
    if silent:
        rank, code = silent[0]
        cause = f"ended with exit code {code}"
        if code < 0:
            cause = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            cause += " (by hand, or for want of memory)"
        print(f"Error: rank {rank} {cause}; all ranks were ended", file=sys.stderr)
        return EXIT_CRASH
    first = failures[0]
    where = f"rank {first.rank}: " if first.detail else ""
    print(f"{first.detail}Error: {where}{first.message}", file=sys.stderr)
    return first.exit_code
