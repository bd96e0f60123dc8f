"""`data prepare` and its stages: the reference's bytes, and nothing half made."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from bert_pretraining.data.packing import pack_rows
from bert_pretraining.data.shards import list_shards, read_arrays, read_shard, write_shard
from bert_pretraining.errors import UserError
from bert_pretraining.preparation import prepare as stages
from bert_pretraining.preparation.examples import (
    ExampleSettings,
    create_examples,
    draw_below,
    shuffle,
)
from bert_pretraining.preparation.prepare import PrepareSettings, TextSettings
from bert_pretraining.preparation.vocabulary import CLS, MAX_WORD_LENGTH, SEP, Vocabulary
from bert_pretraining.runtime.words import counted
from helpers import REFERENCE, ROOT, command, needs_reference, padded_arrays


@pytest.fixture(scope="module")
def digests() -> dict:
    return json.loads((REFERENCE / "data_digests.json").read_text())


def digest(path: Path) -> dict[str, dict]:
    """As data_digests.json describes it: shape, dtype and sha256 of every dataset."""
    found = {}
    with h5py.File(path) as file:
        for key, dataset in file.items():
            element = h5py.check_vlen_dtype(dataset.dtype)
            sums = hashlib.sha256()
            if element is None:
                sums.update(np.ascontiguousarray(dataset[()]).tobytes())
                name = str(dataset.dtype)
            else:
                for row in dataset[()]:
                    sums.update(np.int64(len(row)).tobytes() + row.tobytes())
                name = f"vlen {element}"
            found[key] = {
                "shape": list(dataset.shape), "dtype": name, "sha256": sums.hexdigest()
            }  # fmt: skip
    return found


def text_dir(directory: Path) -> Path:
    """The reference's two training texts, alone in a directory."""
    directory.mkdir()
    for number in (0, 1):
        name = f"part-0000{number}-of-00500"
        (directory / name).symlink_to(REFERENCE / "text" / name)
    return directory


def prepare_command(tmp_path: Path) -> list[str]:
    return [
        *("data", "prepare", "--text_dir", str(tmp_path / "text")),
        *("--eval_text", str(REFERENCE / "text/eval.txt"), "--vocab", str(REFERENCE / "vocab.txt")),
        *("--output_dir", str(tmp_path / "out"), "--shards", "64", "--num_eval_examples", "1000"),
        *("--jobs", "2", "--allow_missing_parts"),
    ]


@pytest.mark.slow
@needs_reference
def test_prepare_killed_and_rerun_gives_the_bytes_of_the_reference(
    tmp_path: Path, digests: dict
) -> None:
    text_dir(tmp_path / "text")
    work = tmp_path / "out" / "work"
    arguments = prepare_command(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "bert_pretraining", *arguments],
        env={"PYTHONPATH": str(ROOT / "base"), "PATH": "/usr/bin:/bin"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.time() + 120
    while not (list(work.glob("*.hdf5")) or process.poll() is not None) and time.time() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, "it ended before it could be killed"
    subprocess.run(["kill", f"-{signal.SIGKILL.value}", "--", f"-{process.pid}"], check=True)
    process.wait()
    there = len([path for path in work.iterdir() if path.suffix == ".hdf5"])
    assert there >= 1

    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"examples: {counted(3 - there, 'file')} made, {there} there" in done.stdout
    shards = tmp_path / "out" / "2048_shards_uncompressed"
    assert {path.name for path in shards.iterdir()} == set(digests["shards_64"])
    for path in shards.iterdir():
        assert digest(path) == digests["shards_64"][path.name], path.name
    evaluation = tmp_path / "out" / "eval_set_uncompressed" / "part_eval_1k.hdf5"
    assert digest(evaluation) == digests["examples"]["part_eval_1k.hdf5"]
    assert not work.exists()

    again = command(*arguments, cwd=tmp_path)
    assert "finished already: nothing to do" in again.stdout
    next(shards.iterdir()).rename(tmp_path / "elsewhere")
    again = command(*arguments, cwd=tmp_path)
    assert "files of the finished data set are gone: making it again" in again.stdout
    assert {path.name: digest(path) for path in shards.iterdir()} == digests["shards_64"]
    other = command(*arguments, "--random_seed", 7, cwd=tmp_path)
    assert other.returncode == 2
    assert "is finished, and was made with --random_seed 12345, not 7; choose" in other.stderr

    for name, expected in digests["varlength"].items():
        source = evaluation if name.startswith("part_eval") else shards / name
        converted = tmp_path / "varlength" / name
        converted.parent.mkdir(exist_ok=True)
        stages.to_varlength(source, converted)
        check_varlength(source, converted, expected)
        assert stages.checksum(converted) == stages.checksum(source)
        wrapped = [hashlib.md5(str(row.tolist()).encode()).hexdigest() for row in wrap(source)]
        md5 = hashlib.md5(str(wrapped).encode()).hexdigest()
        assert md5 == digests["varlength_md5"][name]


def wrap(source: Path, key: str = "input_ids") -> list[np.ndarray]:
    """Rows cut as the recorded variable-length data are.

    They were recorded with NumPy 2, under which the reference's `sum(input_mask[i])` adds
    up in int8: lengths above 127 wrap around, and such rows come out cut or with padding.
    With the NumPy of its day the sum was right, and so it is here.
    """
    arrays = read_arrays(source)
    lengths = arrays["input_mask"].sum(axis=1, dtype=np.int64).astype(np.int8)
    return [row[:length] for row, length in zip(arrays[key], lengths.tolist(), strict=True)]


def check_varlength(source: Path, converted: Path, expected: dict) -> None:
    """Right lengths; and, their wrapping apart, the recorded bytes."""
    found = digest(converted)
    assert set(found) == set(expected)
    arrays = read_arrays(source)
    lengths = arrays["input_mask"].sum(axis=1, dtype=np.int64)
    with h5py.File(converted) as file:
        for key in ("input_ids", "segment_ids"):
            for row, length, whole in zip(file[key][()], lengths, arrays[key], strict=True):
                assert row.tolist() == whole[:length].tolist()
            assert found[key]["dtype"] == expected[key]["dtype"]
            sums = hashlib.sha256()
            for row in wrap(source, key):
                sums.update(np.int64(len(row)).tobytes() + row.tobytes())
            assert sums.hexdigest() == expected[key]["sha256"]
    for key in ("masked_lm_positions", "masked_lm_ids", "next_sentence_labels"):
        assert found[key] == expected[key]


@needs_reference
@pytest.mark.parametrize("number", [0, 1])
def test_create_examples_command(tmp_path: Path, digests: dict, number: int) -> None:
    name = f"part-0000{number}-of-00500"
    done = command(
        "data", "create-examples", "--input_file", REFERENCE / "text" / name,
        "--output_file", tmp_path / "out.hdf5", "--vocab", REFERENCE / "vocab.txt",
        "--do_lower_case=True", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "out.hdf5") == digests["examples"][f"{name}.hdf5"]


@pytest.mark.parametrize(
    ("examples", "shards", "sizes"),
    [
        (130, 64, [2] * 64),  # 64 * 3 > 130: every shard one short, two examples dropped
        (128, 64, [1] + [2] * 63),  # an exact division: only the first is short
        (10, 3, [3, 3, 3]),
        (12, 4, [2, 3, 3, 3]),
        (2, 1, [1]),
    ],
)
def test_shard_sizes_follow_the_reference(examples: int, shards: int, sizes: list[int]) -> None:
    assert stages.shard_sizes(examples, shards) == sizes


def test_too_few_examples_for_the_shards() -> None:
    with pytest.raises(UserError, match="3 examples cannot fill 4 shards"):
        stages.shard_sizes(3, 4)


def test_shards_are_the_examples_in_order_and_a_rerun_keeps_them(tmp_path: Path) -> None:
    arrays = padded_arrays([8] * 23, 16, 90)
    arrays["input_ids"][:, 0] = np.arange(23)
    inputs = [tmp_path / "part-0.hdf5", tmp_path / "part-1.hdf5"]
    write_shard(inputs[0], {key: array[:9] for key, array in arrays.items()})
    write_shard(inputs[1], {key: array[9:] for key, array in arrays.items()})
    assert stages.shard(inputs, tmp_path / "out", 4) == (4, 0)
    paths = sorted((tmp_path / "out").iterdir())
    rows = np.concatenate([read_arrays(path)["input_ids"][:, 0] for path in paths])
    assert rows.tolist() == list(range(20))
    before = paths[0].stat().st_mtime_ns
    paths[2].unlink()
    assert stages.shard(inputs, tmp_path / "out", 4) == (1, 3)
    assert paths[0].stat().st_mtime_ns == before
    assert read_arrays(paths[2])["input_ids"][:, 0].tolist() == list(range(10, 15))
    arrays["input_ids"][:, 0] += 30
    write_shard(inputs[0], {key: array[:9] for key, array in arrays.items()})
    later = paths[0].stat().st_mtime_ns + 10**9
    os.utime(inputs[0], ns=(later, later))
    assert stages.shard(inputs, tmp_path / "out", 4) == (4, 0)
    assert read_arrays(paths[0])["input_ids"][:, 0].tolist() == list(range(30, 35))


def test_a_variable_length_shard_loads_like_its_fixed_form(tmp_path: Path) -> None:
    arrays = padded_arrays([3, 16, 1, 9], 16, 90, seed=4)
    arrays["masked_lm_positions"][arrays["masked_lm_ids"] != 0] += 1  # position 0 is [CLS]
    arrays["masked_lm_positions"][2] = 0
    arrays["masked_lm_ids"][2] = 0
    for row, length in enumerate([3, 16, 1, 9]):
        arrays["masked_lm_positions"][row] %= max(length, 1)
    keep = arrays["masked_lm_positions"] != 0
    for key in ("masked_lm_positions", "masked_lm_ids"):
        for row in range(4):
            kept = arrays[key][row][keep[row]]
            arrays[key][row] = 0
            arrays[key][row, : len(kept)] = kept
    fixed, varlength = tmp_path / "part_0.hdf5", tmp_path / "varlength" / "part_0.hdf5"
    write_shard(fixed, arrays)
    varlength.parent.mkdir()
    stages.to_varlength(fixed, varlength)
    assert list_shards(varlength.parent)[0].max_seq_length is None
    one, two = (pack_rows(read_shard(path, 90), np.arange(4)) for path in (fixed, varlength))
    for name in ("input_ids", "segment_ids", "cu_seqlens", "masked_positions", "masked_labels"):
        assert getattr(one, name).tolist() == getattr(two, name).tolist(), name


VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", *(f"##{c}" for c in "abcdefgh")]


def small_text(tmp_path: Path, text: str | bytes) -> TextSettings:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "text.txt").write_bytes(data)
    return TextSettings(tmp_path / "vocab.txt", ExampleSettings(32, 5, dupe_factor=2))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "text.txt: empty"),
        ("\n\n \n", "text.txt: empty"),
        ("\x00\n", "1 of 2 characters are NUL: not text"),
        ("\u200b\n", "no sentences"),
        (b"a b\xff\n", "text.txt: not UTF-8 text .byte 3."),
    ],
)
def test_bad_text(tmp_path: Path, text: str | bytes, words: str) -> None:
    settings = small_text(tmp_path, text)
    with pytest.raises(UserError, match=words):
        stages.create_file([tmp_path / "text.txt"], tmp_path / "out.hdf5", settings)
    assert not (tmp_path / "out.hdf5").exists()


@pytest.mark.parametrize("text", ["a b c\n", "a b c", "a b\nc d\n\ne f\n", "a\r\nb\r\n\r\nc\r\n"])
def test_small_texts_make_whole_examples(tmp_path: Path, text: str) -> None:
    settings = small_text(tmp_path, text)
    made = stages.create_file([tmp_path / "text.txt"], tmp_path / "out.hdf5", settings)
    shard = read_shard(tmp_path / "out.hdf5", len(VOCAB))
    assert shard.num_sequences == made.examples >= 2
    assert shard.lengths.max() <= 32


def test_several_inputs_are_one_corpus(tmp_path: Path) -> None:
    settings = small_text(tmp_path, "a b\nc d\n\ne f\n")
    stages.create_file([tmp_path / "text.txt"], tmp_path / "one.hdf5", settings)
    (tmp_path / "first").write_text("a b\n")
    (tmp_path / "second").write_text("c d\n\ne f\n")
    inputs = [tmp_path / "first", tmp_path / "second"]
    stages.create_file(inputs, tmp_path / "two.hdf5", settings)
    assert digest(tmp_path / "one.hdf5") == digest(tmp_path / "two.hdf5")


def test_pick_wants_enough_examples(tmp_path: Path) -> None:
    write_shard(tmp_path / "all.hdf5", padded_arrays([8] * 5, 16, 90))
    with pytest.raises(UserError, match="has 5 examples, 6 are wanted"):
        stages.pick_file(tmp_path / "all.hdf5", tmp_path / "out.hdf5", 6)


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit")
def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path: Path) -> None:
    write_shard(tmp_path / "all.hdf5", padded_arrays([8] * 400, 512, 90))
    done = subprocess.run(
        ["prlimit", "--fsize=100000", sys.executable, "-m", "bert_pretraining", "data", "pick-eval",
         "--input_file", "all.hdf5", "--output_file", "out.hdf5", "--num_examples", "300"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT / "base"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("Error: cannot write out.hdf5")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.hdf5"]


def test_prepare_names_what_is_missing(tmp_path: Path) -> None:
    settings = PrepareSettings(
        tmp_path / "absent", tmp_path / "eval.txt", tmp_path / "out",
        TextSettings(tmp_path / "vocab.txt"),
    )  # fmt: skip
    with pytest.raises(UserError, match="no such directory of text files"):
        stages.prepare(settings)
    (tmp_path / "absent").mkdir()
    with pytest.raises(UserError, match="no text files in"):
        stages.prepare(settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 255, 256, 257, 508, 5000])
def test_shuffle_is_pythons_own(count: int) -> None:
    for seed in range(5):
        theirs, ours = random.Random(seed), random.Random(seed)
        expected, items = list(range(count)), list(range(count))
        theirs.shuffle(expected)
        shuffle(items, ours)
        assert items == expected
        assert ours.getstate() == theirs.getstate()
        if count:
            assert [draw_below(count, ours) for _ in range(50)] == [
                theirs.randint(0, count - 1) for _ in range(50)
            ]


@pytest.mark.parametrize("lower_case", [True, False])
def test_words_tokenised_once_are_sentences_tokenised_whole(lower_case: bool) -> None:
    odd = ["\u03c3", "##\u03c3", "##\u03c2", "\u00e9", "\u4e2d", "!", "##!", "1", "##1"]
    vocabulary = Vocabulary(
        [*VOCAB, *odd, "ab", "AB", "a!", "a" * 201, "gh" * 100], "test", lower_case
    )
    sentences = [
        "", " ", "a", "ab  abc AB Ab", "a!b! !c a! ab!", "\ta b\u00a0c\u3000d\re",
        "a\x1cb \x85c \x00d\u200be", "a \u0301b e\u0301 \u00e9 E\u0301\u0323 !\u0301a",
        "\u03a3\u03a3 \u03a3 a\u03a3 a\u03a3! \u03a3a", "\u4e2da \u4e2d\u4e2d b\u4e2d",
        "[CLS] a [MASK] [UNK]", "a" * 200, "a" * 201, "gh" * 100, "gh" * 100 + "a",
        "z1 1 \u00b2 \u0130 \u212a",
    ]  # fmt: skip
    cased = [sentence.lower() if lower_case else sentence for sentence in sentences]
    tokenizer = Tokenizer(models.WordPiece(
        vocabulary.ids, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_LENGTH
    ))  # fmt: skip
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=lower_case)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    whole = tokenizer.encode_batch(cased, add_special_tokens=False)
    assert vocabulary.encode(sentences) == [encoding.ids for encoding in whole]


@pytest.mark.parametrize("special", [CLS, SEP])
def test_special_tokens_in_the_text_are_never_masked(special: str) -> None:
    vocabulary = Vocabulary(VOCAB, "test")
    number = vocabulary.ids[special]
    documents = [[[number, 5, number, 6], [7, number, number]] for _ in range(20)]
    examples = create_examples(documents, vocabulary, ExampleSettings(32), random.Random(1))
    labels = {label for example in examples for label in example.labels}
    assert labels == {5, 6, 7}
