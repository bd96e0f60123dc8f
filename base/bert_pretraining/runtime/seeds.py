"""Every seed of a run, derived from one master seed by hashing, a different one for each use."""

from __future__ import annotations

import hashlib
import secrets


def draw_master_seed() -> int:
    """A master seed from the operating system's entropy, in [0, 2**31)."""
    return secrets.randbelow(2**31)


def derive(master_seed: int, *purpose: object) -> int:
    """A 32-bit seed for one purpose, e.g. `derive(seed, "worker", rank)`.

    SHA-256 of the purpose's text: equal on every platform and Python version, and
    statistically independent between purposes.
    """
    text = "/".join([str(master_seed), *(str(part) for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def worker_seeds(master_seed: int, ranks: int) -> list[int]:
    """The seed of each rank's dropout, in the order of ranks, all different.

    Of 4,096 numbers of 32 bits two are equal with one master seed in 500. The later rank then
    takes another one.
    """
    taken: dict[int, None] = {}  # ordered, as a list, and fast to search
    for rank in range(ranks):
        seed, trials = derive(master_seed, "worker", rank), 0
        while seed in taken:
            trials += 1
            seed = derive(master_seed, "worker", rank, trials)
        taken[seed] = None
    return list(taken)


def worker_seed(master_seed: int, rank: int) -> int:
    """The seed of one rank's dropout, whatever the number of ranks."""
    return worker_seeds(master_seed, rank + 1)[rank]


def model_seed(master_seed: int) -> int:
    """The seed of randomly initialised weights: the same on every rank."""
    return derive(master_seed, "model")
