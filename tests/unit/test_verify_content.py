"""`data verify`: sets that can be read and are wrong as a whole, and other forms that are right."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest

from bert_pretraining.data.shards import read_arrays, write_shard
from bert_pretraining.errors import UserError
from bert_pretraining.preparation.verify import verify
from verify_sets import SHARDS, TRAIN, Arrays, put, rewrite, shard, small_files, write_set


@pytest.fixture(scope="module")
def small(mini_data: Path) -> dict[str, Arrays]:
    return small_files(mini_data)


@pytest.fixture
def data(tmp_path: Path, small: dict[str, Arrays], mini_data: Path) -> Path:
    return write_set(tmp_path / "set", small, mini_data, "fixed")


def same_labels(data: Path) -> None:
    for number in range(SHARDS):
        rewrite(data / shard(number), "next_sentence_labels", partial(put, slice(None), 1))


def answers(data: Path) -> None:
    """Put each masked token back into its place."""
    for number in range(SHARDS):
        arrays = read_arrays(data / shard(number))
        rows, columns = np.nonzero(arrays["masked_lm_ids"])
        positions = arrays["masked_lm_positions"][rows, columns]
        arrays["input_ids"][rows, positions] = arrays["masked_lm_ids"][rows, columns]
        write_shard(data / shard(number), arrays)


def dangling(data: Path) -> None:
    (data / shard(1)).unlink()
    (data / shard(1)).symlink_to("/gone")


def renamed(name: str) -> Callable[[Path], object]:
    return lambda data: (data / shard(1)).rename(data / TRAIN / name)


def alike_in_a_file(data: Path) -> None:
    rewrite(data / shard(1), "next_sentence_labels", partial(put, slice(None), 0))


WRONG = {
    "labels all alike": (same_labels, TRAIN, "next_sentence_labels is 1 in 240 of 240 sequences "
                         "(100.0%), expected about half: nothing to learn; make them with"),
    "alike in a file": (alike_in_a_file, shard(1),
                        "next_sentence_labels is 0 in all sequences of this file"),
    "answers": (answers, TRAIN, "stand in input_ids, so that the model sees the answers; put"),
    "link to nothing": (dangling, f"{TRAIN}/{Path(shard(1)).name}", "a link to nothing (/gone)"),
    "other name": (renamed("shard_1.hdf5"), TRAIN, "training does not read shard_1.hdf5; rename"),
    "unfinished": (renamed("part_1.crdownload"), TRAIN, "does not read part_1.crdownload; rename"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_as_a_whole_is_named(data: Path, fault: str) -> None:
    spoil, file, words = WRONG[fault]
    spoil(data)
    report = verify(data)
    assert not report.ok
    named = [line for line in report.problems if line.startswith(f"{file}: ") and words in line]
    assert len(named) == 1, report.problems


def wider(data: Path) -> None:
    for number in range(SHARDS):
        arrays = {
            key: array.astype("i8") for key, array in read_arrays(data / shard(number)).items()
        }
        with h5py.File(data / shard(number), "w") as file:
            file.update(arrays)


def ignored(data: Path) -> None:
    """-100 in place of each 0 of the padding of predictions."""
    for number in range(SHARDS):
        for key in ("masked_lm_ids", "masked_lm_positions"):
            rewrite(data / shard(number), key, lambda values: np.putmask(values, values == 0, -100))


@pytest.mark.parametrize(
    ("change", "notes"),
    [(wider, f"{shard(0)} and 3 more: 'input_ids' is int64, not int16; training"), (ignored, "")],
)
def test_other_forms_that_training_reads_are_good(
    data: Path, change: Callable[[Path], None], notes: str
) -> None:
    before = verify(data).to_json()
    change(data)
    report = verify(data)
    assert report.ok, report.problems
    assert notes in "\n".join(report.notes)
    assert report.to_json()["sets"] == before["sets"]


def test_large_vocabularies_are_checked_too(data: Path) -> None:
    config = json.loads((data / "bert_config.json").read_text()) | {"vocab_size": 120000}
    (data / "bert_config.json").write_text(json.dumps(config))
    for number in range(SHARDS):
        arrays = read_arrays(data / shard(number))
        with h5py.File(data / shard(number), "r+") as file:
            del file["input_ids"]
            file["input_ids"] = arrays["input_ids"].astype("i4")
    assert verify(data).ok
    rewrite(data / shard(1), "input_ids", partial(put, (7, 2), 119_999))
    assert verify(data).ok
    rewrite(data / shard(1), "input_ids", partial(put, (7, 2), 120_000))
    (line,) = verify(data).problems
    assert line.startswith(f"{shard(1)}: 1 sequence has a token outside the vocabulary")


def test_a_pattern_chooses_the_files(data: Path) -> None:
    for number in range(SHARDS):
        (data / shard(number)).rename(data / TRAIN / f"training_{number}.hdf5")
    report = verify(data, pattern="*training*")
    assert report.ok, report.problems
    assert [part.files for part in report.sets] == [1, 4]
    with pytest.raises(UserError, match=r"pass the one above: .*set$"):
        verify(data / TRAIN)
