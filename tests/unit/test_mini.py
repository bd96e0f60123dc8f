"""The mini data set: the same bytes everywhere, and every way of making one."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from bert_pretraining.data.flat_shard import ragged_arange
from bert_pretraining.data.shards import SCHEMA, list_shards, read_shard
from bert_pretraining.errors import UserError
from bert_pretraining.preparation import mini
from bert_pretraining.preparation.examples import (
    ExampleSettings,
    create_examples,
    pick,
    to_arrays,
)
from bert_pretraining.preparation.grammar import Grammar, vocabulary
from bert_pretraining.preparation.mini import (
    CHECKPOINT_NAME,
    PACKAGED_CHECKPOINT,
    MiniSettings,
    make_mini,
)
from bert_pretraining.preparation.vocabulary import Vocabulary
from helpers import REFERENCE, needs_reference


def digest(arrays: dict[str, np.ndarray], key: str) -> str:
    return hashlib.sha256(np.ascontiguousarray(arrays[key]).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def eval_arrays() -> dict[str, np.ndarray]:
    """Examples of the reference's evaluation text, with the reference's flags."""
    vocab = Vocabulary.load(REFERENCE / "vocab.txt")
    text = (REFERENCE / "text" / "eval.txt").read_text(encoding="utf-8")
    settings = ExampleSettings()
    examples = create_examples(vocab.documents(text), vocab, settings, random.Random(12345))
    return to_arrays(examples, settings)


@needs_reference
@pytest.mark.parametrize(("name", "count"), [("eval_all", None), ("part_eval_1k", 1000)])
def test_examples_are_those_of_the_reference_byte_for_byte(
    eval_arrays: dict[str, np.ndarray], name: str, count: int | None
) -> None:
    expected = json.loads((REFERENCE / "data_digests.json").read_text())["examples"][f"{name}.hdf5"]
    arrays = pick(eval_arrays, count) if count else eval_arrays
    for key in SCHEMA:
        assert list(arrays[key].shape) == expected[key]["shape"]
        assert str(arrays[key].dtype) == expected[key]["dtype"]
        assert digest(arrays, key) == expected[key]["sha256"], key


def test_grammar_gives_the_same_text_on_every_python() -> None:
    text = Grammar(1).text(100)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "9134efd76985f65c"


def test_every_word_of_the_grammar_is_spelled_without_unknowns() -> None:
    vocab = Vocabulary(vocabulary(), "test")
    ids = [token for doc in vocab.documents(Grammar(2).text(500)) for line in doc for token in line]
    assert vocab.ids["[UNK]"] not in ids
    letters = {vocab.ids[piece] for piece in vocabulary() if len(piece.removeprefix("##")) == 1}
    spelled = letters - {vocab.ids[piece] for piece in (",", ".", "##s")}
    assert not spelled & set(ids), "a word of the grammar is missing from the vocabulary"


def test_mini_data_set_is_pinned(mini_data: Path) -> None:
    config = json.loads((mini_data / "bert_config.json").read_text())
    infos = list_shards(mini_data / "2048_shards_uncompressed")
    assert [info.path.name for info in infos][:2] == [
        "part_00000_of_00016.hdf5",
        "part_00001_of_00016.hdf5",
    ]
    tokens = hashlib.sha256()
    for info in infos:
        shard = read_shard(info.path, config["vocab_size"])
        real = ragged_arange(shard.offsets, shard.lengths)
        tokens.update(shard.input_ids[real].astype("<i4").tobytes())
        tokens.update(shard.masked_labels.astype("<i4").tobytes())
    assert tokens.hexdigest()[:16] == "26aad520b952472e"
    (evaluation,) = list_shards(mini_data / "eval_set_uncompressed")
    assert evaluation.num_sequences >= 1000


def test_mini_in_2048_shards(tmp_path: Path) -> None:
    make_mini(MiniSettings(tmp_path / "mini", num_shards=2048))
    infos = list_shards(tmp_path / "mini" / "2048_shards_uncompressed")
    assert len(infos) == 2048
    assert infos[-1].path.name == "part_02047_of_02048.hdf5"
    assert min(info.num_sequences for info in infos) >= 1


def test_packaged_checkpoint_is_small() -> None:
    assert PACKAGED_CHECKPOINT.stat().st_size < 1_000_000


def test_another_length_has_no_packaged_checkpoint(tmp_path: Path) -> None:
    report = make_mini(MiniSettings(tmp_path / "mini", max_seq_length=128))
    assert not report.has_start_checkpoint
    assert not (tmp_path / "mini" / CHECKPOINT_NAME).exists()


@pytest.mark.slow
def test_standard_library_text(tmp_path: Path) -> None:
    report = make_mini(MiniSettings(tmp_path / "mini", source="stdlib"))
    assert report.eval_sequences >= 1000
    assert not report.has_start_checkpoint
    assert 0.0 < report.baselines["commonest token"] < report.baselines["neighbour statistics"]


def test_baselines_are_below_the_target(mini_data: Path, tmp_path: Path) -> None:
    report = make_mini(MiniSettings(tmp_path / "again"))
    assert 0.08 < report.baselines["commonest token"] < 0.15
    assert 0.5 < report.baselines["neighbour statistics"] < 0.65


def test_bad_input_leaves_nothing_behind(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One sentence. Another one.\n\n" * 3)
    with pytest.raises(UserError, match="3 documents"):
        make_mini(MiniSettings(tmp_path / "mini", text=[text]))
    text.write_text("A short document here. It ends.\n\n" * 60)
    with pytest.raises(UserError, match="evaluation sequences, fewer than 1000"):
        make_mini(MiniSettings(tmp_path / "mini", text=[text]))
    text.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        make_mini(MiniSettings(tmp_path / "mini", text=[text]))
    with pytest.raises(UserError, match="cannot read"):
        make_mini(MiniSettings(tmp_path / "mini", text=[tmp_path / "absent"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]
    with pytest.raises(UserError, match=r"exists and is no complete mini data set .*; choose"):
        make_mini(MiniSettings(tmp_path))
    assert text.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"max_seq_length": 100_000},
            "--max_seq_length 100000 is out of .* from 16 to 512",
        ),
        ({"max_seq_length": 513}, "pass a number from 16 to 512"),
        ({"max_seq_length": 15}, "pass a number from 16 to 512"),
        (
            {"num_shards": 10**9},
            "--num_shards 1000000000 is out of .* from 1 to 4320",
        ),
        ({"num_shards": 0}, "pass a number from 1 to 4320"),
    ],
)
def test_numbers_out_of_bounds_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int], words: str
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("made text for a data set that is refused")

    monkeypatch.setattr(mini, "Grammar", work)
    with pytest.raises(UserError, match=words):
        make_mini(MiniSettings(tmp_path / "mini", **changes))
    assert list(tmp_path.iterdir()) == []


def test_more_shards_than_sequences_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mini, "MIN_EVAL_SEQUENCES", 1)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"A document. It ends with {number}." for number in range(200)))
    with pytest.raises(UserError, match=r"4000: there are \d+ sequences only; ask for fewer"):
        make_mini(MiniSettings(tmp_path / "mini", num_shards=4000, text=[text]))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.fixture
def mini_copy(mini_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mini_data, tmp_path / "copy"))


def test_the_same_data_set_again_changes_nothing(mini_copy: Path) -> None:
    (mini_copy / "notes.txt").write_text("of the user")
    before = {path: path.stat().st_mtime_ns for path in mini_copy.rglob("*")}
    report = make_mini(MiniSettings(mini_copy))
    assert not report.made
    expected = f"{mini_copy} holds this data set already, complete: nothing to do"
    assert mini.describe(report) == expected
    assert {path: path.stat().st_mtime_ns for path in mini_copy.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_shards": 8}, "has --num_shards 16, not 8"),
        ({"max_seq_length": 128}, "has --max_seq_length 64, not 128"),
        ({"seed": 1}, "holds other sequences .another --seed or text"),
        ({"source": "stdlib"}, "was made of another text .--source, --text"),
    ],
)
def test_another_data_set_in_its_place_is_refused(
    mini_data: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=f"exists and {words}.*; choose another --output_dir"):
        make_mini(MiniSettings(mini_data, **changes))


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("2048_shards_uncompressed/part_00003_of_00016.hdf5", "is not complete: 15 of its shards"),
        (CHECKPOINT_NAME, f"is not complete: it has no {CHECKPOINT_NAME}"),
        ("vocab.txt", "is not complete: it has no vocab.txt"),
        ("bert_config.json", "is no complete mini data set"),
    ],
)
def test_an_incomplete_data_set_is_refused(mini_copy: Path, lost: str, words: str) -> None:
    (mini_copy / lost).unlink()
    with pytest.raises(UserError, match=f"exists and {words}"):
        make_mini(MiniSettings(mini_copy))


def test_vocabulary_without_special_tokens() -> None:
    with pytest.raises(UserError, match=r"lacks \[MASK\]"):
        Vocabulary(["[UNK]", "[CLS]", "[SEP]", "a"], "vocab.txt")
