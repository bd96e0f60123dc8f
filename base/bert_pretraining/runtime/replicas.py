"""Whether all ranks hold the same weights, to the last bit."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from bert_pretraining.errors import TrainingError
from bert_pretraining.runtime import process_group


def differing_replica(tensors: dict[str, Tensor]) -> str | None:
    """The first tensor that differs between rank 0 and another rank, and that rank; or None.

    Two checksums of each tensor's bits are compared; one depends on the order of the elements. A
    hash of all of them is exchanged, and only if it differs, the checksums.

    tensors: floating-point, with the same names and shapes on every rank.
    """
    if not dist.is_initialized():
        return None
    digests = torch.stack([digest(tensor) for tensor in tensors.values()])
    device, digests = digests.device, digests.cpu()
    if process_group.is_same(digests.numpy().tobytes(), device):
        return None
    for rank, other in enumerate(process_group.gather(digests)):
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


def digest(tensor: Tensor) -> Tensor:
    """(2,) int64, two checksums of a tensor's bits: their sum, and one weighted by position."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(-1).view(kinds[tensor.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), 2**20):  # in pieces, to use little memory
        piece = bits[start : start + 2**20].long()
        places = torch.arange(start + 1, start + 1 + piece.numel(), device=bits.device) % 65521
        total += torch.stack([piece.sum(), (piece * places).sum()])
    return total
