"""HDF5 shards: listing, reading whole, checking, writing.

A fixed-length shard of N sequences of S tokens and P predictions holds `input_ids`
(N, S) i2, `input_mask` (N, S) i1, `segment_ids` (N, S) i1, `masked_lm_positions`
(N, P) i2, `masked_lm_ids` (N, P) i2 and `next_sentence_labels` (N,) i1. A prediction
whose label id is 0 is padding.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from bert_pretraining.errors import UserError

SCHEMA = {
    "input_ids": "i2",
    "input_mask": "i1",
    "segment_ids": "i1",
    "masked_lm_positions": "i2",
    "masked_lm_ids": "i2",
    "next_sentence_labels": "i1",
}


@dataclass(frozen=True)
class ShardInfo:
    """What is known of a shard without reading its rows."""

    path: Path
    num_sequences: int
    max_seq_length: int
    max_predictions_per_seq: int


@dataclass(frozen=True)
class FlatShard:
    """A whole shard in memory without padding.

    input_ids, segment_ids: (T,) the real tokens of all N sequences, end to end.
    offsets, lengths: (N,) int64, where each sequence starts, and how long it is.
    masked_positions: (M,) relative to the sequence's start; masked_labels: (M,).
    masked_offsets, masked_counts: (N,) int64. next_sentence_labels: (N,).
    """

    input_ids: np.ndarray
    segment_ids: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    masked_positions: np.ndarray
    masked_labels: np.ndarray
    masked_offsets: np.ndarray
    masked_counts: np.ndarray
    next_sentence_labels: np.ndarray

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)


def list_shards(directory: Path) -> list[ShardInfo]:
    """Every file with `part` in its name in `directory`, sorted by name.

    Raises UserError if there are none, if one is no such HDF5 file, or if they differ
    in sequence length.
    """
    if not directory.is_dir():
        raise UserError(
            f"no such data directory: {directory}; "
            "pass --data_dir, or make one with: python -m bert_pretraining data make-mini"
        )
    paths = sorted(path for path in directory.iterdir() if "part" in path.name and path.is_file())
    if not paths:
        raise UserError(f"no shards in {directory}: expected HDF5 files with 'part' in the name")
    infos = [_inspect(path) for path in paths]
    for info in infos:
        if info.max_seq_length != infos[0].max_seq_length:
            raise UserError(
                f"{info.path}: sequences of {info.max_seq_length} tokens, but {infos[0].path.name} "
                f"has {infos[0].max_seq_length}; make all shards with the same max_seq_length"
            )
    return infos


@contextlib.contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    """The opened file; whatever h5py makes of a damaged one becomes a UserError."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: not a readable HDF5 file ({reason}); make or copy it again"
        ) from error


def _inspect(path: Path) -> ShardInfo:
    with _open(path) as file:
        missing = [key for key in SCHEMA if key not in file]
        if missing:
            raise UserError(
                f"{path}: no dataset '{missing[0]}' (has: {', '.join(sorted(file)) or 'nothing'}); "
                "make the shard again"
            )
        shapes = {key: file[key].shape for key in SCHEMA}
    num_sequences = shapes["next_sentence_labels"][0]
    for key, shape in shapes.items():
        if len(shape) != (1 if key == "next_sentence_labels" else 2) or shape[0] != num_sequences:
            raise UserError(
                f"{path}: dataset '{key}' has shape {shape}, expected {num_sequences} rows; "
                "make the shard again"
            )
    return ShardInfo(path, num_sequences, shapes["input_ids"][1], shapes["masked_lm_ids"][1])


def read_shard(path: Path, vocab_size: int) -> FlatShard:
    """Read one shard whole and strip its padding.

    Raises UserError naming the file and the fault: missing datasets, ids outside
    [0, vocab_size), a mask that is not a prefix, predictions outside the sequence.
    """
    _inspect(path)
    with _open(path) as file:
        arrays = {key: file[key][()] for key in SCHEMA}
    return flatten(arrays, vocab_size, str(path))


def flatten(arrays: dict[str, np.ndarray], vocab_size: int, where: str) -> FlatShard:
    """Padded arrays as in the file -> FlatShard; `where` names them in errors."""
    mask = arrays["input_mask"].astype(bool)
    lengths = mask.sum(axis=1, dtype=np.int64)
    max_seq_length = mask.shape[1]
    if not np.array_equal(mask, np.arange(max_seq_length) < lengths[:, None]):
        raise UserError(f"{where}: input_mask is not ones followed by zeros; make the shard again")
    if lengths.size and lengths.min() < 1:
        raise UserError(f"{where}: a sequence without tokens; make the shard again")
    input_ids = arrays["input_ids"][mask].astype(np.int32)
    labelled = arrays["masked_lm_ids"] != 0
    labels = arrays["masked_lm_ids"][labelled].astype(np.int32)
    positions = arrays["masked_lm_positions"][labelled].astype(np.int32)
    counts = labelled.sum(axis=1, dtype=np.int64)
    for name, ids in (("input_ids", input_ids), ("masked_lm_ids", labels)):
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            wrong = ids.max() if ids.max() >= vocab_size else ids.min()
            raise UserError(
                f"{where}: {name} has token {wrong}, but the model's vocabulary has {vocab_size} "
                "entries; data and bert_config.json must be of one vocabulary"
            )
    if positions.size and (positions.min() < 0 or (positions >= np.repeat(lengths, counts)).any()):
        raise UserError(f"{where}: a masked position outside its sequence; make the shard again")
    return FlatShard(
        input_ids=input_ids,
        segment_ids=arrays["segment_ids"][mask],
        offsets=np.cumsum(lengths) - lengths,
        lengths=lengths,
        masked_positions=positions,
        masked_labels=labels,
        masked_offsets=np.cumsum(counts) - counts,
        masked_counts=counts,
        next_sentence_labels=arrays["next_sentence_labels"],
    )


def write_shard(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a fixed-length shard; a reader never sees half of it."""
    temporary = path.with_name(path.name + ".partial")
    with h5py.File(temporary, "w") as file:
        for key, dtype in SCHEMA.items():
            file.create_dataset(key, data=arrays[key], dtype=dtype)
    os.replace(temporary, path)
