"""Which files of a folder are shards, and what is said of the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bert_pretraining.config import resolve
from bert_pretraining.config.settings import Config
from bert_pretraining.data import inputs
from bert_pretraining.data.shards import list_shards, write_shard
from bert_pretraining.errors import UserError
from helpers import padded_arrays

Spoil = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of two sequences of up to 16 tokens."""
    for number in range(3):
        write_shard(tmp_path / f"part_{number}.hdf5", padded_arrays([9, 8], 16, 90, number))
    return tmp_path


def one(folder: Path) -> Path:
    return folder / "part_1.hdf5"


def rename(pattern: str) -> Spoil:
    def spoil(folder: Path) -> None:
        for number, path in enumerate(sorted(folder.iterdir())):
            target = folder / pattern.format(number)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)

    return spoil


@pytest.mark.parametrize(
    ("names", "found", "pattern"),
    [
        ("wikicorpus_en_training_{}.hdf5", "3 other files (wikicorpus_en_training_0", "'*.hdf5'"),
        ("{}.h5", "3 other files (0.h5, 1.h5, 2.h5)", "'*.h5'"),
        (
            "a/d{}/x.h5",
            "3 other files in sub-folders (a/d0/x.h5, a/d1/x.h5, a/d2/x.h5)",
            "'**/*.h5'",
        ),
        ("d{}/x.h5", "3 other files in sub-folders (d0/x.h5, d1/x.h5, d2/x.h5)", "'*/*.h5'"),
        ("train-{}", "3 other files (train-0, train-1, train-2), the first of them an HDF5", "'*'"),
    ],
)
def test_other_names_are_read_with_the_pattern_that_the_error_proposes(
    folder: Path, names: str, found: str, pattern: str
) -> None:
    rename(names)(folder)
    with pytest.raises(UserError) as caught:
        list_shards(folder)
    assert f"expected HDF5 files with 'part' in the name, found {found}" in caught.value.problem
    assert caught.value.fix.startswith(f"to read these pass --shard_pattern {pattern}; else ")
    assert len(list_shards(folder, pattern.strip("'"))) == 3


@pytest.mark.parametrize("pattern", ["/absolute/*", "", "../*"])
def test_patterns_that_are_none_are_refused(folder: Path, pattern: str) -> None:
    with pytest.raises(UserError, match="--shard_pattern"):
        list_shards(folder, pattern)


NOTICED = {
    "other name": (
        lambda folder: one(folder).rename(folder / "shard_1.hdf5"),
        "not read: 1 file without 'part' in the name (shard_1.hdf5); to read them too: "
        "--shard_pattern '*.hdf5'",
    ),
    "unfinished": (
        lambda folder: one(folder).rename(folder / "part_1.hdf5.crdownload"),
        "not read: 1 file of an unfinished download or copy (part_1.hdf5.crdownload)",
    ),
    "missing": (
        rename("part_{}_of_5.hdf5"),
        "3 of 5 shards are here; 2 are missing (part_00003_of_00005.hdf5, part_00004_of_00005.hdf",
    ),
}


@pytest.mark.parametrize("what", NOTICED)
def test_what_is_not_read_is_counted_and_named(folder: Path, what: str) -> None:
    spoil, words = NOTICED[what]
    spoil(folder)
    said: list[str] = []
    list_shards(folder, say=said.append)
    assert len(said) == 1
    assert said[0].startswith(f"Notice: {folder}: {words}")


def test_files_beside_the_shards_are_no_shards(folder: Path) -> None:
    for name in ("._part_0.hdf5", ".part_1.hdf5.swp", "part_1.hdf5.md5", "README", ".DS_Store"):
        (folder / name).write_text("no shard")
    (folder / "partitions").mkdir()
    said: list[str] = []
    assert len(list_shards(folder, say=said.append)) == 3
    assert said == []


def test_names_of_every_kind_are_read(folder: Path) -> None:
    for name in (b"part [1]*? \xff.hdf5", b"part\n.hdf5"):
        write_shard(Path(os.fsdecode(bytes(folder) + b"/" + name)), padded_arrays([9], 16, 90))
    assert len(list_shards(folder)) == 5
    (folder / "part\n.hdf5").write_text("x")
    with pytest.raises(UserError) as caught:
        list_shards(folder)
    assert str(caught.value).startswith(f"{folder}/part\\n.hdf5: plain text that begins 'x'")


def settings(**values: object) -> Config:
    chosen = {name: str(value) for name, value in values.items()}
    flags = {"name": "default", "config": "V100x1x1", "init_checkpoint": "random", **chosen}
    return resolve(flags).config


def data_set(root: Path) -> Path:
    for name in (inputs.TRAIN_NAME, inputs.EVAL_NAME):
        (root / name).mkdir(parents=True)
        (root / name / "part_0.hdf5").touch()
    return root


def test_a_folder_or_file_of_a_data_set_is_told_from_the_data_set(tmp_path: Path) -> None:
    root = data_set(tmp_path / "wiki")
    order = f"--data_dir {root}"
    for wrong in (
        tmp_path,
        root / inputs.TRAIN_NAME,
        root / inputs.EVAL_NAME,
        root / inputs.TRAIN_NAME / "part_0.hdf5",
    ):
        with pytest.raises(UserError) as caught:
            inputs.data_paths(settings(data_dir=wrong))
        assert caught.value.fix.endswith(order)
        assert str(wrong) in caught.value.problem


def test_shards_alone_are_named_with_the_flags_that_read_them(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        inputs.data_paths(settings(data_dir=folder))
    assert f"data_dir {folder} holds no 2048_shards_uncompressed/ and no" in str(caught.value)
    assert "found part_0.hdf5, part_1.hdf5, part_2.hdf5: shards" in caught.value.problem
    assert caught.value.fix.startswith(f"pass --train_dir {folder} and --eval_dir DIR")


def test_folders_of_other_names_are_proposed_where_they_hold_shards(tmp_path: Path) -> None:
    for name in ("hdf5_train", "hdf5_test", "pretraining_code"):
        (tmp_path / name).mkdir()
    for name in ("hdf5_train/a_0.hdf5", "hdf5_test/a_0.hdf5", "pretraining_code/run.py"):
        (tmp_path / name).touch()
    with pytest.raises(UserError) as caught:
        inputs.data_paths(settings(data_dir=tmp_path))
    train, test = tmp_path / "hdf5_train", tmp_path / "hdf5_test"
    assert caught.value.fix == f"pass --train_dir {train} and --eval_dir {test} with it"
    (tmp_path / "hdf5_train" / "a_0.hdf5").unlink()
    with pytest.raises(UserError) as caught:
        inputs.data_paths(settings(data_dir=tmp_path))
    assert caught.value.fix.startswith("pass the folder with 2048_shards_uncompressed/")


def test_one_pattern_serves_a_data_set_whose_evaluation_keeps_the_usual_names(
    tmp_path: Path, folder: Path
) -> None:
    rename("wikicorpus_en_training_{}.hdf5")(folder)
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    (evaluation / "part_eval.hdf5").touch()
    for pattern in ("*training*", "*.hdf5"):
        config = settings(train_dir=folder, eval_dir=evaluation, shard_pattern=pattern)
        names = inputs.evaluation_shards(evaluation, "pass another", config.shard_pattern).names
        assert names == ["part_eval.hdf5"]
    with pytest.raises(UserError, match=r"no file fits --shard_pattern '\*.h5', found no files"):
        (evaluation / "part_eval.hdf5").unlink()
        inputs.evaluation_shards(evaluation, "pass another", "*.h5")
