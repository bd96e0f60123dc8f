"""Shards and packing: what goes in comes out, and faults are named."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from bert_pretraining.data import shards as shard_module
from bert_pretraining.data.flat_shard import ShardFormat, ShardInfo, flatten, ragged_arange
from bert_pretraining.data.packing import pack, pack_rows
from bert_pretraining.data.shards import list_shards, read_shard, write_shard
from bert_pretraining.errors import UserError
from bert_pretraining.model.batch import PackedBatch
from helpers import packed, padded_arrays


def test_ragged_arange() -> None:
    assert ragged_arange(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ragged_arange(np.array([], int), np.array([], int)).tolist() == []


@pytest.mark.parametrize("lengths", [[1], [16], [3, 16, 1, 7], [16] * 5])
def test_a_packed_batch_is_the_padded_rows_without_padding(
    tmp_path: Path, lengths: list[int]
) -> None:
    arrays = padded_arrays(lengths, 16, vocab_size=90)
    write_shard(tmp_path / "part_0.hdf5", arrays)
    shard = read_shard(tmp_path / "part_0.hdf5", vocab_size=90)
    rows = np.arange(len(lengths))[::-1]
    batch = pack_rows(shard, rows)
    assert batch.num_tokens == sum(lengths)
    assert batch.max_seqlen == max(lengths)
    assert batch.cu_seqlens.dtype == torch.int32
    for place, row in enumerate(rows):
        start, end = batch.cu_seqlens[place : place + 2].tolist()
        length = lengths[row]
        assert batch.input_ids[start:end].tolist() == arrays["input_ids"][row, :length].tolist()
        assert batch.segment_ids[start:end].tolist() == arrays["segment_ids"][row, :length].tolist()
        assert batch.position_ids[start:end].tolist() == list(range(length))
        inside = (batch.masked_positions >= start) & (batch.masked_positions < end)
        labelled = arrays["masked_lm_ids"][row] != 0
        positions = arrays["masked_lm_positions"][row][labelled]
        assert (batch.masked_positions[inside] - start).tolist() == positions.tolist()
        labels = arrays["masked_lm_ids"][row][labelled]
        assert batch.masked_labels[inside].tolist() == labels.tolist()
    assert batch.next_sentence_labels.tolist() == arrays["next_sentence_labels"][rows].tolist()


def test_packing_two_shards_is_packing_their_concatenation() -> None:
    one, two = padded_arrays([4, 9], 16, 90, seed=1), padded_arrays([16, 2], 16, 90, seed=2)
    both = {key: np.concatenate([one[key], two[key]]) for key in one}
    shards = [flatten(part, 90, "test") for part in (one, two)]
    (together,) = pack(shards, np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), 4)
    assert_same(together, packed(both))


def assert_same(one: PackedBatch, other: PackedBatch) -> None:
    assert one.max_seqlen == other.max_seqlen
    for name, value in one.tensors().items():
        assert value.dtype == other.tensors()[name].dtype
        assert value.tolist() == other.tensors()[name].tolist(), name


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 9])
def test_packing_many_batches_is_packing_each(batch_size: int) -> None:
    random = np.random.RandomState(batch_size)
    shards = [
        flatten(padded_arrays(random.randint(1, 17, 5).tolist(), 16, 90, seed=seed), 90, "test")
        for seed in range(3)
    ]
    shard_of, rows = random.randint(0, 3, 7), random.randint(0, 5, 7)
    batches = pack(shards, shard_of, rows, batch_size)
    assert [batch.num_sequences for batch in batches] == [
        len(rows[first : first + batch_size]) for first in range(0, 7, batch_size)
    ]
    for number, batch in enumerate(batches):
        here = slice(number * batch_size, (number + 1) * batch_size)
        singly = [pack_rows(shards[w], rows[here][n : n + 1]) for n, w in enumerate(shard_of[here])]
        starts = np.cumsum([0, *(single.num_tokens for single in singly)])
        assert batch.cu_seqlens.tolist() == starts.tolist()
        for name in ("input_ids", "segment_ids", "position_ids", "masked_labels"):
            assert getattr(batch, name).tolist() == [
                value for single in singly for value in getattr(single, name).tolist()
            ]
        assert batch.masked_positions.tolist() == [
            start + place
            for single, start in zip(singly, starts.tolist(), strict=False)
            for place in single.masked_positions.tolist()
        ]
        assert batch.next_sentence_labels.tolist() == [
            single.next_sentence_labels.item() for single in singly
        ]


def test_a_sequence_without_masks_packs() -> None:
    arrays = padded_arrays([4, 6], 16, 90)
    arrays["masked_lm_ids"][0] = 0
    assert pack_rows(flatten(arrays, 90, "test"), np.array([0])).num_masked == 0
    first, second = pack([flatten(arrays, 90, "test")], np.zeros(2, int), np.arange(2), 1)
    assert (first.num_masked, second.num_masked > 0) == (0, True)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    arrays = padded_arrays([4, 9], 16, 90)
    clean = packed(arrays)
    padding = arrays["input_mask"] == 0
    arrays["input_ids"][padding] = -7
    arrays["segment_ids"][padding] = 99
    assert_same(pack_rows(flatten(arrays, 90, "test"), np.arange(2)), clean)


def test_values_that_are_no_integers_are_named() -> None:
    arrays = padded_arrays([4, 9], 16, 90)
    arrays["input_ids"] = arrays["input_ids"].astype(np.float32)
    with pytest.raises(UserError, match="input_ids is float32, not integer"):
        flatten(arrays, 90, "test")


def spoil(arrays: dict[str, np.ndarray], fault: str) -> None:
    if fault == "token":
        arrays["input_ids"][1, 2] = 90
    elif fault == "negative":
        arrays["input_ids"][1, 2] = -3
    elif fault == "label":
        arrays["masked_lm_ids"][0, 0] = 95
    elif fault == "hole":
        arrays["input_mask"][1, 2] = 0
    elif fault == "empty":
        arrays["input_mask"][1] = 0
    elif fault == "segment":
        arrays["segment_ids"][1, 2] = 7
    elif fault == "next sentence":
        arrays["next_sentence_labels"][0] = -100
    elif fault == "position":
        arrays["masked_lm_positions"][0, 0] = 15


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("token", "input_ids has the value 90, but the model's vocabulary has 90"),
        ("negative", "input_ids has the value -3"),
        ("label", "masked_lm_ids has the value 95"),
        ("hole", "not ones followed by zeros"),
        ("empty", "a sequence without tokens"),
        ("position", "masked position outside its sequence"),
        ("segment", "segment_ids has the value 7, but only 0 and 1 make sense"),
        ("next sentence", "next_sentence_labels has the value -100, but only 0 and 1"),
    ],
)
def test_spoiled_content_is_named(tmp_path: Path, fault: str, words: str) -> None:
    arrays = padded_arrays([9, 8], 16, vocab_size=90)
    spoil(arrays, fault)
    path = tmp_path / "part_7.hdf5"
    write_shard(path, arrays)
    with pytest.raises(UserError, match=words) as caught:
        read_shard(path, vocab_size=90)
    assert "part_7.hdf5" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_being_written_are_no_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "part_0.hdf5", padded_arrays([4], 16, 90))
    (tmp_path / "part_1.hdf5.partial").write_bytes(b"half a file")
    assert [info.path.name for info in list_shards(tmp_path)] == ["part_0.hdf5"]


def test_shards_without_sequences(tmp_path: Path) -> None:
    write_shard(tmp_path / "part_0.hdf5", padded_arrays([], 16, 90))
    with pytest.raises(UserError, match="hold no sequences"):
        list_shards(tmp_path)


def test_spoiled_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such data directory"):
        list_shards(tmp_path / "absent")
    with pytest.raises(UserError, match="no shards in"):
        list_shards(tmp_path)
    path = tmp_path / "part_0.hdf5"
    path.write_text("not hdf5")
    with pytest.raises(UserError, match=r"part_0.hdf5: plain text that .*not an HDF5 file"):
        list_shards(tmp_path)
    write_shard(path, padded_arrays([4], 16, 90))
    with h5py.File(path, "a") as file:
        del file["segment_ids"]
    with pytest.raises(UserError, match="no dataset 'segment_ids'"):
        list_shards(tmp_path)
    with h5py.File(path, "a") as file:
        file["segment_ids"] = np.zeros((3, 16), "i1")
    with pytest.raises(UserError, match="'segment_ids' has shape"):
        list_shards(tmp_path)
    write_shard(path, padded_arrays([4], 16, 90))
    write_shard(tmp_path / "part_1.hdf5", padded_arrays([4], 32, 90))
    with pytest.raises(UserError, match=r"part_1.hdf5: sequences of 32 tokens"):
        list_shards(tmp_path)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("input_mask", "'input_mask' has shape (2, 12), but 'input_ids' has (2, 16)"),
        ("masked_lm_positions", "'masked_lm_positions' has shape (2, 2), but 'masked_lm_ids' has"),
    ],
)
def test_columns_that_do_not_fit_together_are_named(tmp_path: Path, key: str, words: str) -> None:
    arrays = padded_arrays([9, 8], 16, vocab_size=90)
    arrays[key] = arrays[key][:, : 12 if key == "input_mask" else 2]
    path = tmp_path / "part_7.hdf5"
    write_shard(path, arrays)
    with pytest.raises(UserError) as caught:
        read_shard(path, vocab_size=90)
    assert words in str(caught.value)


def test_a_format_of_its_own_is_read_by_its_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inspect(path: Path) -> ShardInfo:
        with np.load(path) as file:
            return ShardInfo(path, *file["input_ids"].shape)

    def read(path: Path, vocab_size: int) -> object:
        with np.load(path) as file:
            return flatten(dict(file), vocab_size, str(path))

    monkeypatch.setitem(shard_module.FORMATS, ".npz", ShardFormat(inspect, read))
    arrays = padded_arrays([9, 8], 16, vocab_size=90)
    np.savez(tmp_path / "part_0.npz", **arrays)
    write_shard(tmp_path / "part_1.hdf5", arrays)
    infos = list_shards(tmp_path)
    assert [(info.num_sequences, info.max_seq_length) for info in infos] == [(2, 16), (2, 16)]
    own, usual = (pack_rows(read_shard(info.path, 90, 16), np.arange(2)) for info in infos)
    assert_same(own, usual)
    with pytest.raises(UserError, match="a sequence of 9 tokens"):
        read_shard(infos[0].path, 90, max_seq_length=8)


def test_a_write_that_fails_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "part_0.hdf5"
    write_shard(path, padded_arrays([4], 16, 90))
    before = path.read_bytes()
    (tmp_path / "part_0.hdf5.partial").mkdir()  # in the way of the temporary file
    with pytest.raises(UserError, match=r"cannot write .*part_0.hdf5: a directory stands there"):
        write_shard(path, padded_arrays([5], 16, 90))
    assert path.read_bytes() == before
