"""CRC-32C (Castagnoli) of arrays in NumPy alone, for many bytes at once.

A CRC that starts from 0 is linear over GF(2). The CRC of two blocks in a row is therefore
the CRC of the first block, shifted by the length of the second, XOR the CRC of the second.
So all words of a piece are looked up in tables at once, and then combined in pairs.
Polynomial and bit order: RFC 3720, 12.1.
"""

from __future__ import annotations

import functools

import numpy as np

POLYNOMIAL = 0x82F63B78  # bit 0 stands for the highest power
ALL_ONES = 0xFFFFFFFF
PIECE_POWER = 20  # 2^20 bytes are combined at once
STRIP = 1 << 14  # rows of 8 bytes that are looked up at once; they fit in the cache


def crc32c(data: np.ndarray) -> int:
    """The CRC-32C of `data`, (N,) uint8."""
    piece = 1 << PIECE_POWER
    first = len(data) % piece
    register = _from_zero(data[:first])
    for start in range(first, len(data), piece):
        register = _shift(register, PIECE_POWER) ^ _from_zero(data[start : start + piece])
    ones = ALL_ONES
    for power in range(len(data).bit_length()):
        if len(data) >> power & 1:
            ones = _shift(ones, power)
    return register ^ ones ^ ALL_ONES


def masked_crc32c(data: np.ndarray) -> int:
    """The CRC-32C as TensorFlow stores it: rotated, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & ALL_ONES


def _from_zero(data: np.ndarray) -> int:
    """The register after `data` (at most one piece), if it was 0 before."""
    if not len(data):
        return 0
    power = max(3, (len(data) - 1).bit_length())
    if len(data) < 1 << power:  # zeros in front do not change a register of 0
        data = np.concatenate([np.zeros((1 << power) - len(data), np.uint8), data])
    words = np.ascontiguousarray(data).view("<u2").reshape(-1, 4)
    registers = np.concatenate(
        [_eight_bytes(words[row : row + STRIP]) for row in range(0, len(words), STRIP)]
    )
    while len(registers) > 1:
        power -= 1
        low, high = _tables(power)
        first, second = np.split(registers, 2)
        registers = low.take(first & 0xFFFF) ^ high.take(first >> 16) ^ second
    return int(registers[0])


def _eight_bytes(words: np.ndarray) -> np.ndarray:
    """The register after each row of four words, (N, 4) uint16, if it was 0 before: (N,)."""
    far, near = _tables(3), _tables(2)
    registers = far[0].take(words[:, 0])
    registers ^= far[1].take(words[:, 1])
    registers ^= near[0].take(words[:, 2])
    registers ^= near[1].take(words[:, 3])
    return registers


def _shift(register: int, power: int) -> int:
    """The register after 2^power zero bytes more."""
    images = _shifted_bits(power)
    return functools.reduce(
        lambda shifted, bit: shifted ^ images[bit] if register >> bit & 1 else shifted,
        range(32),
        0,
    )


@functools.cache
def _shifted_bits(power: int) -> tuple[int, ...]:
    """What each of the 32 bits of the register becomes after 2^power zero bytes."""
    if power:
        half = _shifted_bits(power - 1)
        return tuple(_shift(bit, power - 1) for bit in half)
    bits = [1 << bit for bit in range(32)]
    for _ in range(8):
        bits = [bit >> 1 ^ (POLYNOMIAL if bit & 1 else 0) for bit in bits]
    return tuple(bits)


@functools.cache
def _tables(power: int) -> tuple[np.ndarray, np.ndarray]:
    """What every low and every high half of a register becomes after 2^power zero bytes.

    Returns two tables of (65536,) uint32.
    """
    images = np.array(_shifted_bits(power), np.uint32)
    tables = []
    for half in (images[:16], images[16:]):
        table = np.zeros(1, np.uint32)
        for image in half:
            table = np.concatenate([table, table ^ image])
        tables.append(table)
    return tables[0], tables[1]
