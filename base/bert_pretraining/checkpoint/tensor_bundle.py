"""Reading the checkpoint files of TensorFlow without TensorFlow.

`NAME.index` is a table from variable names to BundleEntryProto; its empty key holds a
BundleHeaderProto. It has LevelDB's format: sorted, prefix-compressed entries in blocks, a
block with the positions of the others, and a footer. The numbers are in
`NAME.data-00000-of-00001`.
Formats: tensorflow/core/lib/io/format.cc, tensorflow/core/protobuf/tensor_bundle.proto.
The CRC-32C of every block and of every tensor that is read is verified.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bert_pretraining.checkpoint.crc32c import masked_crc32c
from bert_pretraining.errors import UserError
from bert_pretraining.runtime.file_kind import AGAIN, cannot_read, kind_of, not_the_kind
from bert_pretraining.runtime.files import with_ending

FOOTER_BYTES = 48
TABLE_MAGIC = 0xDB4775248B80FB57
BLOCK_TRAILER_BYTES = 5  # compression, CRC
VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5
DTYPES = {  # of tensorflow/core/framework/types.proto
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    4: torch.uint8,
    5: torch.int16,
    6: torch.int8,
    9: torch.int64,
    10: torch.bool,
    14: torch.bfloat16,
    19: torch.float16,
}


@dataclass(frozen=True)
class Entry:
    """Where a variable is stored: `size` bytes from `offset` on, in data file `shard`."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    masked_crc: int
    partitioned: bool


class TensorBundle:
    """The variables of a checkpoint by name. A variable is read when it is asked for."""

    def __init__(self, prefix: Path) -> None:
        """prefix: the path without `.index`. UserError for a damaged or unreadable index."""
        self.prefix = prefix
        self.index = with_ending(prefix, ".index")
        self._shards: dict[int, np.ndarray] = {}
        try:
            content = self.index.read_bytes()
        except OSError as error:
            raise cannot_read(self.index, error) from error
        try:
            table = dict(_table(content))
            header = _message(table.pop(b""))
            self.entries = {key.decode(): _entry(value) for key, value in table.items()}
        except (ValueError, TypeError, LookupError, struct.error) as error:
            kind = kind_of(self.index)
            if kind is not None and kind.key != "tensorflow_index":
                raise not_the_kind(self.index, "the index of a TensorFlow checkpoint") from error
            raise UserError(
                f"{self.index}: damaged or no index of a TensorFlow checkpoint ({error})", AGAIN
            ) from error
        self.num_shards = _number(header, 1)
        if _number(header, 2):
            raise UserError(
                f"{self.index}: big-endian numbers are not supported",
                "save it with a little-endian machine",
            )

    def tensor(self, name: str) -> Tensor:
        """The numbers of one variable, memory-mapped; UserError if they are damaged."""
        entry = self.entries[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None or entry.partitioned:
            what = "is partitioned" if entry.partitioned else f"has type number {entry.dtype}"
            raise UserError(
                f"{self.index}: {name} {what}, which cannot be read",
                "save the checkpoint again in one part, with usual types",
            )
        shard = self._shard(entry.shard)
        if entry.size != math.prod(entry.shape) * dtype.itemsize:
            raise UserError(f"{self.index}: {name}: size and shape disagree", AGAIN)
        if entry.offset + entry.size > len(shard):
            raise UserError(
                f"{self._shard_path(entry.shard)}: cut off, {name} lies beyond its end",
                AGAIN,
            )
        numbers = shard[entry.offset : entry.offset + entry.size]
        if masked_crc32c(numbers) != entry.masked_crc:
            raise UserError(
                f"{self._shard_path(entry.shard)}: wrong checksum (CRC-32C) of {name}: the file "
                "is damaged",
                AGAIN,
            )
        if not entry.size:
            return torch.empty(entry.shape, dtype=dtype)
        if entry.offset % dtype.itemsize:
            numbers = numbers.copy()
        return torch.from_numpy(np.asarray(numbers)).view(dtype).reshape(entry.shape)

    def _shard_path(self, number: int) -> Path:
        return with_ending(self.prefix, f".data-{number:05d}-of-{self.num_shards:05d}")

    def _shard(self, number: int) -> np.ndarray:
        """All bytes of a data file, (N,) uint8, memory-mapped; writing to them keeps the file."""
        if number not in self._shards:
            path = self._shard_path(number)
            try:
                self._shards[number] = np.memmap(path, np.uint8, "c")
            except FileNotFoundError as error:
                raise UserError(f"no {path} beside {self.index}", "copy both") from error
            except ValueError as error:
                raise UserError(f"{path}: an empty file", AGAIN) from error
            except OSError as error:
                raise cannot_read(path, error) from error
        return self._shards[number]


def _table(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Every key and value of a table file. Raises ValueError that says what is wrong."""
    if len(content) < FOOTER_BYTES:
        raise ValueError("cut off" if content else "empty")
    footer = content[-FOOTER_BYTES:]
    if struct.unpack("<Q", footer[-8:])[0] != TABLE_MAGIC:
        raise ValueError("its last bytes are not a table's")
    _, position = _block_position(footer, 0)
    (offset, size), _ = _block_position(footer, position)
    for _, value in _block(content, offset, size):
        (offset, size), _ = _block_position(value, 0)
        yield from _block(content, offset, size)


def _block_position(data: bytes, position: int) -> tuple[tuple[int, int], int]:
    """The offset and size of a block, and the position in `data` behind them."""
    offset, position = _varint(data, position)
    size, position = _varint(data, position)
    return (offset, size), position


def _block(content: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Every key and value of a block."""
    end = offset + size
    if end + BLOCK_TRAILER_BYTES > len(content):
        raise ValueError("a block lies beyond the end")
    compression, masked_crc = struct.unpack("<BI", content[end : end + BLOCK_TRAILER_BYTES])
    if masked_crc32c(np.frombuffer(content[offset : end + 1], np.uint8)) != masked_crc:
        raise ValueError("wrong checksum (CRC-32C) of a block")
    if compression:
        raise ValueError(f"blocks compressed by method {compression}; only plain ones are read")
    block = content[offset:end]
    (num_restarts,) = struct.unpack("<I", block[-4:])
    entries_end = len(block) - 4 - 4 * num_restarts
    if entries_end < 0:
        raise ValueError("a block shorter than its list of restarts")
    key, position = b"", 0
    while position < entries_end:
        shared, position = _varint(block, position)
        unshared, position = _varint(block, position)
        length, position = _varint(block, position)
        if shared > len(key) or position + unshared + length > entries_end:
            raise ValueError("an entry longer than its block")
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        yield key, block[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number in 7 bits of each byte, low bits first, and the position in `data` behind it."""
    number = 0
    for shift in range(0, 64, 7):
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise ValueError("a number of more than 64 bits")


def _message(data: bytes) -> dict[int, list[int | bytes]]:
    """The fields of a protocol buffer message by number."""
    fields: dict[int, list[int | bytes]] = {}
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == VARINT:
            value, position = _varint(data, position)
        elif kind in (FIXED32, FIXED64):
            width, form = (4, "<I") if kind == FIXED32 else (8, "<Q")
            (value,) = struct.unpack(form, data[position : position + width])
            position += width
        elif kind == LENGTH_DELIMITED:
            length, position = _varint(data, position)
            value = data[position : position + length]
            position += length
            if position > len(data):
                raise ValueError("a field longer than its message")
        else:
            raise ValueError(f"a field of unknown kind {kind}")
        fields.setdefault(key >> 3, []).append(value)
    return fields


def _number(fields: dict[int, list[int | bytes]], field: int) -> int:
    """A numeric field; 0 if it is missing."""
    value = fields.get(field, [0])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {field} is no number")
    return value


def _entry(data: bytes) -> Entry:
    """A BundleEntryProto."""
    fields = _message(data)
    shape = []
    for part in fields.get(2, []):
        for dimension in _message(part).get(2, []):
            shape.append(_number(_message(dimension), 1))
    return Entry(
        dtype=_number(fields, 1),
        shape=tuple(shape),
        shard=_number(fields, 3),
        offset=_number(fields, 4),
        size=_number(fields, 5),
        masked_crc=_number(fields, 6),
        partitioned=7 in fields,
    )
