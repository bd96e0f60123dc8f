"""Figures of a text by which a person can judge whether a model can learn from it.

Every stage that reads text ends with `tell`: one line of figures on stderr, and a warning with
cause and fix for each figure that real text never has. For comparison: pieces of the English
Wikipedia as MLPerf prepares it have 200 sentences a document, 28 tokens a sentence, at most 2% of
documents with one sentence, and half of the next-sentence labels are 1.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from bert_pretraining.preparation.sentences import sentences
from bert_pretraining.runtime.words import counted

SAMPLED_LINES = 2000  # of a file, for what needs a look at each line
LOOKED_AT = 4000  # characters of a line
LEAST_CAPITALS = 0.05
# Limits that real text keeps away from.
MOST_OF_ONE_SENTENCE = 0.5
MOST_TOKENS_A_SENTENCE = 80
MOST_UNKNOWN = 0.1
MOST_TOKENS_A_WORD = 2.5
MOST_LINES_OF_SEVERAL = 0.3
MOST_BROKEN_LINES = 0.3
LABELS_ONE = (0.35, 0.7)
FEWEST_EXAMPLES = 50  # fewer say little about the labels
SEGMENT = "python -m bert_pretraining data segment"
# A word is what stands between white space; in scripts that put none between words (Thai to Khmer,
# Chinese, Japanese) and in Korean, whose words BERT's vocabularies hold in pieces, a character.
_WITHOUT_SPACES = (
    "\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_WITHOUT_SPACES}]|[^\s{_WITHOUT_SPACES}]+")
BLANK_LINES = "Put a blank line between documents, and none between the sentences of one"


@dataclass(frozen=True)
class TextStatistics:
    """Counts of one text, or of several added up.

    Attributes:
        corpora: texts whose documents are "random next" to each other.
        lone: corpora of one document.
        documents, sentences, tokens: word pieces, or words where no vocabulary is at hand.
        words: words of the text, where `tokens` are word pieces.
        of_one_sentence: documents with one sentence.
        unknown: tokens that are [UNK].
        lines, lines_of_several, broken_lines: lines that were looked at; those that hold several
            sentences; those that go on with a sentence of the line before.
        examples, random_next, example_tokens: sequences, those with next-sentence label 1, and the
            tokens of all.
    """

    corpora: int = 0
    lone: int = 0
    documents: int = 0
    sentences: int = 0
    tokens: int = 0
    words: int = 0
    of_one_sentence: int = 0
    unknown: int = 0
    lines: int = 0
    lines_of_several: int = 0
    broken_lines: int = 0
    examples: int = 0
    random_next: int = 0
    example_tokens: int = 0

    def __add__(self, other: TextStatistics) -> TextStatistics:
        sums = (
            getattr(self, part.name) + getattr(other, part.name) for part in fields(TextStatistics)
        )
        return TextStatistics(*sums)

    def describe(self, tokens: str = "tokens") -> str:
        """The figures on one line."""
        parts = []
        if self.documents:
            parts += [
                counted(self.documents, "document"),
                f"{_ratio(self.sentences, self.documents):.1f} sentences a document",
                f"{_ratio(self.tokens, self.sentences):.1f} {tokens} a sentence",
                f"{_ratio(self.of_one_sentence, self.documents):.1%} of the documents have one "
                "sentence",
            ]
        if self.examples:
            length = _ratio(self.example_tokens, self.examples)
            parts += [
                f"{counted(self.examples, 'sequence')} of {length:.1f} tokens",
                f"{_ratio(self.random_next, self.examples):.1%} of the next-sentence labels are 1 "
                "(random next)",
            ]
        return ", ".join(parts)

    def warnings(self, tokens: str = "tokens", vocabulary: str = "the vocabulary") -> list[str]:
        """What real text never has: the cause, and what to do. vocabulary: what to call it."""
        found = [*self._of_documents(), *self._of_sentences(tokens)]
        ones = _ratio(self.random_next, self.examples)
        explained = self.lone or _ratio(self.of_one_sentence, self.documents) > MOST_OF_ONE_SENTENCE
        low, high = LABELS_ONE
        if self.examples >= FEWEST_EXAMPLES and not low <= ones <= high and not explained:
            found.append(
                f"{ones:.1%} of the next-sentence labels are 1, where real text has about 50%: the "
                "documents are shorter than a sequence. Use longer documents or a smaller "
                "--max_seq_length"
            )
        if _ratio(self.unknown, self.tokens) > MOST_UNKNOWN:
            found.append(
                f"{_ratio(self.unknown, self.tokens):.1%} of the tokens are [UNK]: the vocabulary "
                "is not made for this text. Pass the --vocab of its language"
            )
        elif not self._vocabulary_fits:
            found.append(
                f"{_ratio(self.tokens, self.words):.1f} tokens a word: {vocabulary} does not fit "
                "this text; is it the right vocabulary?"
            )
        return found

    @property
    def _vocabulary_fits(self) -> bool:
        return _ratio(self.tokens, self.words) <= MOST_TOKENS_A_WORD

    def _of_documents(self) -> list[str]:
        if self.lone == 1 and self.corpora == 1:
            return [
                "there is one document only, so every 'random' next sentence comes from the same "
                f"document and cannot be told from the true one. {BLANK_LINES}"
            ]
        found = []
        if self.lone:
            found.append(
                f"{self.lone} of {self.corpora} text files hold one document only, so every "
                "'random' next sentence in them comes from the same document. Put a blank line "
                "between documents; gather files that are a document each with "
                f"{SEGMENT} --documents file"
            )
        if _ratio(self.of_one_sentence, self.documents) > MOST_OF_ONE_SENTENCE:
            found.append(
                f"{_ratio(self.of_one_sentence, self.documents):.1%} of the documents have one "
                "sentence, whose next-sentence label is always 1: is a blank line after every "
                f"sentence? {BLANK_LINES}"
            )
        return found

    def _of_sentences(self, tokens: str) -> list[str]:
        found = []
        several = _ratio(self.lines_of_several, self.lines)
        length = _ratio(self.tokens, self.sentences)
        if several > MOST_LINES_OF_SEVERAL:
            found.append(
                f"a line has {length:.1f} {tokens} on average and {several:.0%} of the lines hold "
                "several sentences: a paragraph a line? One sentence a line is needed: split the "
                f"text with {SEGMENT}"
            )
        elif length > MOST_TOKENS_A_SENTENCE and self._vocabulary_fits:
            found.append(
                f"a sentence has {length:.1f} {tokens} on average, where real text has about 30: "
                "does no full stop end its sentences? Put one sentence on each line"
            )
        if _ratio(self.broken_lines, self.lines) > MOST_BROKEN_LINES:
            found.append(
                f"{_ratio(self.broken_lines, self.lines):.0%} of the lines begin in the middle of "
                f"a sentence: the lines are wrapped. Join and split them with {SEGMENT}"
            )
        return found


def count_documents(
    documents: Sequence[Sequence[Sequence[object]]], unknown: object = None
) -> TextStatistics:
    """The counts of one corpus: its documents' sentences' tokens; `unknown` stands for [UNK]."""
    lengths = [len(document) for document in documents]
    return TextStatistics(
        corpora=1,
        lone=int(len(documents) == 1),
        documents=len(documents),
        sentences=sum(lengths),
        tokens=sum(len(sentence) for document in documents for sentence in document),
        of_one_sentence=lengths.count(1),
        unknown=sum(sentence.count(unknown) for document in documents for sentence in document),
    )


def count_examples(arrays: Mapping[str, np.ndarray]) -> TextStatistics:
    """The counts of fixed-length arrays as in a shard."""
    labels = arrays["next_sentence_labels"]
    return TextStatistics(
        examples=len(labels),
        random_next=int(np.count_nonzero(labels)),
        example_tokens=int(np.count_nonzero(arrays["input_mask"])),
    )


def count_words(lines: Iterable[str]) -> TextStatistics:
    """The words of a text."""
    return TextStatistics(words=sum(len(_WORD.findall(line)) for line in lines))


def count_lines(lines: Sequence[str]) -> TextStatistics:
    """Look at up to SAMPLED_LINES lines that are not blank, spread evenly over a text."""
    looked_at = several = broken = capital = 0
    for number in range(0, len(lines), max(1, len(lines) // SAMPLED_LINES)):
        line, before = lines[number].strip(), lines[number - 1].strip() if number else ""
        if not line:
            continue
        looked_at += 1
        several += len(sentences(line[:LOOKED_AT])) > 1
        capital += line[0].isupper()
        broken += line[0].islower() and before[-1:].isalnum() | before.endswith(",")
    has_capitals = capital > LEAST_CAPITALS * looked_at  # else every sentence begins small
    return TextStatistics(
        lines=looked_at, lines_of_several=several, broken_lines=broken if has_capitals else 0
    )


def tell(
    what: str,
    statistics: TextStatistics,
    tokens: str = "tokens",
    vocabulary: str = "the vocabulary",
) -> None:
    """Print the figures and the warnings on stderr. vocabulary: what to call it."""
    print(f"Summary of {what}: {statistics.describe(tokens)}", file=sys.stderr)
    warn(f"{what}: {warning}" for warning in statistics.warnings(tokens, vocabulary))


def warn(warnings: Iterable[str]) -> None:
    """Print each as a warning, on a line of stderr."""
    for warning in warnings:
        print(f"Warning: {warning}", file=sys.stderr)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
