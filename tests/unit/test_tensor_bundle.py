"""TensorFlow's checkpoint files: read right, and every damage named."""

from __future__ import annotations

import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from bert_pretraining.checkpoint import read_weights
from bert_pretraining.checkpoint.crc32c import PIECE_POWER, crc32c, masked_crc32c
from bert_pretraining.checkpoint.tensor_bundle import TABLE_MAGIC, TensorBundle
from bert_pretraining.errors import UserError
from helpers import REFERENCE, needs_reference

TF1 = REFERENCE / "checkpoint/tf1/model.ckpt-28252"


def byte_by_byte(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def test_crc_of_known_texts() -> None:
    """The examples of RFC 3720, B.4, and the polynomial's check value."""
    for data, expected in (
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"", 0),
    ):
        assert crc32c(np.frombuffer(data, np.uint8)) == expected


@pytest.mark.parametrize("length", [*range(1, 20), 255, 256, 257, 4097])
def test_crc_of_every_length(length: int) -> None:
    data = random.Random(length).randbytes(length)
    assert crc32c(np.frombuffer(data, np.uint8)) == byte_by_byte(data)


def test_crc_over_several_pieces() -> None:
    """A CRC goes on where it stopped: appending its own bytes gives a constant residue."""
    data = np.random.RandomState(0).bytes((1 << PIECE_POWER) * 2 + 12345)
    crc = crc32c(np.frombuffer(data, np.uint8))
    whole = data + struct.pack("<I", crc)
    assert crc32c(np.frombuffer(whole, np.uint8)) == 0x48674BC7
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    assert crc32c(np.frombuffer(bytes(flipped), np.uint8)) != crc


# ---- a writer of the format, written from its description, for what the fixture has not


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def entry(
    dtype: int, shape: tuple[int, ...], shard: int, offset: int, data: bytes, more: bytes = b""
) -> bytes:
    dimensions = b"".join(field(2, field(1, size)) for size in shape)
    crc = struct.pack("<I", masked_crc32c(np.frombuffer(data, np.uint8)))
    return (
        field(1, dtype) + field(2, dimensions) + field(3, shard) + field(4, offset)
        + field(5, len(data)) + varint(6 << 3 | 5) + crc + more
    )  # fmt: skip


def block(pairs: list[tuple[bytes, bytes]], compression: int = 0) -> bytes:
    content, last = bytearray(), b""
    for key, value in pairs:
        shared = 0
        while shared < min(len(last), len(key)) and last[shared] == key[shared]:
            shared += 1
        content += varint(shared) + varint(len(key) - shared) + varint(len(value))
        content += key[shared:] + value
        last = key
    content += struct.pack("<II", 0, 1) + bytes([compression])
    crc = masked_crc32c(np.frombuffer(bytes(content), np.uint8))
    return bytes(content) + struct.pack("<I", crc)


def write_bundle(
    prefix: Path,
    variables: dict[str, bytes],
    shards: list[bytes],
    endianness: int = 0,
    compression: int = 0,
) -> None:
    """variables: name -> BundleEntryProto. Two to a block, to have several."""
    header = field(1, len(shards)) + (field(2, endianness) if endianness else b"")
    pairs = [(b"", header), *sorted((name.encode(), value) for name, value in variables.items())]
    content, index = b"", []
    for start in range(0, len(pairs), 2):
        written = block(pairs[start : start + 2], compression)
        position = varint(len(content)) + varint(len(written) - 5)
        index.append((pairs[min(start + 1, len(pairs) - 1)][0], position))
        content += written
    written = block(index)
    footer = varint(0) + varint(0) + varint(len(content)) + varint(len(written) - 5)
    content += written + footer.ljust(40, b"\0") + struct.pack("<Q", TABLE_MAGIC)
    prefix.with_name(prefix.name + ".index").write_bytes(content)
    for number, data in enumerate(shards):
        name = f"{prefix.name}.data-{number:05d}-of-{len(shards):05d}"
        prefix.with_name(name).write_bytes(data)


def test_types_shards_and_blocks(tmp_path: Path) -> None:
    tensors = {
        "a/float": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "a/half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "b/brain": torch.tensor([3.0, 0.5, -1.0], dtype=torch.bfloat16),
        "b/flags": torch.tensor([True, False, True]),
        "c/long": torch.tensor(28252),
        "c/double": torch.tensor([[1e300]], dtype=torch.float64),
        "d/empty": torch.zeros(0, 4),
    }
    types = {torch.float32: 1, torch.float16: 19, torch.bfloat16: 14, torch.bool: 10,
             torch.int64: 9, torch.float64: 2}  # fmt: skip
    shards, variables = [bytearray(b"?"), bytearray()], {}  # "?": nothing lies aligned
    for number, (name, value) in enumerate(tensors.items()):
        shard = shards[number % 2]
        data = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        variables[name] = entry(
            types[value.dtype], tuple(value.shape), number % 2, len(shard), data
        )
        shard += data
    write_bundle(tmp_path / "model.ckpt-1", variables, [bytes(shard) for shard in shards])
    bundle = TensorBundle(tmp_path / "model.ckpt-1")
    assert sorted(bundle.entries) == sorted(tensors)
    for name, value in tensors.items():
        found = bundle.tensor(name)
        assert (found.dtype, found.shape) == (value.dtype, value.shape), name
        assert torch.equal(found, value), name


@pytest.mark.parametrize(
    ("variable", "options", "words"),
    [
        (entry(7, (1,), 0, 0, b"text"), {}, "a has type number 7, which cannot be read"),
        (entry(1, (1,), 0, 0, b"data", field(7, b"")), {}, "a is partitioned"),
        (entry(1, (2,), 0, 0, b"data"), {}, "a: size and shape disagree"),
        (entry(1, (1,), 0, 2, b"data"), {}, r"00000-of-00001: cut off, a lies beyond its end"),
        (entry(1, (1,), 0, 0, b"atad"), {}, r"00000-of-00001: wrong checksum \(CRC-32C\) of a: "),
        (entry(1, (1,), 5, 0, b"data"), {}, r"no .*ckpt.data-00005-of-00001 beside .*ckpt.index"),
        (entry(1, (1,), 0, 0, b"data"), {"compression": 1}, "blocks compressed by method 1; only"),
        (entry(1, (1,), 0, 0, b"data"), {"endianness": 1}, "big-endian numbers are not supported"),
        (field(2, 3), {}, "damaged or no index"),
        (b"\xff" * 12, {}, "a number of more than 64 bits"),
        (field(1, b"text"), {}, "field 1 is no number"),
        (b"\x0b", {}, "a field of unknown kind 3"),
        (b"\x0a\x7f", {}, "a field longer than its message"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, variable: bytes, options: dict, words: str
) -> None:
    write_bundle(tmp_path / "ckpt", {"a": variable}, [b"data"], **options)
    with pytest.raises(UserError, match=words) as caught:
        TensorBundle(tmp_path / "ckpt").tensor("a")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_tensorflow_2_is_named(tmp_path: Path) -> None:
    data = b"graphdata"
    variables = {
        "_CHECKPOINTABLE_OBJECT_GRAPH": entry(7, (), 0, 0, data),
        "model/kernel/.ATTRIBUTES/VARIABLE_VALUE": entry(1, (1,), 0, 0, data[:4]),
    }
    write_bundle(tmp_path / "ckpt-1", variables, [data])
    with pytest.raises(UserError, match=r"ckpt-1\.index: a checkpoint of TensorFlow 2's objects"):
        read_weights(tmp_path / "ckpt-1")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The reference's TensorFlow checkpoint, to be spoiled."""
    for path in TF1.parent.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path / TF1.name


@needs_reference
def test_a_flipped_bit_anywhere_in_the_index_is_found(copy: Path) -> None:
    index = copy.with_name(copy.name + ".index")
    good = index.read_bytes()
    entries = TensorBundle(copy).entries
    draw = random.Random(0)
    missed = []
    for _ in range(300):
        position = draw.randrange(len(good))
        spoiled = bytearray(good)
        spoiled[position] ^= 1 << draw.randrange(8)
        index.write_bytes(spoiled)
        try:
            found = TensorBundle(copy).entries
        except UserError as error:
            assert "damaged or no index of a TensorFlow checkpoint" in str(error)
            continue
        # The footer has bytes without meaning; all else is under a checksum.
        assert position >= len(good) - 48
        assert found == entries
        missed.append(position)
    assert len(missed) < 10


@needs_reference
def test_a_flipped_bit_in_the_data_is_named_by_its_variable(copy: Path) -> None:
    data = copy.with_name(copy.name + ".data-00000-of-00001")
    name = "bert/encoder/layer_1/output/dense/kernel"
    content = bytearray(data.read_bytes())
    content[TensorBundle(copy).entries[name].offset + 1000] ^= 0x10
    data.write_bytes(content)
    bundle = TensorBundle(copy)
    with pytest.raises(UserError, match=rf"wrong checksum \(CRC-32C\) of {name}: the file is dam"):
        bundle.tensor(name)
    bundle.tensor("bert/pooler/dense/kernel")


@needs_reference
def test_torn_and_missing_parts(copy: Path) -> None:
    index = copy.with_name(copy.name + ".index")
    data = copy.with_name(copy.name + ".data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:100_000])
    with pytest.raises(UserError, match="00001: cut off, bert/pooler/dense/kernel lies beyond"):
        TensorBundle(copy).tensor("bert/pooler/dense/kernel")
    data.write_bytes(b"")
    with pytest.raises(UserError, match=r"00001: an empty file; download or copy it again"):
        TensorBundle(copy).tensor("bert/pooler/dense/kernel")
    data.unlink()
    with pytest.raises(UserError, match=r"no .*00001 beside .*\.index; copy both"):
        TensorBundle(copy).tensor("bert/pooler/dense/kernel")
    good = index.read_bytes()
    for spoiled in (b"", b"text", good[:2000], good[1:], good[:-1], good[48:]):
        index.write_bytes(spoiled)
        with pytest.raises(UserError, match=r"28252\.index: .*(the|no) index of"):
            TensorBundle(copy)
