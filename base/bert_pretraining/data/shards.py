"""HDF5 shards: listing, reading whole, checking, writing.

A fixed-length shard of N sequences of S tokens and P predictions holds `input_ids`
(N, S) i2, `input_mask` (N, S) i1, `segment_ids` (N, S) i1, `masked_lm_positions`
(N, P) i2, `masked_lm_ids` (N, P) i2 and `next_sentence_labels` (N,) i1. A prediction
whose label id is 0 is padding.

A variable-length shard (NVIDIA's, from MLPerf 2.0 on) holds the same but `input_mask`,
with one array a row, and no padding.
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
from bert_pretraining.runtime.files import UNFINISHED, shard_files

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


@dataclass(frozen=True)
class ShardInfo:
    """What is known of a shard without reading its rows.

    max_seq_length is None for a variable-length shard.
    """

    path: Path
    num_sequences: int
    max_seq_length: int | None


@dataclass(frozen=True)
class FlatShard:
    """A whole shard in memory.

    input_ids, segment_ids: (T,) the tokens of all N sequences. What lies between the end
    of one sequence and the start of the next is padding, and never looked at: to squeeze
    it out would cost more than to copy the sequences of a batch.
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
    paths = shard_files(directory, REMAKE)
    infos = [_inspect(path) for path in paths]
    if not any(info.num_sequences for info in infos):
        raise UserError(f"the shards in {directory} hold no sequences; make the data set again")
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
        varlength = "input_ids" in file and h5py.check_vlen_dtype(file["input_ids"].dtype)
        needed = [key for key in SCHEMA if key != "input_mask" or not varlength]
        missing = [key for key in needed if key not in file]
        if missing:
            raise UserError(
                f"{path}: no dataset '{missing[0]}' (has: {', '.join(sorted(file)) or 'nothing'}); "
                "make the shard again"
            )
        shapes = {key: file[key].shape for key in needed}
    num_sequences = shapes["next_sentence_labels"][0]
    for key, shape in shapes.items():
        dimensions = 1 if key == "next_sentence_labels" or varlength else 2
        if len(shape) != dimensions or shape[0] != num_sequences:
            raise UserError(
                f"{path}: dataset '{key}' has shape {shape}, expected {num_sequences} rows; "
                "make the shard again"
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
                    f"{shapes[like]}; make the shard again"
                )
    return ShardInfo(path, num_sequences, None if varlength else shapes["input_ids"][1])


def shard_rows(path: Path) -> int:
    """The number of sequences in a shard."""
    return _inspect(path).num_sequences


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """A fixed-length shard's arrays, as they are in the file."""
    if _inspect(path).max_seq_length is None:
        raise UserError(f"{path}: a variable-length shard; a fixed-length one is needed here")
    with _open(path) as file:
        return {key: file[key][()] for key in SCHEMA}


def read_token_rows(path: Path) -> list[np.ndarray]:
    """Each sequence's real token ids, from a shard of either form."""
    if _inspect(path).max_seq_length is None:
        with _open(path) as file:
            return list(file["input_ids"][()])
    with _open(path) as file:
        ids, lengths = file["input_ids"][()], file["input_mask"][()].sum(axis=1, dtype=np.int64)
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


def read_shard(path: Path, vocab_size: int, max_seq_length: int | None = None) -> FlatShard:
    """Read one shard of either form whole.

    Raises UserError naming the file and the fault: missing datasets, ids outside
    [0, vocab_size), sequences longer than max_seq_length, a mask that is not a prefix,
    predictions outside the sequence.
    """
    shard = _read_flat(path, vocab_size)
    longest = shard.lengths.max(initial=0)
    if max_seq_length is not None and longest > max_seq_length:
        raise UserError(
            f"{path}: a sequence of {longest} tokens, but bert_config.json has "
            f"max_position_embeddings {max_seq_length}; data and model must fit together"
        )
    return shard


def _read_flat(path: Path, vocab_size: int) -> FlatShard:
    if _inspect(path).max_seq_length is not None:
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
        raise UserError(f"{path}: rows of different datasets differ in length; make it again")
    return _checked(
        FlatShard(
            input_ids=flat["input_ids"],
            segment_ids=flat["segment_ids"],
            offsets=np.cumsum(lengths) - lengths,
            lengths=lengths,
            masked_positions=flat["masked_lm_positions"],
            masked_labels=flat["masked_lm_ids"],
            masked_offsets=np.cumsum(counts) - counts,
            masked_counts=counts,
            next_sentence_labels=next_sentence_labels,
        ),
        vocab_size,
        str(path),
    )


def flatten(arrays: dict[str, np.ndarray], vocab_size: int, where: str) -> FlatShard:
    """Padded arrays as in the file -> FlatShard; `where` names them in errors."""
    mask = arrays["input_mask"].astype(bool)
    lengths = mask.sum(axis=1, dtype=np.int16).astype(np.int64)
    # A prefix of ones: no zero before a one.
    if (mask[:, 1:] > mask[:, :-1]).any():
        raise UserError(f"{where}: input_mask is not ones followed by zeros; make the shard again")
    labelled = arrays["masked_lm_ids"] != 0
    counts = np.count_nonzero(labelled, axis=1)
    count, length = mask.shape
    return _checked(
        FlatShard(
            input_ids=arrays["input_ids"].reshape(-1),
            segment_ids=arrays["segment_ids"].reshape(-1),
            offsets=np.arange(count, dtype=np.int64) * length,
            lengths=lengths,
            masked_positions=arrays["masked_lm_positions"][labelled],
            masked_labels=arrays["masked_lm_ids"][labelled],
            masked_offsets=np.cumsum(counts) - counts,
            masked_counts=counts,
            next_sentence_labels=arrays["next_sentence_labels"],
        ),
        vocab_size,
        where,
    )


def _checked(shard: FlatShard, vocab_size: int, where: str) -> FlatShard:
    """The shard itself, if it can be trained on."""
    if shard.lengths.size and shard.lengths.min() < 1:
        raise UserError(f"{where}: a sequence without tokens; make the shard again")
    for name, ids, limit in (
        ("input_ids", shard.input_ids, vocab_size),
        ("segment_ids", shard.segment_ids, 2),
        ("masked_lm_ids", shard.masked_labels, vocab_size),
        ("next_sentence_labels", shard.next_sentence_labels, 2),
    ):
        if not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"{where}: {name} is {ids.dtype}, not integer; make the shard again")
        if _within(ids, limit):
            continue
        if len(ids) == len(shard.input_ids):
            ids = ids[ragged_arange(shard.offsets, shard.lengths)]
            if _within(ids, limit):
                continue  # it was only the padding
        wrong = ids.max() if ids.max() >= limit else ids.min()
        fix = (
            f"the model's vocabulary has {vocab_size} entries; data and bert_config.json "
            "must be of one vocabulary"
            if limit == vocab_size
            else "only 0 and 1 make sense; make the shard again"
        )
        raise UserError(f"{where}: {name} has the value {wrong}, but {fix}")
    positions = shard.masked_positions
    ends = np.repeat(shard.lengths, shard.masked_counts)
    if positions.size and (positions.min() < 0 or (positions >= ends).any()):
        raise UserError(f"{where}: a masked position outside its sequence; make the shard again")
    return shard


def _within(values: np.ndarray, limit: int) -> bool:
    return not values.size or (values.min() >= 0 and values.max() < limit)


def ragged_arange(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices of the runs [start, start + length), end to end.

    starts, lengths: (N,) integers. Returns (sum(lengths),) int64.
    """
    ends = np.cumsum(lengths)
    offsets = starts - (ends - lengths)
    return np.repeat(offsets, lengths) + np.arange(ends[-1] if len(ends) else 0)


def write_shard(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a fixed-length shard; a reader never sees half of it."""
    with _writing(path) as file:
        for key, dtype in SCHEMA.items():
            file.create_dataset(key, data=arrays[key], dtype=dtype)


def write_varlength_shard(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the variable-length form of a fixed-length shard's arrays.

    As in the reference, a prediction is real where its position is not 0.
    """
    lengths = arrays["input_mask"].sum(axis=1, dtype=np.int64)
    counts = (arrays["masked_lm_positions"] != 0).sum(axis=1)
    with _writing(path) as file:
        for key in VARLENGTH_DATASETS:
            dtype = h5py.vlen_dtype(np.dtype(SCHEMA[key]))
            kept = counts if key.startswith("masked") else lengths
            rows = file.create_dataset(key, (len(lengths),), dtype=dtype)
            for row, (values, count) in enumerate(zip(arrays[key], kept, strict=True)):
                rows[row] = values[:count]
        labels = arrays["next_sentence_labels"]
        file.create_dataset("next_sentence_labels", data=labels, dtype="i1")


def replace_file(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    temporary = path.with_name(path.name + UNFINISHED)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[h5py.File]:
    """A new file that takes `path`'s place once it is whole."""
    temporary = path.with_name(path.name + UNFINISHED)
    try:
        with h5py.File(temporary, "w") as file:
            yield file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot write {path} ({reason}); free disk space, or choose another place"
        ) from error
