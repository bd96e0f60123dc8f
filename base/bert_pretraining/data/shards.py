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

from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from bert_pretraining.data import shard_index
from bert_pretraining.data.flat_shard import (
    AGAIN,
    FlatShard,
    ShardFormat,
    ShardInfo,
    checked,
    flatten,
)
from bert_pretraining.data.hdf5 import open_hdf5, write_hdf5
from bert_pretraining.data.headers import read_headers
from bert_pretraining.data.shard_layout import (
    IGNORED,
    LABELS,
    PREDICTIONS,
    SCHEMA,
    VARLENGTH_DATASETS,
    Layout,
    find_layout,
    read_padded,
)
from bert_pretraining.data.shard_names import INDEX_NAME, ShardFolder, shard_folder
from bert_pretraining.errors import UserError
from bert_pretraining.runtime.words import counted

REMAKE = "make a data set with: python -m bert_pretraining data make-mini"


def list_shards(
    directory: Path, pattern: str | None = None, say: Callable[[str], None] | None = None
) -> list[ShardInfo]:
    """Inspect every shard in `directory`, sorted by name; see `inspect_shards`."""
    return inspect_shards(shard_folder(directory, REMAKE, pattern), say)


def inspect_shards(
    folder: ShardFolder, say: Callable[[str], None] | None = None
) -> list[ShardInfo]:
    """What the header of every shard of a folder says.

    Where that takes long, they are read in processes of their own: see `headers`. Those of many
    shards are kept in the folder's index for the next start: see `shard_index`.

    say: gets one line for each thing that a user should know: files that are not read, shards
    that are missing, another form of the datasets than this package's.

    Raises UserError if one cannot be read, if they differ in sequence length, or if they hold no
    sequence.
    """
    read = partial(read_headers, inspect=inspect_shard, say=say)
    if len(folder.shards) < shard_index.FEWEST:
        infos = read(folder.shards)
    else:
        infos = shard_index.inspect_indexed(folder, read, say)
    if not any(info.num_sequences for info in infos):
        raise UserError(
            f"the shards in {folder.directory} hold no sequences", "make the data set again"
        )
    for info in infos:
        if info.max_seq_length != infos[0].max_seq_length:
            raise UserError(
                f"{info.path}: sequences of {info.max_seq_length} tokens, but {infos[0].path.name} "
                f"has {infos[0].max_seq_length}",
                "make all shards with the same max_seq_length",
            )
    if say is not None:
        for notice in [*folder.notices(), *_form_notices(infos)]:
            say(f"Notice: {notice}")
    return infos


def _form_notices(infos: list[ShardInfo]) -> list[str]:
    """One line for each other form of datasets, however many shards have it."""
    having: dict[str, list[ShardInfo]] = {}
    for info in infos:
        for form in info.forms:
            having.setdefault(form, []).append(info)
    return [f"{found[0].path}{_and_more(len(found) - 1)}: {form}" for form, found in having.items()]


def _and_more(number: int) -> str:
    return f" and {counted(number, 'more shard')}" if number else ""


def inspect_shard(path: Path) -> ShardInfo:
    """What the header of one shard of any format says; UserError if it cannot be read."""
    return format_of(path).inspect(path)


def read_shard(path: Path, vocab_size: int, max_seq_length: int | None = None) -> FlatShard:
    """Read one whole shard of any format.

    Raises UserError naming the file and the fault: missing datasets, ids outside
    [0, vocab_size), sequences longer than max_seq_length, a mask that is not a prefix,
    predictions outside the sequence, no prediction at all.
    """
    shard = format_of(path).read(path, vocab_size)
    longest = shard.lengths.max(initial=0)
    if max_seq_length is not None and longest > max_seq_length:
        raise UserError(
            f"{path}: a sequence of {longest} tokens, but bert_config.json has "
            f"max_position_embeddings {max_seq_length}",
            "use data and a bert_config.json that fit together",
        )
    if shard.num_sequences and not len(shard.masked_labels):
        raise UserError(
            f"{path}: no masked token in its {counted(shard.num_sequences, 'sequence')}, so "
            "there is nothing to learn or to evaluate",
            "make it again with masked tokens ('python -m bert_pretraining data create-examples' "
            "masks 15%)",
        )
    return shard


def read_listed(info: ShardInfo, vocab_size: int, max_seq_length: int | None = None) -> FlatShard:
    """`read_shard` of a shard that was inspected before; UserError where it has changed since."""
    shard = read_shard(info.path, vocab_size, max_seq_length)
    if shard.num_sequences != info.num_sequences:
        raise UserError(
            f"{info.path}: it has {counted(shard.num_sequences, 'sequence')} now, and had "
            f"{info.num_sequences} when the run began",
            "leave the shards as they are while a run reads them, and start it again; if it fails "
            f"in the same way, delete {INDEX_NAME} in that data set first",
        )
    return shard


def format_of(path: Path) -> ShardFormat:
    """How this file is read, by the ending of its name."""
    return FORMATS.get(path.suffix, HDF5)


def _layout(path: Path) -> Layout:
    with open_hdf5(path) as file:
        return find_layout(file, path)


def _inspect_hdf5(path: Path) -> ShardInfo:
    layout = _layout(path)
    return ShardInfo(path, layout.num_sequences, layout.max_seq_length, tuple(layout.notices))


def shard_rows(path: Path) -> int:
    """The number of sequences in an HDF5 shard."""
    return _inspect_hdf5(path).num_sequences


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a fixed-length HDF5 shard, in the names and shapes of SCHEMA."""
    with open_hdf5(path) as file:
        layout = find_layout(file, path)
        if layout.max_seq_length is None:
            raise UserError(
                f"{path}: a variable-length shard, where a fixed-length one is needed",
                "name the fixed-length shard that it was made from",
            )
        return read_padded(file, layout, path)


def read_token_rows(path: Path) -> list[np.ndarray]:
    """The token ids of each sequence without padding, from an HDF5 shard of either form."""
    with open_hdf5(path) as file:
        layout = find_layout(file, path)
        if layout.max_seq_length is None:
            return list(file["input_ids"][()])
        arrays = read_padded(file, layout, path)
    lengths = arrays["input_mask"].sum(axis=1, dtype=np.int64)
    return [row[:length] for row, length in zip(arrays["input_ids"], lengths, strict=True)]


def _read_hdf5(path: Path, vocab_size: int) -> FlatShard:
    with open_hdf5(path) as file:
        layout = find_layout(file, path)
        if layout.max_seq_length is not None:
            arrays = read_padded(file, layout, path)
        else:
            rows = {key: file[key][()] for key in VARLENGTH_DATASETS}
            next_sentence_labels = file[layout.sources[LABELS]][()]
    if layout.max_seq_length is not None:
        return flatten(arrays, vocab_size, str(path))
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
    kept = ~np.isin(flat["masked_lm_ids"], IGNORED)
    if not kept.all():
        owners = np.repeat(np.arange(len(counts)), counts)[kept]
        counts = np.bincount(owners, minlength=len(counts))
        flat.update({key: flat[key][kept] for key in PREDICTIONS})
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

    write_hdf5(path, fill)


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

    write_hdf5(path, fill)


HDF5 = ShardFormat(_inspect_hdf5, _read_hdf5)
FORMATS: dict[str, ShardFormat] = {".hdf5": HDF5, ".h5": HDF5}
