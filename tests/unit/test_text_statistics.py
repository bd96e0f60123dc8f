"""The figures of a text and the warnings that real text does not get."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bert_pretraining.preparation import prepare as stages
from bert_pretraining.preparation.examples import ExampleSettings
from bert_pretraining.preparation.prepare import TextSettings
from bert_pretraining.preparation.text_statistics import TextStatistics, count_words
from helpers import REFERENCE, in_process, needs_reference

WORDS = "the dog sees a cat and one man runs to that old house".split()
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, ".", "?"]


def sentence(number: int) -> str:
    """A sentence of nine words."""
    return " ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 10)).capitalize() + "."


def text(num_documents: int, num_sentences: int, between: str = "\n") -> str:
    """Documents with sentences that differ; `between` two sentences of a document."""
    return "\n\n".join(
        between.join(sentence(7 * document + index) for index in range(num_sentences))
        for document in range(num_documents)
    )


def figures(tmp_path: Path, content: str) -> TextStatistics:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    (tmp_path / "text").write_text(content)
    settings = TextSettings(tmp_path / "vocab.txt", ExampleSettings(64, 10, dupe_factor=1))
    return stages.create_file([tmp_path / "text"], tmp_path / "out.hdf5", settings)


WRAPPED = "\n".join(
    line
    for document in range(20)
    for line in (*(sentence(document)[:20], sentence(document)[20:]) * 9, "")
)


@pytest.mark.parametrize(
    ("content", "cause", "fix"),
    [
        (text(1, 60), "one document only, so every 'random' next", "Put a blank line between"),
        (text(60, 1), "100.0% of the documents have one sentence", "none between the sentences"),
        (text(90, 2), "of the next-sentence labels are 1, where", "a smaller --max_seq_length"),
        (text(30, 20, " "), "a line has 200.0 tokens on average and 100% of the lines hold several",
         "data segment"),
        (text(30, 20).replace("a ", "un ").replace("dog", "chien"),
         "tokens are [UNK]: the vocabulary is not", "--vocab"),
        (WRAPPED, "50% of the lines begin in the middle of a sentence: the lines are wrapped",
         "data segment"),
    ],
)  # fmt: skip
def test_what_real_text_never_has(tmp_path: Path, content: str, cause: str, fix: str) -> None:
    warnings = figures(tmp_path, content).warnings()
    assert [warning for warning in warnings if cause in warning and fix in warning], warnings


def test_a_vocabulary_of_another_text(tmp_path: Path) -> None:
    """Words in many pieces, one sentence a line: no paragraph is suspected."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "acdeghimnorstu"), "."]
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCAB[:5], *letters]) + "\n")
    (tmp_path / "text").write_text(text(30, 20).replace(".", " was there as well of course."))
    flags = "--vocab vocab.txt --max_seq_length 64 --max_predictions_per_seq 10 --dupe_factor 1"
    done = in_process(
        *f"data create-examples --input_file text --output_file o.hdf5 {flags}".split(),
        cwd=tmp_path,
    )
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("Warning: "))
    assert re.fullmatch(
        r"Warning: text: [3-5]\.\d tokens a word: vocab\.txt \(46 pieces\) does not fit this "
        r"text; is it the right vocabulary\?",
        line,
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("The dog, which sees a cat.", 6),
        ("\u72d7\u770b\u89c1\u732b\u3002", 5),  # Chinese
        ("PyTorch \u3067\u5b66\u7fd2\u3059\u308b", 6),  # Japanese
        ("\ud55c\uad6d\uc5b4 \ubb38\uc7a5", 5),  # Korean
        ("\u0e2b\u0e21\u0e32", 3),  # Thai
    ],
)
def test_words_of_languages_without_spaces_are_characters(line: str, words: int) -> None:
    """Their vocabularies hold characters, so that many tokens between spaces are usual."""
    found = count_words([line])
    assert found.words == words
    usual = TextStatistics(words=words, tokens=2 * words, sentences=1, lines=1)
    assert usual.warnings() == []


def test_long_lines_that_hold_one_sentence_each() -> None:
    found = TextStatistics(documents=9, sentences=90, tokens=9000, words=7000, lines=90)
    (warning,) = found.warnings()
    assert warning.startswith("a sentence has 100.0 tokens on average, where real text has about")
    assert "paragraph" not in warning


def test_figures_of_a_sound_text(tmp_path: Path) -> None:
    found = figures(tmp_path, text(30, 20))
    assert found.warnings() == []
    assert (found.documents, found.sentences, found.tokens) == (30, 600, 6000)
    share = 100 * found.random_next / found.examples
    length = found.example_tokens / found.examples
    assert found.describe() == (
        "30 documents, 20.0 sentences a document, 10.0 tokens a sentence, 0.0% of the documents "
        f"have one sentence, {found.examples} sequences of {length:.1f} tokens, "
        f"{share:.1f}% of the next-sentence labels are 1 (random next)"
    )
    both = found + found
    assert (both.documents, both.corpora, both.examples) == (60, 2, 2 * found.examples)


@needs_reference
def test_wikipedia_gets_no_warning(tmp_path: Path) -> None:
    settings = TextSettings(REFERENCE / "vocab.txt", ExampleSettings(dupe_factor=1))
    source = REFERENCE / "text/part-00001-of-00500"
    found = stages.create_file([source], tmp_path / "out.hdf5", settings)
    assert found.warnings() == []
    assert found.describe().startswith("41 documents, 186.4 sentences a document, 28.3 tokens a se")


def test_every_stage_ends_with_a_summary(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(
            text(12, 30).replace("cat", "man" if name == "a.txt" else "dog")
        )
    flags = "--vocab vocab.txt --max_seq_length 64 --max_predictions_per_seq 10 --dupe_factor 1"
    part = "T/part-00000-of-00002"
    summaries = {
        "data segment --input a.txt b.txt --output_dir T --num_eval_articles 4":
            ["the training text: 20 documents, 30", "the evaluation text: 4 documents, 30"],
        f"data create-examples --input_file {part} --output_file part-0.hdf5 {flags}":
            [f"{part}: 10 documents, 30"],
        "data shard --input_dir . --output_dir S --num_shards 2": ["the 2 shards: "],
        "data pick-eval --input_file part-0.hdf5 --output_file e.hdf5 --num_examples 9":
            ["the picked examples, e.hdf5: 9 sequences of "],
        "data to-varlength --input_file e.hdf5 --output_file v.hdf5": ["v.hdf5: 9 sequences of "],
        f"data prepare --text_dir T --eval_text T/eval.txt --output_dir D --shards 2 "
        f"--num_eval_examples 4 {flags}":
            ["the training text: 20 documents, ", "the evaluation text: 4 documents, ",
             "the picked examples, part_eval_4.hdf5: 4 seq", "the 2 shards: "],
    }  # fmt: skip
    for words, expected in summaries.items():
        done = in_process(*words.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("Summary of ")]
        for line, start in zip(lines, expected, strict=True):
            assert line.startswith(f"Summary of {start}"), words


def test_parts_of_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    (tmp_path / "T").mkdir()
    for number in range(3):
        (tmp_path / "T" / f"speech-{number}").write_text(text(1, 30 + number))
    (tmp_path / "eval.txt").write_text(text(3, 40).replace("cat", "dog"))
    done = in_process(
        "data", "prepare", "--text_dir", "T", "--eval_text", "eval.txt", "--output_dir", "D",
        "--vocab", "vocab.txt", "--shards", 2, "--num_eval_examples", 4, "--max_seq_length", 64,
        "--max_predictions_per_seq", 10, "--dupe_factor", 2, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0
    assert "Warning: the training text: 3 of 3 text files hold one document only" in done.stderr
    assert "gather files that are a document each with python -m bert_pr" in done.stderr
