"""What a launch refuses before it starts anything: faults of this machine and its environment."""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Callable, Mapping

from bert_pretraining.errors import UserError
from bert_pretraining.launch import network
from bert_pretraining.launch.plan import INTERFACE_VARIABLE, Plan
from bert_pretraining.runtime import packages
from bert_pretraining.runtime.rank_variables import text

MOST_RANKS_OF_A_CPU = 4  # more of them get a notice: such runs are to try things, and not to train


def check_address(plan: Plan) -> None:
    """Raise UserError if this machine cannot look up the name of machine 0."""
    address = plan.flags.master_addr
    if not network.is_known(address):
        raise UserError(
            f"--master_addr {address}: this machine ({os.uname().nodename}) does not know that "
            "name",
            "pass machine 0's address ('ip addr' or 'hostname -I' there shows it)",
        )
    if plan.flags.node_rank == 0 and not network.is_here(address):
        print(
            f"Notice: --master_addr {address} is no address of this machine "
            f"({os.uname().nodename}), which is --node_rank 0",
            file=sys.stderr,
        )


def fault(plan: Plan, check: Callable[[], None]) -> UserError | None:
    """The error that would stop every rank of this machine, if there is one."""
    try:
        check()
        check_network(plan)
        check_gpus(plan)
    except UserError as error:
        return error
    return None


def check_network(plan: Plan) -> None:
    """Raise UserError if the ranks of this machine could not reach each other."""
    check_loopback(plan.flags.master_addr)
    check_interface(os.environ)


def check_loopback(master_addr: str | None) -> None:
    """Raise UserError if the ranks meet at 127.0.0.1, and this machine has no such address.

    PyTorch would try to connect for 15 minutes.
    """
    reason = network.loopback_fault() if master_addr == network.LOCAL_ADDRESS else ""
    if reason:
        raise UserError(
            f"the ranks of this machine meet at {network.LOCAL_ADDRESS}, which it does not reach "
            f"({reason})",
            "run 'ip link set lo up' as root: the loopback interface lo is down, as in a new "
            "network namespace",
        )


def check_interface(environment: Mapping[str, str]) -> None:
    """Raise UserError if GLOO_SOCKET_IFNAME names an interface that this machine does not have."""
    asked = text(environment, INTERFACE_VARIABLE) or ""
    there = [name for _, name in socket.if_nameindex()]
    absent = [name for name in asked.split(",") if name and name not in there]
    if absent:
        raise UserError(
            f"the environment variable {INTERFACE_VARIABLE}={asked} names {absent[0]}, which is no "
            f"network interface of {os.uname().nodename} ({', '.join(there)})",
            f"set it to one of these, or run 'unset {INTERFACE_VARIABLE}'",
        )


def check_gpus(plan: Plan) -> None:
    """Raise UserError if there are GPUs to train on, but fewer than ranks.

    Also if --device names a type of device that PyTorch does not see.
    """
    from bert_pretraining.runtime import device as devices

    settings = plan.resolved.config
    wanted = settings.nproc_per_node
    found = devices.count(devices.resolve(settings.device))
    if 0 < found < wanted:
        raise UserError(
            f"--config {settings.config} wants {wanted} GPUs, and this machine has {found}",
            f"pass --nproc_per_node {found}, with --gradient_accumulation_steps "
            f"{settings.gradient_accumulation_steps * -(-wanted // found)} to keep the global "
            "batch size, or --device cpu",
        )


def connections(machines: int, ranks: int) -> int:
    """Most connections at once at machine 0's store, with some files and sockets to spare.

    One for each rank while it trains, and one more when it has finished; one for each launcher, and
    one for each machine's torchrun agent.
    """
    return 2 * ranks + 2 * machines + 256


def allow_connections(machines: int, ranks: int) -> None:
    """Raise this process's limit of open files as far as machine 0's store needs it.

    Prints a notice if the system does not allow so many; the launch goes on with what it has.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections(machines, ranks)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
    except (ValueError, OSError):  # macOS: an endless limit of the process, and one of the kernel
        allowed = soft
    if allowed < needed:
        print(
            f"Notice: this machine, {os.uname().nodename}, allows a process {allowed} open files, "
            f"and the store for {ranks} ranks on {machines} machines may need {needed}; raise "
            "nofile in limits.conf (on macOS: kern.maxfilesperproc)",
            file=sys.stderr,
        )


def crowding(plan: Plan) -> str | None:
    """ "100 ranks compute on the 2 CPUs of HOST", where that is far too many; else None.

    None also where PyTorch, which knows whether there is an accelerator, is not installed.
    """
    settings = plan.resolved.config
    ranks = settings.nproc_per_node
    if ranks <= MOST_RANKS_OF_A_CPU * plan.cpus or settings.device not in ("auto", "cpu"):
        return None
    knows = settings.device == "cpu" or packages.folder_of("torch") is not None
    if not knows or not computes_on_cpu(plan):
        return None
    cpus = "CPU" if plan.cpus == 1 else f"{plan.cpus:g} CPUs"
    return f"{ranks} ranks compute on the {cpus} of {os.uname().nodename}"


def crowding_notice(plan: Plan) -> str | None:
    """What the user should know before far too many ranks start; None if they are not."""
    crowded = crowding(plan)
    if crowded is None:
        return None
    most = max(1, int(MOST_RANKS_OF_A_CPU * plan.cpus))
    return (
        f"{crowded}: they will be very slow, and each takes memory of its own; pass "
        f"--nproc_per_node {max(1, int(plan.cpus))} to train, or at most {most} to try things"
    )


def computes_on_cpu(plan: Plan) -> bool:
    """Whether the ranks compute on the CPU. UserError for a device that PyTorch does not see."""
    from bert_pretraining.runtime import device as devices

    return devices.resolve(plan.resolved.config.device) == "cpu"
