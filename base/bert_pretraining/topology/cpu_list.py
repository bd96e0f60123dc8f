"""Linux's notation for sets of CPUs: 0-3,8."""

from __future__ import annotations


def parse(text: str) -> tuple[int, ...]:
    """ "0-3,8" -> (0, 1, 2, 3, 8); "" -> (). ValueError for anything else."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        if part:
            low, _, high = part.partition("-")
            numbers |= set(range(int(low), int(high or low) + 1))
    return tuple(sorted(numbers))


def show(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 3, 8) -> "0-3,8"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)
