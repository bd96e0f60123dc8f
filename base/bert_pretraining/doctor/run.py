"""What a run reads, writes and connects to: limits, disks, data, port."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from bert_pretraining.config import Config
from bert_pretraining.data import inputs
from bert_pretraining.doctor.report import NOTE, OK, PROBLEM, Finding
from bert_pretraining.errors import UserError
from bert_pretraining.launch.plan import DEFAULT_PORT, LaunchFlags
from bert_pretraining.launch.port import free_port
from bert_pretraining.runtime.files import shard_files

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
# Docker gives 64 MiB, which NCCL's rings between the GPUs of a machine outgrow.
ENOUGH_SHARED_MEMORY = 0.5 * GIB
ENOUGH_OPEN_FILES = 1024
# BERT-large: weights and LAMB's two moments in float32, 336 million numbers each.
ENOUGH_DISK = 4 * GIB
LEAST_DISK = 0.1 * GIB


def findings(settings: Config, flags: LaunchFlags, looks_at_data: bool) -> Iterator[Finding]:
    """All of them."""
    yield shared_memory(settings.nproc_per_node)
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE))
    yield disk("output", Path(settings.resolved_output_dir))
    if flags.log_dir:
        yield disk("log_dir", Path(flags.log_dir))
    if looks_at_data:
        yield from data(settings)
    else:
        yield Finding("data", OK, "not looked at: pass --data_dir DIR, or --name and --config")
    yield from port(settings, flags)


def shared_memory(num_ranks: int, path: Path = SHARED_MEMORY) -> Finding:
    """NCCL keeps its buffers between the GPUs of a machine there."""
    if not path.is_dir():
        return Finding("shared memory", NOTE, f"no {path} on this system")
    free = shutil.disk_usage(path).free
    text = f"{free / GIB:.2f} GiB free in {path}"
    if free < ENOUGH_SHARED_MEMORY and num_ranks > 1:
        return Finding("shared memory", NOTE, f"{text}: little for nccl",
                       "docker run --shm-size=1g, or --ipc=host")  # fmt: skip
    return Finding("shared memory", OK, text)


def open_files(limits: tuple[int, int]) -> Finding:
    """limits: (soft, hard), -1 for none."""
    soft, hard = limits
    if soft == resource.RLIM_INFINITY:
        return Finding("open files", OK, "no limit")
    if soft >= ENOUGH_OPEN_FILES:
        return Finding("open files", OK, f"limit {soft}")
    possible = hard == resource.RLIM_INFINITY or hard >= ENOUGH_OPEN_FILES
    fix = f"ulimit -n {ENOUGH_OPEN_FILES}" if possible else "raise nofile in limits.conf"
    return Finding("open files", NOTE, f"limit {soft}: sockets and shards may exceed it", fix)


def disk(what: str, directory: Path) -> Finding:
    """Whether files can be written there, and how much room is left."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding(what, PROBLEM, f"cannot write to {directory} ({existing} does not allow it)",
                       f"pass another --{what}{'_dir' if what == 'output' else ''}")  # fmt: skip
    free = shutil.disk_usage(existing).free
    text = f"{free / GIB:.1f} GiB free for {directory}"
    if free < LEAST_DISK:
        return Finding(what, PROBLEM, text, "make room, or pass another directory")
    if free < ENOUGH_DISK:
        return Finding(what, NOTE, f"{text}: a checkpoint of BERT-large takes 4 GiB",
                       "make room, or pass another directory")  # fmt: skip
    return Finding(what, OK, text)


def data(settings: Config) -> Iterator[Finding]:
    """Data directory, shards, model configuration and start checkpoint."""
    faults = inputs.faults(settings)
    for fault in faults:
        text, _, fix = fault.partition("; ")
        yield Finding("data", PROBLEM, text, fix)
    if not faults:
        paths = inputs.data_paths(settings)
        training, evaluation = (
            len(shard_files(path, "")) for path in (paths.train_dir, paths.eval_dir)
        )
        yield Finding("data", OK, f"{training} training and {evaluation} evaluation shards; "
                      "`data verify DIR` looks inside")  # fmt: skip
        yield Finding("checkpoint", OK, str(paths.init_checkpoint or "random weights"))


def port(settings: Config, flags: LaunchFlags) -> Iterator[Finding]:
    """Whether ranks can meet at the port; only machine 0 opens it."""
    if flags.node_rank > 0:
        yield Finding("port", OK, f"not opened here, but on {flags.master_addr}")
        return
    wanted = flags.master_port or (DEFAULT_PORT if settings.nnodes > 1 else 0)
    try:
        found = free_port(wanted)
    except UserError as error:
        text, _, fix = str(error).partition("; ")
        yield Finding("port", PROBLEM, text, fix)
    else:
        yield Finding("port", OK, f"{found} is free" if wanted else "a free one is there")
