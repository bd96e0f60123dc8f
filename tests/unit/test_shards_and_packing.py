"""Shards and packing: what goes in comes out, and faults are named."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from bert_pretraining.data.packing import pack, ragged_arange
from bert_pretraining.data.shards import flatten, list_shards, read_shard, write_shard
from bert_pretraining.errors import UserError
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
    batch = pack([(shard, rows)])
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
    pieces = [(flatten(part, 90, "test"), np.arange(2)) for part in (one, two)]
    together, expected = pack(pieces), packed(both)
    for name in ("input_ids", "position_ids", "cu_seqlens", "masked_positions", "masked_labels"):
        assert getattr(together, name).tolist() == getattr(expected, name).tolist()


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
        ("token", "input_ids has token 90, but the model's vocabulary has 90"),
        ("negative", "input_ids has token -3"),
        ("label", "masked_lm_ids has token 95"),
        ("hole", "not ones followed by zeros"),
        ("empty", "a sequence without tokens"),
        ("position", "masked position outside its sequence"),
        ("segment", "segment_ids has values other than 0 and 1"),
        ("next sentence", "next_sentence_labels has values other than 0 and 1"),
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
    with pytest.raises(UserError, match=r"part_0.hdf5: not a readable HDF5 file"):
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
