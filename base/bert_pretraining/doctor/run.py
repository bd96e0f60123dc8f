"""What a run reads, writes and connects to: limits, disks, data, port."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from bert_pretraining.config import Config
from bert_pretraining.data import inputs
from bert_pretraining.doctor.report import NOTE, OK, PROBLEM, CheckResult
from bert_pretraining.errors import UserError
from bert_pretraining.launch.checks import check_loopback
from bert_pretraining.launch.network import LOCAL_ADDRESS
from bert_pretraining.launch.plan import DEFAULT_PORT, LaunchFlags
from bert_pretraining.launch.port import free_port
from bert_pretraining.runtime.words import counted

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
# Docker's default is 64 MiB, too little for NCCL's buffers between the GPUs of a machine.
ENOUGH_SHARED_MEMORY = 0.5 * GIB
ENOUGH_OPEN_FILES = 1024
# BERT-large: weights and LAMB's two moments in float32, 336 million numbers each.
ENOUGH_DISK = 4 * GIB
LEAST_DISK = 0.1 * GIB


def results(settings: Config, flags: LaunchFlags, looks_at_data: bool) -> Iterator[CheckResult]:
    """All results of this module."""
    yield shared_memory(settings.nproc_per_node)
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE))
    yield disk("output", Path(settings.resolved_output_dir))
    if flags.log_dir:
        yield disk("log_dir", Path(flags.log_dir))
    if looks_at_data:
        yield from data(settings)
    else:
        yield CheckResult("data", OK, "not checked: pass --data_dir DIR, or --name and --config")
    if settings.nnodes == 1:
        yield loopback()
    yield from port(settings, flags)


def shared_memory(num_ranks: int, path: Path = SHARED_MEMORY) -> CheckResult:
    """Shared memory, where NCCL keeps the buffers between the GPUs of a machine."""
    if not path.is_dir():
        return CheckResult("shared memory", NOTE, f"no {path} on this system")
    free = shutil.disk_usage(path).free
    text = f"{free / GIB:.2f} GiB free in {path}"
    if free < ENOUGH_SHARED_MEMORY and num_ranks > 1:
        return CheckResult("shared memory", NOTE, f"{text}: may be too little for nccl",
                       "docker run --shm-size=1g, or --ipc=host")  # fmt: skip
    return CheckResult("shared memory", OK, text)


def open_files(limits: tuple[int, int]) -> CheckResult:
    """The limit of open files. limits: (soft, hard), -1 for no limit."""
    soft, hard = limits
    if soft == resource.RLIM_INFINITY:
        return CheckResult("open files", OK, "no limit")
    if soft >= ENOUGH_OPEN_FILES:
        return CheckResult("open files", OK, f"limit {soft}")
    possible = hard == resource.RLIM_INFINITY or hard >= ENOUGH_OPEN_FILES
    fix = f"ulimit -n {ENOUGH_OPEN_FILES}" if possible else "raise nofile in limits.conf"
    return CheckResult("open files", NOTE, f"limit {soft}: sockets and shards may need more", fix)


def disk(what: str, directory: Path) -> CheckResult:
    """Whether files can be written there, and how much space is free."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return CheckResult(
            what, PROBLEM, f"cannot write to {directory} ({existing} does not allow it)",
            f"pass another --{what}{'_dir' if what == 'output' else ''}",
        )  # fmt: skip
    free = shutil.disk_usage(existing).free
    text = f"{free / GIB:.1f} GiB free for {directory}"
    if free < LEAST_DISK:
        return CheckResult(what, PROBLEM, text, "free disk space, or pass another directory")
    if free < ENOUGH_DISK:
        return CheckResult(what, NOTE, f"{text}: a checkpoint of BERT-large takes 4 GiB",
                       "free disk space, or pass another directory")  # fmt: skip
    return CheckResult(what, OK, text)


def data(settings: Config) -> Iterator[CheckResult]:
    """Data directory, shards, model configuration and start checkpoint."""
    found = inputs.examined(settings)
    for fault in found.faults:
        yield CheckResult("data", PROBLEM, fault.problem, fault.fix)
    if not found.faults:
        training, evaluation = (len(folder.shards) for folder in found.folders)
        shards = f"{counted(training, 'training shard')}, {counted(evaluation, 'evaluation shard')}"
        verify = f"python -m bert_pretraining data verify {settings.data_dir or 'DIR'}"
        yield CheckResult("data", OK, f"{shards}; '{verify}' checks their content")
        yield CheckResult("checkpoint", OK, str(found.init_checkpoint or "random weights"))


def loopback() -> CheckResult:
    """Whether the ranks of this machine can meet at 127.0.0.1."""
    try:
        check_loopback(LOCAL_ADDRESS)
    except UserError as error:
        return CheckResult("loopback", PROBLEM, error.problem, error.fix)
    return CheckResult("loopback", OK, f"{LOCAL_ADDRESS} answers")


def port(settings: Config, flags: LaunchFlags) -> Iterator[CheckResult]:
    """Whether the rendezvous port is free; only machine 0 opens it."""
    if flags.node_rank > 0:
        yield CheckResult("port", OK, f"opened on {flags.master_addr or 'machine 0'}, not here")
        return
    wanted = flags.master_port or (DEFAULT_PORT if settings.nnodes > 1 else 0)
    try:
        found = free_port(wanted)
    except UserError as error:
        yield CheckResult("port", PROBLEM, error.problem, error.fix)
    else:
        yield CheckResult("port", OK, f"{found} is free" if wanted else "a free port was found")
