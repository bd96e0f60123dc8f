"""The process group: who this process is, and sums over ranks."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bert_pretraining.errors import TrainingError, UserError
from bert_pretraining.runtime import consistency

Made = TypeVar("Made")

# PyTorch 2.13 has new names for these two, and warns of the old ones.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# How long a rank waits for the others: at first, when all have just been started, and later,
# when one may read, evaluate or compile for long.
TO_MEET = timedelta(seconds=90)
TO_WORK = timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """This process among `world_size`, and its device."""

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
    """`--device` -> this rank's device. UserError if there is no such GPU."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device; use --device cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"this machine has {torch.cuda.device_count()} CUDA devices, but the configuration "
            f"wants a rank on device {local_rank}; pass --nproc_per_node "
            f"{torch.cuda.device_count()}, or --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def start(device: str, dist_backend: str, settings: Mapping[str, object] | None = None) -> Ranks:
    """Join the process group that the environment names, or run alone.

    On a CPU the backend becomes gloo. Before anything that takes long, all ranks sum a number.
    TrainingError if they cannot reach each other; UserError if their `settings`, or their
    code, are not the same.
    """
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device, local_rank)
    if world_size > 1 and not dist.is_initialized():
        backend = "gloo" if chosen.type == "cpu" else dist_backend
        try:
            _meet(backend, chosen)
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
                raise
            raise TrainingError(_unreachable(backend, error), f"{error}\n") from error
        if settings is not None:
            name = f"rank {rank} ({socket.gethostname()})"
            fault = consistency.difference(gather((name, consistency.describe(settings))))
            if fault is not None:
                raise UserError(fault)
    return Ranks(rank, world_size, chosen)


def _meet(backend: str, device: torch.device) -> None:
    """Connect all ranks, and see that a sum comes out right."""
    device_id = device if backend == "nccl" else None
    dist.init_process_group(backend, timeout=TO_MEET, device_id=device_id)
    total = sum_over_ranks(torch.ones((), device=device)).item()
    if total != dist.get_world_size():
        raise RuntimeError(f"{dist.get_world_size()} ranks summed 1 to {total}")
    # There is no public name for it; without it, TO_MEET would hold for ever.
    dist.distributed_c10d._set_pg_timeout(TO_WORK)


def _unreachable(backend: str, error: Exception) -> str:
    """One line: who does not reach whom, by which way, and what to set."""
    variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    interface = os.environ.get(variable)
    by = f"{variable}={interface}" if interface else f"an interface that {backend} chose"
    reason = str(error).strip().splitlines()[0].rpartition("] ")[2].removesuffix("$1")
    return (
        f"on {socket.gethostname()} the ranks do not reach each other ({reason}) by {by}, though "
        f"{os.environ.get('MASTER_ADDR')} port {os.environ.get('MASTER_PORT')} (--master_addr, "
        f"--master_port) answers: set {variable}, on each machine, to its interface that the "
        "others can reach ('ip addr' lists them), and let no firewall block ports between them"
    )


def stop() -> None:
    """Leave the process group, if there is one, once every rank is about to."""
    if dist.is_initialized():
        dist.barrier()  # nobody closes a connection that another still reads from
        dist.destroy_process_group()


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
    """Whether the flag is set on any rank; the same answer on every rank."""
    if not dist.is_initialized():
        return flag
    return bool(sum_over_ranks(torch.tensor(int(flag), device=device)).item())


def gather(item: Made) -> list[Made]:
    """Every rank's object, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [item]
    items: list = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def differing_replica(tensors: dict[str, Tensor]) -> str | None:
    """Name the first tensor that another rank holds differently than rank 0, and that rank.

    tensors: the same names and shapes on every rank; floating-point. Compares two checksums
    of a tensor's bits, one of which depends on where they stand. None if all are equal.
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
    """TrainingError, on every rank, if the ranks' weights are not the same to the last bit."""
    differing = differing_replica(weights)
    if differing is not None:
        raise TrainingError(
            f"the ranks hold different weights after {updates} updates: first "
            f"{differing}; look for another start checkpoint, failing memory, or a device or "
            "library that differs"
        )


def _digest(tensor: Tensor) -> Tensor:
    """(2,) int64 of a tensor's bits: their sum, and their sum weighted by position."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(-1).view(kinds[tensor.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), 2**20):  # in pieces, to need little memory
        piece = bits[start : start + 2**20].long()
        places = torch.arange(start + 1, start + 1 + piece.numel(), device=bits.device) % 65521
        total += torch.stack([piece.sum(), (piece * places).sum()])
    return total


def from_main(make: Callable[[], Made]) -> Made:
    """Rank 0's object on every rank; `make()` is called on rank 0 only.

    If it raises there, every rank raises: the same UserError, or a RuntimeError that
    names rank 0's.
    """
    if not dist.is_initialized():
        return make()
    box: list = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            kind = UserError if isinstance(error, UserError) else RuntimeError
            box[1] = kind(str(error))
            dist.broadcast_object_list(box, src=0)
            raise
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]
