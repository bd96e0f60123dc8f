"""`data verify`: good sets pass, every spoiled one is named with its file and fault."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest

from bert_pretraining.data import shard_index
from bert_pretraining.data.shard_names import INDEX_NAME
from bert_pretraining.data.shards import (
    list_shards,
    read_arrays,
    write_shard,
    write_varlength_shard,
)
from bert_pretraining.errors import UserError
from bert_pretraining.preparation import verify as verify_module
from bert_pretraining.preparation import verify_report
from bert_pretraining.preparation.prepare import TextSettings, checksum, create_file, pick_file
from bert_pretraining.preparation.verify import verify
from bert_pretraining.preparation.verify_report import VerifyReport, md5_of, row_md5s
from helpers import REFERENCE, needs_reference
from verify_sets import (
    EVAL,
    ROWS,
    SHARDS,
    TRAIN,
    Arrays,
    put,
    put_sizes,
    rewrite,
    shard,
    small_files,
    write_set,
)


@pytest.fixture(scope="module")
def small(mini_data: Path) -> dict[str, Arrays]:
    return small_files(mini_data)


@pytest.fixture
def data(tmp_path: Path, small: dict[str, Arrays], mini_data: Path) -> Path:
    """A good small set in the fixed form, to spoil."""
    return write_set(tmp_path / "set", small, mini_data, "fixed")


def replaced(key: str, values: np.ndarray | None) -> Callable[[Path], None]:
    """A spoiler: take a dataset out of shard 1, put another, or none, in its place."""

    def spoil(data: Path) -> None:
        with h5py.File(data / shard(1), "a") as file:
            del file[key]
            if values is not None:
                file[key] = values

    return spoil


def longer_rows(data: Path) -> None:
    arrays = read_arrays(data / shard(1))
    for key in ("input_ids", "input_mask", "segment_ids"):
        arrays[key] = np.pad(arrays[key], ((0, 0), (0, 16)))
    write_shard(data / shard(1), arrays)


def no_rows(data: Path) -> None:
    arrays = read_arrays(data / shard(1)).items()
    write_shard(data / shard(1), {key: array[:0] for key, array in arrays})


def renamed(name: str) -> Callable[[Path], object]:
    return lambda data: (data / shard(1)).rename(data / TRAIN / name)


def copied(name: str) -> Callable[[Path], object]:
    return lambda data: (data / TRAIN / name).write_bytes((data / shard(1)).read_bytes())


def remove(name: str) -> Callable[[Path], object]:
    return lambda data: (data / name).unlink()


def repeated(data: Path) -> None:
    """Rows of shard 0 once more in shard 1: 5% of all."""
    for key, array in read_arrays(data / shard(0)).items():
        rewrite(data / shard(1), key, partial(put, slice(12), array[20:32]))


def leaked(data: Path, rows: int = 6) -> None:
    """Evaluation sequences in shard 1 with other masks: 10% of the evaluation set."""
    source, arrays = read_arrays(data / EVAL / "part_eval.hdf5"), read_arrays(data / shard(1))
    for row in range(rows):
        for key, array in arrays.items():
            array[row] = source[key][row]
        count = np.count_nonzero(source["masked_lm_positions"][row])
        positions = source["masked_lm_positions"][row, :count]
        arrays["input_ids"][row, positions] = source["masked_lm_ids"][row, :count]
        for key, value in (("positions", 3), ("ids", arrays["input_ids"][row, 3])):
            arrays[f"masked_lm_{key}"][row] = 0
            arrays[f"masked_lm_{key}"][row, 0] = value
        arrays["input_ids"][row, 3] = 4
    write_shard(data / shard(1), arrays)


ONE = "1 sequence has "
# a dataset of shard 1, its place to spoil, what to put there, and what is said of it
VALUES = [
    ("input_ids", (7, 2), 30000, ONE + "a token outside the vocabulary"),
    ("input_ids", (7, 2), -5, ONE + "a token outside the vocabulary"),
    ("input_ids", (7, 0), 9, "1 sequence does not begin with token 2"),
    ("input_ids", (slice(5), -1), 9, "sequences do not end with token 3"),
    ("input_ids", (slice(None), 0), 9, "[9 ... 3], in the other files [2 ... 3]"),
    ("masked_lm_ids", (7, 0), 30000, ONE + "a label outside the vocabulary"),
    ("masked_lm_ids", (7, 0), 0, ONE + "a label behind a padded one"),
    ("masked_lm_ids", (7, 0), 2, ONE + "a label that is padding, [CLS] or [SEP]"),
    ("masked_lm_ids", slice(None), 0, "no masked tokens"),
    ("masked_lm_positions", (7, 0), 64, ONE + "a masked position outside their words"),
    ("masked_lm_positions", (7, 1), 1, ONE + "masked positions that do not ascend"),
    ("masked_lm_positions", (7, -1), 5, ONE + "other masked positions than labels"),
    ("input_mask", (7, 3), 0, ONE + "an input_mask that is not ones followed by zeros"),
    ("input_mask", (7, 3), 2, ONE + "an input_mask with other values than 0 and 1"),
    ("input_mask", (7, slice(9, None)), 0, ONE + "tokens behind their input_mask"),
    ("input_mask", 7, 0, ONE + "no tokens"),
    ("segment_ids", (7, 1), 2, ONE + "a segment_id that is not 0 or 1"),
    ("next_sentence_labels", 7, 3, ONE + "a next_sentence_labels that is not 0 or 1"),
]


@pytest.mark.parametrize(("key", "place", "value", "words"), VALUES)
def test_spoiled_values(data: Path, key: str, place: object, value: int, words: str) -> None:
    rewrite(data / shard(1), key, partial(put, place, value))
    report = verify(data)
    assert not report.ok
    (line,) = (line for line in report.problems if line.startswith(shard(1)) and words in line)
    assert ("row 7" in line) == ("1 sequence " in line)


SPOILED = {
    "cut file": (lambda data: os.truncate(data / shard(1), 9000), shard(1),
                 "an HDF5 file that ends too early (9000 of "),
    "wrong dtype": (replaced("input_ids", np.zeros((60, 64), "f4")), shard(1),
                    "'input_ids' holds float32 numbers, not integers"),
    "fewer rows": (replaced("segment_ids", np.zeros((59, 64), "i1")), shard(1),
                   "'segment_ids' has shape (59, 64), but 'input_ids' has (60, 64)"),
    "longer rows": (longer_rows, shard(1), "rows of 80 tokens, in the other files of 64"),
    "forms": (lambda data: write_varlength_shard(data / shard(1), read_arrays(data / shard(0))),
              shard(1), "rows of varying numbers of tokens"),
    "no sequences": (no_rows, shard(1), "no sequences"),
    "other count": (renamed("part_1_of_8.hdf5"), f"{TRAIN}/part_1_of_8.hdf5", "one of 8 shards"),
    "number too high": (renamed("part_4_of_4.hdf5"), f"{TRAIN}/part_4_of_4.hdf5", "of 4 shards is"),
    "number twice": (copied("part_1_of_4.hdf5"), f"{TRAIN}/part_1_of_4.hdf5", "the same number as"),
    "no shard's name": (copied("my_part.hdf5"), f"{TRAIN}/my_part.hdf5", "not named part_<number>"),
    "shard twice": (copied(Path(shard(2)).name), shard(2), f"the same sequences as {shard(1)}"),
    "repeats": (repeated, TRAIN, f"12 of 240 (5.00%) sequences repeat others, one of them in "
                f"{shard(0)} and {shard(1)}"),
    "leak": (leaked, f"{EVAL}/part_eval.hdf5", "6 of 60 (10.00%) sequences are in training too"),
    "missing": (remove(shard(1)), TRAIN, "1 of 4 shards missing: part_00001_of_00004.hdf5;"),
    "no evaluation set": (remove(f"{EVAL}/part_eval.hdf5"), EVAL, "no shards in "),
    "no dataset": (replaced("segment_ids", None), shard(1), "no dataset 'segment_ids'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SPOILED)
def test_spoiled_set(data: Path, fault: str) -> None:
    spoil, file, words = SPOILED[fault]
    spoil(data)
    report = verify(data)
    assert not report.ok
    named = [line for line in report.problems if line.startswith(f"{file}: ") and words in line]
    assert len(named) == 1, report.problems
    assert all("\n" not in line for line in report.problems)


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("segment_ids", lambda row: row[1:], ONE + "other numbers of tokens and segment_ids"),
        ("masked_lm_positions", lambda row: row[1:], ONE + "other masked positions than labels"),
        ("input_ids", lambda row: row[:0], ONE + "no tokens"),
        ("masked_lm_ids", lambda row: row * 0, ONE + "a label that is padding"),
        ("masked_lm_positions", lambda row: row - row[0], ONE + "a masked position outside"),
        ("segment_ids", lambda row: row - 1, ONE + "a segment_id that is not 0 or 1"),
        ("input_ids", lambda row: -row, ONE + "a token outside the vocabulary"),
    ],
)
def test_spoiled_variable_length_rows(
    tmp_path: Path, small: dict[str, Arrays], mini_data: Path,
    key: str, change: Callable[[np.ndarray], np.ndarray], words: str,
) -> None:  # fmt: skip
    variable = write_set(tmp_path, small, mini_data, "variable")
    rewrite(variable / shard(1), key, lambda rows: rows.__setitem__(7, change(rows[7])))
    lines = verify(variable).problems
    assert [line for line in lines if line.startswith(f"{shard(1)}: {words}")], lines


@pytest.mark.parametrize("form", ["fixed", "variable"])
def test_the_mini_set_is_good_in_both_forms(mini_data: Path, tmp_path: Path, form: str) -> None:
    directory, count = mini_data, 15248
    if form == "variable":
        names = [f"{EVAL}/part_eval.hdf5", f"{TRAIN}/part_00000_of_00016.hdf5"]
        files = {name: read_arrays(mini_data / name) for name in names}
        files[names[1].replace("00016", "00001")] = files.pop(names[1])
        directory, count = write_set(tmp_path / "set", files, mini_data, form), 953
    report = verify(directory)
    assert report.ok, report.problems
    evaluation, train = report.sets
    assert (train.role, train.sequences, evaluation.sequences) == ("training", count, 1114)
    assert train.max_seq_length == (64 if form == "fixed" else None)
    mask = read_arrays(mini_data / EVAL / "part_eval.hdf5")["input_mask"]
    lengths = mask.sum(axis=1, dtype=int)
    assert evaluation.tokens == lengths.sum()
    expected = [np.count_nonzero((lengths > low) & (lengths <= low + 4)) for low in range(0, 64, 4)]
    assert [bin_count for _, _, bin_count in evaluation.histogram] == expected
    assert f"{directory}: good" in report.describe() and report.not_checked
    # The fingerprint is of the real tokens: the same in both forms.
    assert report.eval_md5 == "94e19fbf391ec8982ef2ba78a3735d85"


def test_parallel_processes_find_the_same(data: Path) -> None:
    leaked(data)
    (data / shard(2)).write_text("no HDF5")
    report = verify(data, jobs=2)
    assert len(report.problems) == 2
    assert report.to_json() == verify(data).to_json()


def die(_: object) -> None:
    os._exit(1)


def test_a_process_that_dies_is_a_problem(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "check_file", die)
    (data / EVAL / "part_eval.hdf5").unlink()
    report = verify(data, jobs=2)
    assert any(f"{TRAIN}: a process died, 4 files not checked" in line for line in report.problems)


def test_few_repeats_and_leaks_are_notes(data: Path, mini_data: Path) -> None:
    evaluation = (mini_data / EVAL / "part_eval.hdf5").read_bytes()
    (data / EVAL / "part_eval.hdf5").write_bytes(evaluation)
    leaked(data, rows=2)
    for key, array in read_arrays(data / shard(0)).items():
        rewrite(data / shard(1), key, partial(put, 9, array[5]))
    report = verify(data)
    assert report.ok, report.problems
    notes = "\n".join(report.notes)
    assert "2 of 1114 (0.18%) sequences are in training too" in notes
    assert "1 of 240 (0.42%) sequences repeat others" in notes


def test_an_index_that_says_other_numbers_is_a_problem(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_index, "FEWEST", SHARDS)
    for number in range(SHARDS):
        os.utime(data / shard(number), ns=(10**18, 10**18))
    list_shards(data / TRAIN)
    report = verify(data)
    assert report.ok, report.problems
    assert not any("does not read" in note for note in report.notes)
    index = data / TRAIN / INDEX_NAME
    index.write_text(index.read_text().replace(f", {ROWS}, 64, []]", f", {ROWS + 1}, 64, []]", 1))
    (line,) = verify(data).problems
    name = Path(shard(0)).name
    assert line == (
        f"{TRAIN}/{INDEX_NAME} says other numbers of sequences than {name} have; delete it, and "
        "a run makes it again"
    )


def test_uneven_and_unnumbered_files_are_told(data: Path) -> None:
    arrays = read_arrays(data / shard(1))
    write_shard(data / shard(1), {key: array[:40] for key, array in arrays.items()})
    for name in ("README", "part_1.hdf5.md5"):
        (data / TRAIN / name).write_text("no shard")
    for number in range(SHARDS):
        (data / shard(number)).rename(data / TRAIN / f"part-{number}.hdf5")
    report = verify(data)
    assert report.ok, report.problems
    assert f"{TRAIN}: files are uneven: 40 to 60 sequences" in report.notes
    assert f"{TRAIN}: 2 files that training does not read" in report.notes
    assert any("whether all shards are there" in line for line in report.not_checked)


@needs_reference
def test_md5_is_the_one_of_the_reference(tmp_path: Path) -> None:
    (tmp_path / EVAL).mkdir()
    path = tmp_path / EVAL / "part_eval_1k.hdf5"
    create_file(
        [REFERENCE / "text" / "eval.txt"],
        tmp_path / "all.hdf5",
        TextSettings(REFERENCE / "vocab.txt"),
    )
    pick_file(tmp_path / "all.hdf5", path, 1000)
    arrays = read_arrays(path)
    lengths = arrays["input_mask"].sum(axis=1, dtype=np.int64)
    # The recorded md5 is of rows whose lengths wrapped around in 8 bits (test_prepare.py).
    wrapped = lengths.astype(np.int8)
    cut = [row[:length] for row, length in zip(arrays["input_ids"], wrapped.tolist(), strict=True)]
    sums = row_md5s(np.concatenate(cut), np.cumsum([len(row) for row in cut]))
    digests = json.loads((REFERENCE / "data_digests.json").read_text())
    assert md5_of(sums) == digests["varlength_md5"]["part_eval_1k.hdf5"]
    # Of the whole rows, as published, `verify` and `data checksum` agree in both forms.
    for write in (write_shard, write_varlength_shard):
        write(path, arrays)
        report = verify(tmp_path)
        assert (report.eval_md5, report.eval_sequences) == (checksum(path), 1000)


@pytest.mark.parametrize(
    ("wrong", "problems", "note"),
    [
        ((), [], None),
        ((1,), ["part_00001_of_02048.hdf5"], None),
        (("eval",), ["part_eval_10k.hdf5"], None),
        ((0, 1), [], "only the evaluation set matches"),
        ((0, 1, "eval"), [], "none of the published checksums match"),
    ],
)
def test_published_md5s(
    tmp_path: Path, small: dict[str, Arrays], mini_data: Path,
    monkeypatch: pytest.MonkeyPatch, wrong: tuple, problems: list[str], note: str | None,
) -> None:  # fmt: skip
    paths = {number: f"{TRAIN}/part_{number:05d}_of_02048.hdf5" for number in (0, 1)}
    files = {paths[number]: small[shard(number)] for number in (0, 1)}
    paths["eval"] = f"{EVAL}/part_eval_10k.hdf5"
    files[paths["eval"]] = small[f"{EVAL}/part_eval.hdf5"]
    data = write_set(tmp_path / "set", files, mini_data, "fixed")
    put_sizes(data, vocab_size=30522, max_position_embeddings=512)
    lists = tmp_path / "lists"
    lists.mkdir()
    lines = [
        f"{Path(path).name}\t{'0' * 32 if number in wrong else checksum(data / path)}\n"
        for number, path in paths.items()
    ]
    (lists / "some.chk").write_text("".join(lines))
    monkeypatch.setattr(verify_report, "CHECKSUMS", lists)
    report = verify(data)
    lines = [Path(line.split(":")[0]).name for line in report.problems if "published" in line]
    assert lines == problems
    assert report.published == (3, 3 - len(wrong))
    told = [line for line in report.notes if "published" in line]
    assert [line.startswith(note or "none") for line in told] == [True] * bool(note)


def test_published_lists_are_packaged() -> None:
    lines = [line.split() for path in verify_report.CHECKSUMS.glob("*.chk") for line in path.open()]
    assert len(lines) == len(dict(lines)) == 2048 + 4320 + 1
    assert ["part_eval_10k.hdf5", "611d8bae26646145e1c33338a27ba124"] in lines


def test_many_problems_are_told_in_40_lines(data: Path) -> None:
    for number in range(100):
        (data / TRAIN / f"part_broken_{number}").write_text("no HDF5")
    text = verify(data).describe()
    for words in ("NOT good: 200 problems", "(and 97 more: unreadable file)", "of 100 files"):
        assert words in text
    many = [f"line {number}" for number in range(50)]
    part = verify_report.summarize("set", "training", [])
    text = VerifyReport(
        Path("data"), dict.fromkeys(many, many), many, many, [part] * 50,
        30522, "0" * 32, 1, (2, 1), None,
    ).describe()  # fmt: skip
    assert len(text.splitlines()) <= 40
    assert "(and 49 more: line 0)" in text and "and 46 more" in text


def test_json(data: Path) -> None:
    report = verify(data)
    values = json.loads(json.dumps(report.to_json()))
    assert values["ok"] is True
    assert values["eval_fingerprint"] == {"md5": report.eval_md5, "sequences": ROWS}
    assert [part["sequences"] for part in values["sets"]] == [ROWS, ROWS * SHARDS]


def test_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such data set"):
        verify(tmp_path / "absent")
    (tmp_path / TRAIN).mkdir()
    with pytest.raises(UserError, match="HDF5 files with 'part' in the name, found no files"):
        verify(tmp_path)
