"""The process group: this process's rank, and operations over all ranks."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bert_pretraining.errors import TrainingError, UserError
from bert_pretraining.runtime import compat, consistency

Made = TypeVar("Made")

# How long a rank waits for the others: for the connection, when all have just been started, and
# for a collective, when another rank may still read, evaluate or compile.
CONNECT_TIMEOUT = timedelta(seconds=90)
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the number of ranks, and this rank's device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        if self.device.type == "cpu":
            return "CPU"
        return torch.cuda.get_device_name(self.device)


def choose_device(device: str, local_rank: int) -> torch.device:
    """This rank's device, as --device asks. Raises UserError if there is no such GPU."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device", "use --device cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"this machine has {torch.cuda.device_count()} CUDA devices, but the configuration "
            f"wants a rank on device {local_rank}",
            f"pass --nproc_per_node {torch.cuda.device_count()}, or --device cpu",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def start(device: str, dist_backend: str, settings: Mapping[str, object] | None = None) -> Ranks:
    """Join the process group that the environment variables describe, or run alone.

    On a CPU the backend is gloo. The connection is tested at once by an all-reduce of one number.

    Raises:
        TrainingError: the ranks cannot reach each other.
        UserError: the ranks were started with different `settings` or different code.
    """
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device, local_rank)
    if world_size > 1 and not dist.is_initialized():
        backend = "gloo" if chosen.type == "cpu" else dist_backend
        try:
            _connect(backend, chosen)
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
                raise
            raise TrainingError(unreachable(backend, error), f"{error}\n") from error
        if settings is not None:
            name = f"rank {rank} ({socket.gethostname()})"
            fault = consistency.difference(gather((name, consistency.describe(settings))))
            if fault is not None:
                raise UserError(fault, consistency.FIX)
    return Ranks(rank, world_size, chosen)


def _connect(backend: str, device: torch.device) -> None:
    """Connect all ranks, and test the connection by an all-reduce."""
    device_id = device if backend == "nccl" else None
    dist.init_process_group(backend, timeout=CONNECT_TIMEOUT, device_id=device_id)
    total = sum_over_ranks(torch.ones((), device=device)).item()
    if total != dist.get_world_size():
        raise RuntimeError(f"{dist.get_world_size()} ranks summed 1 to {total}")
    # Without it, CONNECT_TIMEOUT would stay in force.
    compat.set_collective_timeout(COLLECTIVE_TIMEOUT)


def unreachable(backend: str, error: Exception) -> str:
    """One line: which host cannot connect, by which interface, and which variable to set."""
    variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    interface = os.environ.get(variable)
    by = f"{variable}={interface}" if interface else f"an interface that {backend} chose"
    reason = str(error).strip().splitlines()[0].rpartition("] ")[2].removesuffix("$1")
    return (
        f"on {socket.gethostname()} the ranks do not reach each other ({reason}) by {by}, though "
        f"{os.environ.get('MASTER_ADDR')} port {os.environ.get('MASTER_PORT')} (--master_addr, "
        f"--master_port) answers; set {variable}, on each machine, to its interface that the "
        "others can reach ('ip addr' lists them), and open the ports between them in the firewall"
    )


def stop() -> None:
    """Leave the process group, if there is one, together with all other ranks."""
    if dist.is_initialized():
        dist.barrier()  # no rank closes a connection from which another rank still reads
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
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
            timeout=CONNECT_TIMEOUT, wait_for_workers=False,
        )  # fmt: skip
        finished = dist.PrefixStore("finished_ranks", store)
        finished.add("count", 1)
        while finished.add("count", 0) < world_size and time.monotonic() < deadline:
            time.sleep(0.02)
    except dist.DistError:
        # The launcher that keeps the count has ended: its job is over, on every machine.
        return


def barrier(device: torch.device) -> None:
    """Wait for every rank, and for this rank's device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum `values` elementwise over the ranks, in place; the same on every rank after."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on at least one rank; every rank gets the same answer."""
    if not dist.is_initialized():
        return flag
    return bool(sum_over_ranks(torch.tensor(int(flag), device=device)).item())


def gather(item: Made) -> list[Made]:
    """The objects of all ranks, in the order of ranks; every rank gets all of them."""
    if not dist.is_initialized():
        return [item]
    items: list = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def differing_replica(tensors: dict[str, Tensor]) -> str | None:
    """The first tensor that differs between rank 0 and another rank, and that rank; or None.

    Two checksums of each tensor's bits are compared; one depends on the order of the elements.

    tensors: floating-point, with the same names and shapes on every rank.
    """
    if not dist.is_initialized():
        return None
    digests = torch.stack([_digest(tensor) for tensor in tensors.values()]).cpu()
    for rank, other in enumerate(gather(digests)):
        if rank == 0:
            first = other
        elif not torch.equal(first, other):
            index = int((first != other).any(dim=1).nonzero()[0])
            return f"{list(tensors)[index]} on rank {rank}"
    return None


def check_replicas(weights: dict[str, Tensor], updates: int) -> None:
    """Raise TrainingError on every rank unless all ranks' weights are equal to the last bit."""
    differing = differing_replica(weights)
    if differing is not None:
        raise TrainingError(
            f"the ranks hold different weights after {updates} updates: first "
            f"{differing}; check for ranks that started from other checkpoints or have faulty "
            "memory, another device or another library version"
        )


def _digest(tensor: Tensor) -> Tensor:
    """(2,) int64, two checksums of a tensor's bits: their sum, and one weighted by position."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(-1).view(kinds[tensor.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), 2**20):  # in pieces, to use little memory
        piece = bits[start : start + 2**20].long()
        places = torch.arange(start + 1, start + 1 + piece.numel(), device=bits.device) % 65521
        total += torch.stack([piece.sum(), (piece * places).sum()])
    return total


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
