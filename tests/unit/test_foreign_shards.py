"""Shards that others made: read where the meaning is plain, else refused in one line that helps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from bert_pretraining.data.loader import LoaderConfig, load_evaluation_set
from bert_pretraining.data.packing import pack_rows
from bert_pretraining.data.shards import (
    list_shards,
    read_arrays,
    read_listed,
    read_shard,
    write_shard,
    write_varlength_shard,
)
from bert_pretraining.errors import UserError
from bert_pretraining.model.batch import PackedBatch
from helpers import padded_arrays

VOCAB = 90
Spoil = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of four sequences of up to 16 tokens."""
    for number in range(3):
        write_shard(tmp_path / f"part_{number}.hdf5", arrays(number))
    return tmp_path


def arrays(number: int = 1) -> dict[str, np.ndarray]:
    return padded_arrays([9, 8, 12, 16], 16, VOCAB, number)


def one(folder: Path) -> Path:
    return folder / "part_1.hdf5"


def put(key: str, value: object, **options: object) -> Spoil:
    """Put another dataset in the place of one; `value` may be a function of the old values."""

    def spoil(folder: Path) -> None:
        with h5py.File(one(folder), "r+") as file:
            values = value(file[key][()]) if callable(value) else value
            del file[key]
            file.create_dataset(key, data=values, **options)

    return spoil


def edit(change: Callable[[h5py.File], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        with h5py.File(one(folder), "r+") as file:
            change(file)

    return spoil


def replace(key: str, value: object) -> Spoil:
    """Put another object, such as a link, in the place of a dataset, which stays as `old`."""

    def change(file: h5py.File) -> None:
        file.move(key, "old")
        file[key] = value

    return edit(change)


def to_hugging_face(file: h5py.File) -> None:
    """What datasets for BertForPreTraining hold: labels of each token, -100 where none is asked."""
    labels = np.full(file["input_ids"].shape, -100, "i8")
    for row, (ids, positions) in enumerate(
        zip(file["masked_lm_ids"][()], file["masked_lm_positions"][()], strict=True)
    ):
        labels[row, positions[ids != 0]] = ids[ids != 0]
    del file["masked_lm_ids"], file["masked_lm_positions"]
    file["labels"] = labels
    for key, name in (
        ("input_mask", "attention_mask"),
        ("segment_ids", "token_type_ids"),
        ("next_sentence_labels", "next_sentence_label"),
    ):
        values = file[key][()].astype("i8")
        del file[key]
        file[name] = values


def batch_of(path: Path) -> PackedBatch:
    return pack_rows(read_shard(path, VOCAB), np.arange(4))


def same(left: PackedBatch, right: PackedBatch) -> bool:
    pairs = zip(left.tensors().values(), right.tensors().values(), strict=True)
    return all(one.equal(other) and one.dtype == other.dtype for one, other in pairs)


READ = {
    "big-endian": put("input_ids", lambda values: values.astype(">i8")),
    "unsigned": put("input_ids", lambda values: values.astype("u2")),
    "64 bits": put("masked_lm_positions", lambda values: values.astype("i8")),
    "8 bits": put("masked_lm_ids", lambda values: values.astype("i1")),
    "truth values": put("input_mask", lambda values: values.astype(bool)),
    "compressed": put("input_ids", lambda values: values, chunks=(2, 16), compression="gzip"),
    "lzf": put("input_ids", lambda values: values, compression="lzf"),
    "padded with -1": put("masked_lm_ids", lambda values: np.where(values == 0, -1, values)),
    "padded with -100": put("masked_lm_ids", lambda values: np.where(values == 0, -100, values)),
    "soft link": replace("input_ids", h5py.SoftLink("/old")),
    "Hugging Face": edit(to_hugging_face),
    "(N, 1, S)": put("input_ids", lambda values: values[:, None]),
    "(N, 1)": put("next_sentence_labels", lambda values: values[:, None]),
}
SAID = {
    "Hugging Face": "Hugging Face's names: reading 'attention_mask' as input_mask, "
    "'token_type_ids' as segment_ids, 'next_sentence_label' as next_sentence_labels, "
    "'labels' as the masked tokens",
    "(N, 1, S)": "'input_ids' has 3 dimensions, read as 2 without those of length 1",
    "(N, 1)": "'next_sentence_labels' has 2 dimensions, read as 1 without those of length 1",
}


@pytest.mark.parametrize("form", READ)
def test_other_forms_of_the_same_data_are_read_and_said_once(folder: Path, form: str) -> None:
    before = batch_of(one(folder))
    READ[form](folder)
    shutil.copy(one(folder), folder / "part_2.hdf5")
    said: list[str] = []
    infos = list_shards(folder, say=said.append)
    assert [info.num_sequences for info in infos] == [4, 4, 4]
    expected = SAID.get(form)
    assert said == ([f"Notice: {one(folder)} and 1 more shard: {expected}"] if expected else [])
    assert same(batch_of(one(folder)), before)


def test_rows_of_their_own_length_may_be_padded_with_minus_one(folder: Path) -> None:
    write_varlength_shard(one(folder), arrays())
    before = batch_of(one(folder))
    with h5py.File(one(folder), "r+") as file:
        for key in ("masked_lm_ids", "masked_lm_positions"):
            file[key][2] = np.append(file[key][2], np.int16([-1, -1]))
    assert same(batch_of(one(folder)), before)


def source_elsewhere(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4, 16), "i2")
    layout[:] = h5py.VirtualSource("gone.hdf5", "input_ids", shape=(4, 16))
    del file["input_ids"]
    file.create_virtual_dataset("input_ids", layout)


def unknown_filter(file: h5py.File) -> None:
    del file["input_ids"]
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((4, 16))
    properties.set_filter(32026, h5py.h5z.FLAG_OPTIONAL, ())
    space = h5py.h5s.create_simple((4, 16))
    dataset = h5py.h5d.create(file.id, b"input_ids", h5py.h5t.STD_I16LE, space, properties)
    dataset.write_direct_chunk((0, 0), bytes(128))


def half_renamed(file: h5py.File) -> None:
    file.move("input_mask", "attention_mask")
    file.move("segment_ids", "token_type_ids")


def fewer_predictions(file: h5py.File) -> None:
    for key in ("masked_lm_positions", "masked_lm_ids"):
        values = file[key][:3]
        del file[key]
        file[key] = values


def names_without_mask(file: h5py.File) -> None:
    half_renamed(file)
    del file["attention_mask"]


RECORDS = np.zeros((4, 16), [("a", "i2"), ("b", "i4")])
REFUSED = {
    "group": (
        edit(lambda file: (file.move("input_ids", "old"), file.create_group("input_ids/x"))),
        "'input_ids' is a group (x), not a dataset of integers; make the shard again",
    ),
    "single value": (put("next_sentence_labels", 1), "is a single value, expected one for each"),
    "null": (put("next_sentence_labels", h5py.Empty("i1")), "is a null dataset, expected rows"),
    "text": (put("input_ids", np.array([b"[CLS] a"] * 4)), "'input_ids' holds text, not integers"),
    "records": (put("input_ids", RECORDS), "'input_ids' holds records (a, b), not integers"),
    "floats": (
        put("input_ids", lambda values: values.astype("f4")),
        "'input_ids' holds float32 numbers, not integers",
    ),
    "one dimension": (
        put("input_ids", lambda values: values[0]),
        "'input_ids' has shape (16,), expected (sequences, tokens)",
    ),
    "three dimensions": (
        put("input_ids", lambda values: np.stack([values, values], 1)),
        "'input_ids' has shape (4, 2, 16), expected (sequences, tokens)",
    ),
    "fewer labels": (
        put("next_sentence_labels", lambda values: values[:3]),
        "'next_sentence_labels' has shape (3,), but 'input_ids' has (4, 16)",
    ),
    "fewer masked tokens": (
        edit(fewer_predictions),
        "but 'input_ids' has (4, 16)",
    ),
    "no mask": (
        edit(names_without_mask),
        "no dataset 'input_mask' or 'attention_mask' (has: ",
    ),
    "dangling soft link": (
        replace("input_ids", h5py.SoftLink("/gone")),
        "'input_ids' is a link to /gone, which is not there; copy the file that it points to",
    ),
    "soft link to itself": (
        replace("input_ids", h5py.SoftLink("/input_ids")),
        "'input_ids' is a link to /input_ids, which is not there",
    ),
    "dangling external link": (
        replace("input_ids", h5py.ExternalLink("gone.hdf5", "/x")),
        "'input_ids' is a link to gone.hdf5:/x, which is not there",
    ),
    "source elsewhere": (
        edit(source_elsewhere),
        "'input_ids' has its values in gone.hdf5, which is not there; copy that file as well",
    ),
    "filter": (
        edit(unknown_filter),
        "'input_ids' is compressed with HDF5 filter 32026 (blosc2), which is not installed here; "
        f"install it: {sys.executable} -m pip install hdf5plugin, or",
    ),
    "half renamed": (
        edit(half_renamed),
        "no dataset 'input_mask', but 'attention_mask', Hugging Face's name for it, and "
        "'token_type_ids' for 'segment_ids'; rename them in every shard: python -c ",
    ),
    "cut": (
        lambda folder: os.truncate(one(folder), 600),
        "an HDF5 file that ends too early (600 of ",
    ),
    "LFS pointer": (
        lambda folder: one(folder).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "a Git LFS pointer (text of 43 bytes), not an HDF5 file; fetch the file itself: git lfs",
    ),
    "gzip": (
        lambda folder: one(folder).write_bytes(b"\x1f\x8b\x08\x00abc"),
        "a gzip-compressed file, not an HDF5 file; decompress it: gunzip ",
    ),
    "pipe": (
        lambda folder: (one(folder).unlink(), os.mkfifo(one(folder))),
        "a named pipe, not a shard; move it away",
    ),
    "folder": (
        lambda folder: (one(folder).unlink(), one(folder).mkdir()),
        "a directory, not a shard; move it away",
    ),
    "link to nothing": (
        lambda folder: (one(folder).unlink(), one(folder).symlink_to("/gone")),
        "a link to nothing (/gone); make the link again",
    ),
    "link to itself": (
        lambda folder: (one(folder).unlink(), one(folder).symlink_to(one(folder))),
        "a link that leads back to itself (errno 40",
    ),
    "no masked token": (
        put("masked_lm_ids", lambda values: values * 0),
        "no masked token in its 4 sequences",
    ),
    "other padding": (
        put("masked_lm_ids", lambda values: np.where(values == 0, -7, values)),
        "masked_lm_ids has the value -7, which is no token",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(folder: Path, fault: str) -> None:
    spoil, words = REFUSED[fault]
    spoil(folder)
    with pytest.raises(UserError) as caught:
        for info in list_shards(folder):
            read_shard(info.path, VOCAB)
    message = str(caught.value)
    assert words in message
    assert str(one(folder)) in message
    assert "\n" not in message


def test_the_order_that_renames_makes_the_shards_readable(folder: Path) -> None:
    before = read_arrays(one(folder))
    for path in folder.iterdir():
        with h5py.File(path, "r+") as file:
            half_renamed(file)
    with pytest.raises(UserError) as caught:
        list_shards(folder)
    order = caught.value.fix.removeprefix("rename them in every shard: ")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["bash", "-c", order], check=True, env={**os.environ, "PATH": path})
    assert len(list_shards(folder)) == 3
    after = read_arrays(one(folder))
    assert all((after[key] == values).all() for key, values in before.items())


def test_a_shard_that_changes_during_a_run_is_named(folder: Path) -> None:
    infos = list_shards(folder)
    write_shard(one(folder), {key: values[:2] for key, values in arrays().items()})
    with pytest.raises(UserError, match=r"part_1.hdf5: it has 2 sequences now, and had 4 when"):
        read_listed(infos[1], VOCAB)


def test_an_evaluation_set_without_a_masked_token_is_refused(folder: Path) -> None:
    few = arrays(0)
    few["masked_lm_ids"][:3] = 0
    write_shard(folder / "part_0.hdf5", few)
    config = LoaderConfig(4, 0, 1, VOCAB, 16)
    assert load_evaluation_set(list_shards(folder), 4, config).num_batches == 1
    with pytest.raises(UserError, match=r"no masked token in the first 3 evaluation sequences"):
        load_evaluation_set(list_shards(folder), 3, config)
