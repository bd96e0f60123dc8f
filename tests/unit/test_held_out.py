"""The evaluation text is never trained on, in whatever form the training folder holds it."""

from __future__ import annotations

import dataclasses
import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bert_pretraining.data.shards import read_arrays
from bert_pretraining.errors import UserError
from bert_pretraining.preparation import prepare as stages
from bert_pretraining.preparation.examples import ExampleSettings
from bert_pretraining.preparation.prepare import PrepareSettings, TextSettings

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "1", "2"]
EVAL_LETTERS = "gh"  # stand in the evaluation text alone


def documents(letters: str, count: int) -> str:
    """Documents of two sentences; no two are alike."""
    first, second = letters
    return "".join(
        f"{first} {second} {' '.join(f'{number:b}').replace('0', '2')}\n{second} {first}\n\n"
        for number in range(count)
    )


@pytest.fixture
def settings(tmp_path: Path) -> PrepareSettings:
    """Two parts to train on, and an evaluation text beside them."""
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    (tmp_path / "held.txt").write_text(documents(EVAL_LETTERS, 20))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "part-0").write_text(documents("ab", 20))
    (tmp_path / "texts" / "part-1").write_text(documents("cd", 20))
    text = TextSettings(tmp_path / "vocab.txt", ExampleSettings(32, 5, dupe_factor=1))
    return PrepareSettings(
        tmp_path / "texts", tmp_path / "held.txt", tmp_path / "out", text,
        num_shards=2, num_eval_examples=5,
    )  # fmt: skip


def trained_letters(settings: PrepareSettings) -> set[str]:
    """The letters of all training examples."""
    shards = (settings.output_dir / "2048_shards_uncompressed").glob("*.hdf5")
    ids = {token for path in shards for token in read_arrays(path)["input_ids"].ravel().tolist()}
    # Masking draws random tokens, so a rare letter may come from there: look at the labels.
    shards = (settings.output_dir / "2048_shards_uncompressed").glob("*.hdf5")
    labels = {n for path in shards for n in read_arrays(path)["masked_lm_ids"].ravel().tolist()}
    assert ids
    return {VOCAB[label] for label in labels} & set("abcdefgh")


def crlf(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes().replace(b"\n", b"\r\n"))


def compressed(source: Path, target: Path) -> None:
    target.write_bytes(gzip.compress(source.read_bytes()))


def other_case_and_accents(source: Path, target: Path) -> None:
    target.write_text(source.read_text().upper().replace("E", "E\u0301"))


def inside_a_part(source: Path, _: Path) -> None:
    part = source.parent / "texts" / "part-1"
    part.write_text(part.read_text() + source.read_text())


def one_document_inside(source: Path, _: Path) -> None:
    part = source.parent / "texts" / "part-1"
    part.write_text("\n".join(source.read_text().split("\n")[:3]) + "\n" + part.read_text())


@pytest.mark.parametrize(
    ("put", "told"),
    [
        (shutil.copy, "held (the same documents as in {})"),
        (os.symlink, "held (the evaluation text)"),
        (os.link, "held (the evaluation text)"),
        (crlf, "held (the same documents as in {})"),
        (compressed, "held (the same documents as in {})"),
        (other_case_and_accents, "held (the same documents as in {})"),
        (inside_a_part, "20 of the 40 documents of part-1 (also in {})"),
        (one_document_inside, "1 of the 21 documents of part-1 (also in {})"),
    ],
)
def test_evaluation_text_in_the_training_folder(
    settings: PrepareSettings,
    capfd: pytest.CaptureFixture[str],
    put: Callable[[Path, Path], object],
    told: str,
) -> None:
    put(settings.eval_text, settings.text_dir / "held")
    stages.prepare(settings)
    left_out = told.format(settings.eval_text)
    assert f"Left out of the training text: {left_out}\n" in capfd.readouterr().err
    assert trained_letters(settings) == set("abcd")


def test_the_evaluation_text_itself_lies_in_the_folder(settings: PrepareSettings) -> None:
    """And a rerun of the half-done stages with the right --eval_text leaves nothing of it."""
    moved = settings.text_dir / "heldout.txt"
    settings.eval_text.rename(moved)
    wrong = dataclasses.replace(
        settings, eval_text=settings.text_dir / "part-1", num_eval_examples=5000
    )
    with pytest.raises(UserError, match="a smaller --num_eval_examples"):
        stages.prepare(wrong)  # trains on heldout.txt
    right = dataclasses.replace(settings, eval_text=moved)
    stages.prepare(right)
    assert trained_letters(right) == set("abcd")


def test_a_text_named_as_the_evaluation_examples_are(settings: PrepareSettings) -> None:
    (settings.text_dir / "part-1").rename(settings.text_dir / "eval_all")
    stages.prepare(settings)
    assert trained_letters(settings) == set("abcd")
    (evaluation,) = (settings.output_dir / "eval_set_uncompressed").iterdir()
    labels = set(read_arrays(evaluation)["masked_lm_ids"].ravel().tolist())
    assert {VOCAB[label] for label in labels} & set("abcdefgh") == set(EVAL_LETTERS)


def test_repeats_by_chance_are_kept_and_told(
    settings: PrepareSettings, capfd: pytest.CaptureFixture[str]
) -> None:
    settings.eval_text.write_text(documents(EVAL_LETTERS, 200))
    first = "\n".join(settings.eval_text.read_text().split("\n")[:3]) + "\n"
    part = settings.text_dir / "part-1"
    part.write_text(first + part.read_text())
    stages.prepare(settings)
    told = capfd.readouterr().err
    assert "Warning: 1 of 200 evaluation documents is in the training text too, and" in told
    assert "Left out" not in told


def test_nothing_but_evaluation_text(settings: PrepareSettings) -> None:
    for path in settings.text_dir.iterdir():
        path.unlink()
    shutil.copy(settings.eval_text, settings.text_dir / "part-0")
    with pytest.raises(UserError, match=r"holds evaluation text alone: part-0 .the same documents"):
        stages.prepare(settings)
    settings.eval_text.rename(settings.text_dir / "held.txt")
    (settings.text_dir / "part-0").unlink()
    inside = dataclasses.replace(settings, eval_text=settings.text_dir / "held.txt")
    with pytest.raises(UserError, match=r"no text files in .*, only held.txt .the evaluation text"):
        stages.prepare(inside)
    assert not settings.output_dir.exists()


def test_sentences_of_the_evaluation_text_in_one_long_document(
    settings: PrepareSettings, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [f"a b c d e f {' '.join(f'{number:b}').replace('0', '2')}" for number in range(20)]
    settings.eval_text.write_text("\n".join(lines) + "\n")
    part = settings.text_dir / "part-1"
    part.write_text(part.read_text().rstrip("\n") + "\n" + "\n".join(lines[:10]) + "\n")
    stages.prepare(settings)
    told = capfd.readouterr().err
    assert "Warning: 10 of 20 evaluation sentences of 5 words or more are in the training" in told


def test_a_text_that_is_there_twice_is_told(
    settings: PrepareSettings, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(settings.text_dir / "part-1", settings.text_dir / "part-2")
    stages.prepare(settings)
    assert "trained on twice: part-2 has the content of part-1\n" in capfd.readouterr().err


def test_many_processes_find_the_same(
    settings: PrepareSettings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bert_pretraining.preparation.held_out.IN_THIS_PROCESS", 1)
    shutil.copy(settings.eval_text, settings.text_dir / "held")
    stages.prepare(dataclasses.replace(settings, jobs=2))
    assert "held (the same documents" in capfd.readouterr().err
    assert trained_letters(settings) == set("abcd")


@pytest.mark.parametrize("change", ["vocab", "text_dir", "made"])
def test_inputs_where_the_output_goes_are_refused(settings: PrepareSettings, change: str) -> None:
    if change == "vocab":
        wrong = dataclasses.replace(settings, output_dir=settings.text_dir)
    else:
        place = settings.output_dir / ("work" if change == "made" else "2048_shards_uncompressed")
        shutil.copytree(settings.text_dir, place / "texts")
        wrong = dataclasses.replace(settings, text_dir=place / "texts")
    with pytest.raises(UserError, match="choose another --output_dir"):
        stages.prepare(wrong)
