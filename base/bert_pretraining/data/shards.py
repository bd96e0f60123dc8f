"""Shards: which files a directory holds, how each format is read, and HDF5 in both forms.

`FORMATS` maps the ending of a file's name to the functions that read such a file. A file
with any other ending is read as HDF5.

A fixed-length HDF5 shard of N sequences of S tokens and P predictions holds `input_ids`
(N, S) i2, `input_mask` (N, S) i1, `segment_ids` (N, S) i1, `masked_lm_positions`
(N, P) i2, `masked_lm_ids` (N, P) i2 and `next_sentence_labels` (N,) i1. A prediction
whose label id is 0 is padding.

A variable-length HDF5 shard (NVIDIA's, from MLPerf 2.0 on) holds the same datasets but
`input_mask`. Each row is an array of its own length, without padding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np

from bert_pretraining.data.flat_shard import (
    AGAIN,
    FlatShard,
    ShardFormat,
    ShardInfo,
    checked,
    flatten,
)
from bert_pretraining.errors import UserError
from bert_pretraining.runtime.files import shard_files, write_whole

# dataset -> dtype in a fixed-length shard
SCHEMA = {
    "input_ids": "i2",
    "input_mask": "i1",
    "segment_ids": "i1",
    "masked_lm_positions": "i2",
    "masked_lm_ids": "i2",
    "next_sentence_labels": "i1",
}
REMAKE = "make a data set with: python -m bert_pretraining data make-mini"
VARLENGTH_DATASETS = ("input_ids", "segment_ids", "masked_lm_positions", "masked_lm_ids")


def list_shards(directory: Path) -> list[ShardInfo]:
    """Inspect every file with `part` in its name in `directory`, sorted by name.

    Raises UserError if there are none, if one cannot be read, or if they differ in
    sequence length.
    """
    paths = shard_files(directory, REMAKE)
    infos = [format_of(path).inspect(path) for path in paths]
    if not any(info.num_sequences for info in infos):
        raise UserError(f"the shards in {directory} hold no sequences", "make the data set again")
    for info in infos:
        if info.max_seq_length != infos[0].max_seq_length:
            raise UserError(
                f"{info.path}: sequences of {info.max_seq_length} tokens, but {infos[0].path.name} "
                f"has {infos[0].max_seq_length}",
                "make all shards with the same max_seq_length",
            )
    return infos


def read_shard(path: Path, vocab_size: int, max_seq_length: int | None = None) -> FlatShard:
    """Read one whole shard of any format.

    Raises UserError naming the file and the fault: missing datasets, ids outside
    [0, vocab_size), sequences longer than max_seq_length, a mask that is not a prefix,
    predictions outside the sequence.
    """
    shard = format_of(path).read(path, vocab_size)
    longest = shard.lengths.max(initial=0)
    if max_seq_length is not None and longest > max_seq_length:
        raise UserError(
            f"{path}: a sequence of {longest} tokens, but bert_config.json has "
            f"max_position_embeddings {max_seq_length}",
            "use data and a bert_config.json that fit together",
        )
    return shard


def format_of(path: Path) -> ShardFormat:
    """How this file is read, by the ending of its name."""
    return FORMATS.get(path.suffix, HDF5)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    """The opened file; what h5py raises for a damaged file becomes a UserError."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: not a readable HDF5 file ({reason})", "make or copy it again"
        ) from error


def _inspect_hdf5(path: Path) -> ShardInfo:
    with _open(path) as file:
        varlength = "input_ids" in file and h5py.check_vlen_dtype(file["input_ids"].dtype)
        needed = [key for key in SCHEMA if key != "input_mask" or not varlength]
        missing = [key for key in needed if key not in file]
        if missing:
            raise UserError(
                f"{path}: no dataset '{missing[0]}' (has: {', '.join(sorted(file)) or 'nothing'})",
                AGAIN,
            )
        shapes = {key: file[key].shape for key in needed}
    num_sequences = shapes["next_sentence_labels"][0]
    for key, shape in shapes.items():
        dimensions = 1 if key == "next_sentence_labels" or varlength else 2
        if len(shape) != dimensions or shape[0] != num_sequences:
            raise UserError(
                f"{path}: dataset '{key}' has shape {shape}, expected {num_sequences} rows", AGAIN
            )
    if not varlength:
        for key, like in (
            ("input_mask", "input_ids"),
            ("segment_ids", "input_ids"),
            ("masked_lm_positions", "masked_lm_ids"),
        ):
            if shapes[key] != shapes[like]:
                raise UserError(
                    f"{path}: dataset '{key}' has shape {shapes[key]}, but '{like}' has "
                    f"{shapes[like]}",
                    AGAIN,
                )
    return ShardInfo(path, num_sequences, None if varlength else shapes["input_ids"][1])


def shard_rows(path: Path) -> int:
    """The number of sequences in an HDF5 shard."""
    return _inspect_hdf5(path).num_sequences


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a fixed-length HDF5 shard, as they are in the file."""
    if _inspect_hdf5(path).max_seq_length is None:
        raise UserError(
            f"{path}: a variable-length shard, where a fixed-length one is needed",
            "name the fixed-length shard that it was made from",
        )
    with _open(path) as file:
        return {key: file[key][()] for key in SCHEMA}


def read_token_rows(path: Path) -> list[np.ndarray]:
    """The token ids of each sequence without padding, from an HDF5 shard of either form."""
    if _inspect_hdf5(path).max_seq_length is None:
        with _open(path) as file:
            return list(file["input_ids"][()])
    with _open(path) as file:
        ids, lengths = file["input_ids"][()], file["input_mask"][()].sum(axis=1, dtype=np.int64)
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


def _read_hdf5(path: Path, vocab_size: int) -> FlatShard:
    if _inspect_hdf5(path).max_seq_length is not None:
        return flatten(read_arrays(path), vocab_size, str(path))
    with _open(path) as file:
        rows = {key: file[key][()] for key in VARLENGTH_DATASETS}
        next_sentence_labels = file["next_sentence_labels"][()]
    row_lengths = {
        key: np.fromiter((len(row) for row in value), np.int64, len(value))
        for key, value in rows.items()
    }
    lengths, counts = row_lengths["input_ids"], row_lengths["masked_lm_ids"]
    flat = {key: np.concatenate([*value, np.empty(0, np.int16)]) for key, value in rows.items()}
    if (row_lengths["segment_ids"] != lengths).any() or (
        row_lengths["masked_lm_positions"] != counts
    ).any():
        raise UserError(f"{path}: rows of different datasets differ in length", AGAIN)
    shard = FlatShard(
        input_ids=flat["input_ids"],
        segment_ids=flat["segment_ids"],
        offsets=np.cumsum(lengths) - lengths,
        lengths=lengths,
        masked_positions=flat["masked_lm_positions"],
        masked_labels=flat["masked_lm_ids"],
        masked_offsets=np.cumsum(counts) - counts,
        masked_counts=counts,
        next_sentence_labels=next_sentence_labels,
    )
    return checked(shard, vocab_size, str(path))


def write_shard(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a fixed-length HDF5 shard, whole or not at all."""

    def fill(file: h5py.File) -> None:
        for key, dtype in SCHEMA.items():
            file.create_dataset(key, data=arrays[key], dtype=dtype)

    _write_hdf5(path, fill)


def write_varlength_shard(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the variable-length form of a fixed-length shard's arrays, whole or not at all.

    As in the reference, a prediction is real where its position is not 0.
    """
    lengths = arrays["input_mask"].sum(axis=1, dtype=np.int64)
    counts = (arrays["masked_lm_positions"] != 0).sum(axis=1)

    def fill(file: h5py.File) -> None:
        for key in VARLENGTH_DATASETS:
            dtype = h5py.vlen_dtype(np.dtype(SCHEMA[key]))
            kept = counts if key.startswith("masked") else lengths
            rows = file.create_dataset(key, (len(lengths),), dtype=dtype)
            for row, (values, count) in enumerate(zip(arrays[key], kept, strict=True)):
                rows[row] = values[:count]
        labels = arrays["next_sentence_labels"]
        file.create_dataset("next_sentence_labels", data=labels, dtype="i1")

    _write_hdf5(path, fill)


def _write_hdf5(path: Path, fill: Callable[[h5py.File], None]) -> None:
    def write(temporary: Path) -> None:
        with h5py.File(temporary, "w") as file:
            fill(file)

    try:
        write_whole(path, write)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot write {path} ({reason})", "free disk space, or write to another folder"
        ) from error


HDF5 = ShardFormat(_inspect_hdf5, _read_hdf5)
FORMATS: dict[str, ShardFormat] = {".hdf5": HDF5, ".h5": HDF5}
