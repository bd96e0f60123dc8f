"""What the ranks find out about each other, by messages that do not grow with their number.

Every rank must call each of these, with its device, and each gets the same answer. Without a
process group the answer is that of the one rank.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime import process_group

Item = TypeVar("Item")


class Said(NamedTuple):
    """What a rank had to say."""

    rank: int
    item: object


def said_first(item: object | None, device: torch.device, place: int = 0) -> Said | None:
    """What the first rank said that had something to say; None where each has None.

    One number is exchanged; only if a rank has something to say, that rank sends it to all.

    place: ranks of a lower place come before all of a higher one.
    """
    if not dist.is_initialized():
        return None if item is None else Said(0, item)
    rank, world = dist.get_rank(), dist.get_world_size()
    turn = float("inf") if item is None else place * world + rank
    (first,) = process_group.smallest([turn], device)
    if first == float("inf"):
        return None
    speaker = int(first) % world
    return Said(speaker, from_rank(speaker, item if rank == speaker else None))


def first_said(item: Item | None, device: torch.device) -> Item | None:
    """As `said_first`, without the rank that said it."""
    said = said_first(item, device)
    return None if said is None else said.item


def distinct(texts: Sequence[str], device: torch.device) -> list[str]:
    """All ranks' texts, each once, in the order of ranks. Each is sent once, whoever has it."""
    known: list[str] = []
    while True:
        unknown = next((text for text in texts if text not in known), None)
        more = first_said(unknown, device)
        if more is None:
            return known
        known.append(more)


def largest_of(
    values: Sequence[float], device: torch.device
) -> tuple[list[float], list[int], list[int]]:
    """Each number's largest value of all ranks, a rank that has it, and how many have one above 0.

    Where all are 0 or less, ranks and counts are 0. Every rank must call this; waits for the
    device.

    values: of the same length on every rank. device: of the calling rank.
    """
    # As precise as what is exchanged, to find out whose value is the largest.
    mine = torch.tensor(values, dtype=devices.wide(device)).tolist()
    most = process_group.largest(mine, device)
    if max(most) <= 0:
        return most, [0] * len(mine), [0] * len(mine)
    pairs = zip(mine, most, strict=True)
    who = process_group.largest(
        [dist.get_rank() if own == top else -1 for own, top in pairs], device
    )
    count = process_group.total([float(own > 0) for own in mine], device)
    return most, [int(rank) for rank in who], [round(number) for number in count]


def from_rank(rank: int, item: Item) -> Item:
    """That rank's object, on every rank of a process group."""
    box = [item]
    dist.broadcast_object_list(box, src=rank)
    return box[0]


_DIGIT = 11  # bits that are found in one exchange


def median(value: float, device: torch.device) -> float:
    """The median of the ranks' values, which are not negative; waits for the device.

    All ranks count how many of them have each first digit of their number, then, among those with
    the digit of the middle one, each second digit, and so on: a selection by radix, of numbers in
    float32, whose bits have the order of the numbers. Where two middle values differ less than
    float32 can tell, it may be off by that, a ten-millionth.
    """
    if not dist.is_initialized():
        return value
    world = dist.get_world_size()
    (key,) = struct.unpack("<I", struct.pack("<f", value))
    places = [(world - 1) // 2, world // 2]  # of the two in the middle; one place if odd
    found = [0, 0]
    for shift in (2 * _DIGIT, _DIGIT, 0):
        counts = torch.zeros(2, 2**_DIGIT, dtype=devices.wide(device))
        for row, prefix in zip(counts, found, strict=True):
            if key >> shift + _DIGIT == prefix >> shift + _DIGIT:
                row[key >> shift & 2**_DIGIT - 1] = 1
        counts = process_group.sum_over_ranks(counts.to(device)).cpu()
        for which, place in enumerate(places):
            up_to = counts[which].cumsum(0)
            digit = int(torch.searchsorted(up_to, place, right=True))
            places[which] = place - int(up_to[digit - 1] if digit else 0)
            found[which] |= digit << shift
    middles = process_group.largest([value if key == one else 0.0 for one in found], device)
    return sum(middles) / 2
