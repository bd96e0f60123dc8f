"""The process group: this process's rank, and operations over all ranks."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.utils.store import barrier as barrier_in_store

from bert_pretraining.errors import TrainingError, UserError
from bert_pretraining.runtime import compat, consistency, rank_reports, rank_variables
from bert_pretraining.runtime import device as devices

Made = TypeVar("Made")

# How long a rank waits for the others: for the connection, when all have just been started, and
# for a collective, when another rank may still read, evaluate or compile. The latter is longer than
# the launcher's usual --hang_timeout: the launcher sees all ranks, and knows which one is at fault.
CONNECT_TIMEOUT = timedelta(seconds=90)
COLLECTIVE_TIMEOUT = timedelta(minutes=12)


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the number of ranks, and this rank's device.

    notices: what the user should know of the choice of the device and of the backend.
    """

    rank: int
    world_size: int
    device: torch.device
    notices: tuple[str, ...] = ()

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def choose_backend(kind: str, asked: str) -> tuple[str, str | None]:
    """The backend of the collectives on a type of device, and what the user should know of it.

    asked: --dist_backend. Its default, nccl, stands for the backend that belongs to the device;
    a CPU has gloo in any case. Where PyTorch has no backend for the device, it is gloo, and what
    is sent goes through main memory.

    Raises UserError for another backend that this PyTorch does not have.
    """
    if kind == "cpu":
        return "gloo", None
    if asked not in ("nccl", "gloo") and not dist.is_backend_available(asked):
        raise UserError(
            f"--dist_backend {asked}: this PyTorch has no such backend",
            f"leave it out: devices of type {kind} have {devices.backend(kind) or 'gloo'}",
        )
    chosen = devices.backend(kind) if asked == "nccl" else asked
    if chosen is None or not devices.takes(chosen, kind):
        return "gloo", (
            f"the ranks exchange tensors through main memory, by gloo, since this PyTorch has no "
            f"backend for devices of type {kind}"
            if asked == "nccl"
            else f"dist_backend gloo copies the tensors of devices of type {kind} to main memory"
        )
    return chosen, None if chosen == asked else f"dist_backend {chosen}, which {kind} devices have"


def start(device: str, dist_backend: str, settings: Mapping[str, object] | None = None) -> Ranks:
    """Join the process group that the environment variables describe, or run alone.

    The connection is tested at once by an all-reduce of one number.

    Raises:
        TrainingError: the ranks cannot reach each other.
        UserError: there is no such device or backend, the variables contradict each other, or the
            ranks were started with different `settings` or different code.
    """
    rank, world_size, local_rank = rank_variables.read(os.environ)
    chosen, notices = devices.choose(device, local_rank)
    if world_size > 1 and not dist.is_initialized():
        backend, notice = choose_backend(chosen.type, dist_backend)
        notices = (*notices, notice) if notice else notices
        try:
            _connect(backend, chosen)
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
                raise
            if not rank_reports.is_launched() and re.search("clients|connect to", str(error)):
                raise TrainingError(absent(rank, world_size, error), f"{error}\n") from error
            raise TrainingError(unreachable(backend, error), f"{error}\n") from error
        if settings is not None:
            _check_consistency(rank, settings, chosen)
    return Ranks(rank, world_size, chosen, notices)


def _check_consistency(rank: int, settings: Mapping[str, object], device: torch.device) -> None:
    """Raise UserError on every rank unless all have the same settings, code and versions.

    Only if a hash differs, every rank is sent what all ranks have, to name the difference.
    """
    described = consistency.describe(settings)
    if is_same(repr(sorted(described.items())).encode(), device):
        return
    name = f"rank {rank} ({socket.gethostname()})"
    raise UserError(consistency.difference(gather((name, described))), consistency.FIX)


def _connect(backend: str, device: torch.device) -> None:
    """Connect all ranks, and test the connection by an all-reduce."""
    device_id = device if backend == "nccl" else None
    # PyTorch may not be able to change the timeout of other backends later, nor in debug mode.
    changes = backend in ("nccl", "gloo") and dist.get_debug_level() != dist.DebugLevel.DETAIL
    timeout = CONNECT_TIMEOUT if changes else COLLECTIVE_TIMEOUT
    dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    total = sum_over_ranks(torch.ones((), device=device)).item()
    if total != dist.get_world_size():
        raise RuntimeError(f"{dist.get_world_size()} ranks summed 1 to {total}")
    if changes:
        compat.set_collective_timeout(COLLECTIVE_TIMEOUT)


def absent(rank: int, world_size: int, error: Exception) -> str:
    """One line: the variables make this process one of several ranks, and the others are absent."""
    return (
        f"RANK={rank} and WORLD_SIZE={world_size} of the environment make this process one of "
        f"{world_size} ranks, and the others did not come to {os.environ.get('MASTER_ADDR')} port "
        f"{os.environ.get('MASTER_PORT')} within {CONNECT_TIMEOUT.seconds} s ({_reason(error)}); "
        "start them all, and check that they reach that address; or, if the variables are left "
        "over, run 'unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE'"
    )


def _reason(error: Exception) -> str:
    """PyTorch's reason, without the place in its source."""
    return str(error).strip().splitlines()[0].rpartition("] ")[2].removesuffix("$1")


def unreachable(backend: str, error: Exception) -> str:
    """One line: which host cannot connect, by which interface, and which variable to set."""
    variable = f"{backend.upper()}_SOCKET_IFNAME"  # so it is for nccl, gloo, hccl and mccl
    interface = os.environ.get(variable)
    by = f"{variable}={interface}" if interface else f"an interface that {backend} chose"
    address = f"{os.environ.get('MASTER_ADDR')} port {os.environ.get('MASTER_PORT')}"
    return (
        f"on {socket.gethostname()} the ranks do not reach each other ({_reason(error)}) by {by}, "
        f"though {address} (--master_addr, --master_port) answers; set {variable}, on each "
        "machine, to its interface that the others can reach ('ip addr' lists them), and open the "
        "ports between them in the firewall"
    )


def stop() -> None:
    """Leave the process group, if there is one, together with all other ranks."""
    if dist.is_initialized():
        dist.barrier()  # no rank closes a connection from which another rank still reads
        compat.let_gloo_finish()
        dist.destroy_process_group()


def wait_for_all_to_finish(timeout: timedelta = COLLECTIVE_TIMEOUT) -> None:
    """Wait until every rank of a launched job has called this, at most `timeout`.

    For a rank that ends without leaving the process group (`rank_reports.leave`). The last
    collective may be over for this rank and not for another, which still reads what this process
    or its GPU holds, and would fail if this process ended. Each rank counts itself only when
    its own collectives are complete, on its GPU too; so when all are counted, no rank needs
    another one any more. The count is kept by the launcher of machine 0, not by a rank: a rank
    may end as soon as it has read it.
    """
    devices.synchronize_used()
    world_size = rank_variables.read(os.environ).world_size
    if world_size == 1:
        return
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], rank_variables.port(os.environ),
            timeout=CONNECT_TIMEOUT, wait_for_workers=False,
        )  # fmt: skip
        # Three messages a rank: torch's barrier counts, and then waits in the store.
        barrier_in_store(
            dist.PrefixStore("finished_ranks", store),
            world_size,
            "all",
            barrier_timeout=timeout.total_seconds(),
        )
    except dist.DistError:
        # The launcher that keeps the count has ended, so its job is over on every machine; or the
        # time is up.
        return


def is_first_of_its_machine() -> bool:
    """Whether this process is the first rank of its machine; true outside of a process group."""
    return not dist.is_initialized() or rank_variables.read(os.environ).local_rank == 0


def barrier(device: torch.device) -> None:
    """Wait for every rank, and for this rank's device."""
    devices.synchronize(device)
    if dist.is_initialized():
        dist.barrier()


def sendable(tensor: Tensor) -> Tensor:
    """The tensor, or its copy in main memory if the backend cannot take it from its device."""
    if devices.takes(dist.get_backend(), tensor.device.type):
        return tensor
    return tensor.cpu()


def sends_from_device(device: torch.device) -> bool:
    """Whether the backend takes tensors of the device as they are; true for one rank."""
    return not dist.is_initialized() or devices.takes(dist.get_backend(), device.type)


class InProgress:
    """A collective in progress, and where its result goes when it has come."""

    def __init__(self, work: dist.Work, received: Tensor, into: Tensor) -> None:
        self._work, self._received, self._into = work, received, into

    def wait(self) -> None:
        """Wait until the result is in its place; on a device, as far as its stream is concerned."""
        self._work.wait()
        if self._received is not self._into:
            self._into.copy_(self._received)


def all_reduce(values: Tensor, operation: Any = dist.ReduceOp.SUM) -> InProgress:
    """Begin to sum `values` elementwise over the ranks, in place; until `wait`, leave them.

    operation: another member of dist.ReduceOp than the sum, if asked for.
    """
    sent = sendable(values)
    return InProgress(dist.all_reduce(sent, op=operation, async_op=True), sent, values)


def reduce_scatter(piece: Tensor, values: Tensor) -> InProgress:
    """Begin to sum `values` (n,) over the ranks; `piece` (n / ranks,) gets this rank's part."""
    received = _received(piece)
    work = compat.reduce_scatter(received, sendable(values), async_op=True)
    return InProgress(work, received, piece)


def all_gather(values: Tensor, piece: Tensor) -> InProgress:
    """Begin to join the ranks' pieces (n / ranks,) in `values` (n,), in the order of ranks."""
    received = _received(values)
    work = compat.all_gather(received, sendable(piece), async_op=True)
    return InProgress(work, received, values)


def _received(into: Tensor) -> Tensor:
    """Where the backend puts a result for a tensor: there, or in main memory."""
    return into if sends_from_device(into.device) else torch.empty_like(into, device="cpu")


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum `values` elementwise over the ranks, in place; the same on every rank after."""
    if dist.is_initialized():
        all_reduce(values).wait()
    return values


def total(values: Sequence[float], device: torch.device) -> list[float]:
    """Elementwise the sum of all ranks' values; waits for the device, which is the caller's."""
    return _reduced(values, device, dist.ReduceOp.SUM)


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """Elementwise the largest of all ranks' values; waits for the device, which is the caller's."""
    return _reduced(values, device, dist.ReduceOp.MAX)


def smallest(values: Sequence[float], device: torch.device) -> list[float]:
    """As `largest`, but the smallest of all ranks' values."""
    return _reduced(values, device, dist.ReduceOp.MIN)


def _reduced(values: Sequence[float], device: torch.device, operation: Any) -> list[float]:
    """Numbers keep at least 24 binary digits, so that those of ranks and bytes are exact."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    numbers = torch.tensor(values, dtype=devices.wide(device)).to(device)
    all_reduce(numbers, operation).wait()
    return numbers.tolist()


def is_same(content: bytes, device: torch.device) -> bool:
    """Whether all ranks gave the same bytes; ten numbers are exchanged, a hash of 120 bits."""
    digest = hashlib.sha256(content).digest()
    parts = [int.from_bytes(digest[start : start + 3], "big") for start in range(0, 15, 3)]
    found = largest([*parts, *(-part for part in parts)], device)
    return all(high == -low for high, low in zip(found[:5], found[5:], strict=True))


def gather_rows(row: Sequence[float], device: torch.device) -> list[list[float]]:
    """The rows of all ranks, in the order of ranks; waits for the device.

    Every rank holds all rows after. So it is for measurements of their own, not for training.

    row: of the same length on every rank. device: of the calling rank. Numbers have at least 24
    binary digits.
    """
    if not dist.is_initialized():
        return [list(row)]
    piece = torch.tensor(row, dtype=devices.wide(device)).to(device)
    rows = torch.empty(dist.get_world_size() * len(row), dtype=piece.dtype, device=device)
    all_gather(rows, piece).wait()
    return rows.view(-1, len(row)).tolist()


def gather(item: Made) -> list[Made]:
    """The objects of all ranks, in the order of ranks; every rank gets all of them.

    Their size grows with the number of ranks: never between two log lines. See `agreement` for
    less.
    """
    if not dist.is_initialized():
        return [item]
    items: list = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def gather_to_main(item: Made) -> list[Made] | None:
    """The objects of all ranks on rank 0, in the order of ranks; None on the others.

    They are sent to every rank, and dropped there. PyTorch's gather makes rank 0 open a connection
    to each other rank on NCCL, which fails with thousands of ranks (pytorch/pytorch#188193), and
    HCCL has none.
    """
    items = gather(item)
    return items if not dist.is_initialized() or dist.get_rank() == 0 else None


def from_main(make: Callable[[], Made]) -> Made:
    """Call `make()` on rank 0, and return its object on every rank.

    If `make()` raises, every rank raises: the same UserError, or for any other exception a
    RuntimeError with its message.
    """
    if not dist.is_initialized():
        return make()
    box: list = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error if type(error) is UserError else RuntimeError(str(error))
            dist.broadcast_object_list(box, src=0)
            raise
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]
