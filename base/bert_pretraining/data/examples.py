"""MLM + NSP examples from tokenised documents, by BERT's procedure.

The procedure and the order of its random draws are those of the MLPerf reference
(`create_pretraining_data.py`, HDF5 variant), so that the same text, vocabulary and seed
give the same bytes. Everything works on token ids: the reference's list of vocabulary
words, from which it draws replacements, is numbered in the order of the ids.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from bert_pretraining.data.shards import SCHEMA
from bert_pretraining.errors import UserError

Sentence = list[int]
Document = list[Sentence]
CLS, SEP, MASK = "[CLS]", "[SEP]", "[MASK]"
MAX_WORD_LENGTH = 200  # longer words become [UNK], as in the reference's tokenizer


@dataclass(frozen=True)
class ExampleSettings:
    """The reference's flags, with its defaults."""

    max_seq_length: int = 512
    max_predictions_per_seq: int = 76
    masked_lm_prob: float = 0.15
    short_seq_prob: float = 0.1
    dupe_factor: int = 10


class Vocabulary:
    """WordPiece: text -> ids. Raises UserError for a vocabulary that lacks special tokens."""

    def __init__(self, tokens: Sequence[str], where: str, lower_case: bool = True) -> None:
        self.ids = {}
        for token in tokens:
            self.ids.setdefault(token, len(self.ids))
        missing = [token for token in (CLS, SEP, MASK, "[UNK]") if token not in self.ids]
        if missing:
            raise UserError(f"{where}: the vocabulary lacks {missing[0]}; it is not BERT's form")
        self._lower_case = lower_case
        self._tokenizer = Tokenizer(
            models.WordPiece(self.ids, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_LENGTH)
        )
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    @classmethod
    def load(cls, path: Path, lower_case: bool = True) -> Vocabulary:
        """Read `vocab.txt`, one token a line."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the vocabulary {path} ({error})") from error
        return cls([line.strip() for line in text.rstrip("\n").split("\n")], str(path), lower_case)

    def __len__(self) -> int:
        return len(self.ids)

    def encode(self, sentences: list[str]) -> list[Sentence]:
        """Each sentence's ids; empty for one without tokens."""
        if self._lower_case:
            # Python's lower() knows the Greek final sigma, as the reference does; the
            # library's, letter by letter, does not.
            sentences = [sentence.lower() for sentence in sentences]
        encodings = self._tokenizer.encode_batch(sentences, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def documents(self, text: str) -> list[Document]:
        """Text of one sentence a line, a blank line between documents -> documents."""
        return self.documents_of_lines(text.split("\n"))

    def documents_of_lines(self, lines: list[str]) -> list[Document]:
        """The same, of lines."""
        lines = [line.strip() for line in lines]
        documents: list[Document] = [[]]
        for line, ids in zip(lines, self.encode(lines), strict=True):
            if not line:
                documents.append([])
            if ids:
                documents[-1].append(ids)
        return [document for document in documents if document]


@dataclass(frozen=True)
class Example:
    """One sequence with its masks applied. `positions` ascend."""

    ids: list[int]
    first_length: int
    positions: list[int]
    labels: list[int]
    is_random_next: bool


def create_examples(
    documents: list[Document],
    vocabulary: Vocabulary,
    settings: ExampleSettings,
    generator: random.Random,
) -> list[Example]:
    """All documents' examples, dupe_factor times over, shuffled. Shuffles `documents`."""
    maker = _ExampleMaker(vocabulary, settings, generator)
    generator.shuffle(documents)
    examples = [
        example
        for _ in range(settings.dupe_factor)
        for index in range(len(documents))
        for example in maker.from_document(documents, index)
    ]
    generator.shuffle(examples)
    return examples


def to_arrays(examples: list[Example], settings: ExampleSettings) -> dict[str, np.ndarray]:
    """Examples -> padded arrays, named, shaped and typed as in a shard."""
    length, predictions = settings.max_seq_length, settings.max_predictions_per_seq
    shapes = {
        "input_ids": (len(examples), length),
        "input_mask": (len(examples), length),
        "segment_ids": (len(examples), length),
        "masked_lm_positions": (len(examples), predictions),
        "masked_lm_ids": (len(examples), predictions),
        "next_sentence_labels": (len(examples),),
    }
    arrays = {key: np.zeros(shape, dtype=SCHEMA[key]) for key, shape in shapes.items()}
    for row, example in enumerate(examples):
        arrays["input_ids"][row, : len(example.ids)] = example.ids
        arrays["input_mask"][row, : len(example.ids)] = 1
        arrays["segment_ids"][row, example.first_length : len(example.ids)] = 1
        arrays["masked_lm_positions"][row, : len(example.positions)] = example.positions
        arrays["masked_lm_ids"][row, : len(example.labels)] = example.labels
        arrays["next_sentence_labels"][row] = example.is_random_next
    return arrays


def pick(arrays: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """`count` examples spread evenly over all: the reference's evaluation pick."""
    ratio = len(arrays["next_sentence_labels"]) / count
    rows = [int(index * ratio) for index in range(count)]
    return {key: array[rows] for key, array in arrays.items()}


class _ExampleMaker:
    def __init__(
        self, vocabulary: Vocabulary, settings: ExampleSettings, generator: random.Random
    ) -> None:
        self.settings = settings
        self.random = generator
        self.cls, self.sep, self.mask = (vocabulary.ids[token] for token in (CLS, SEP, MASK))
        self.last_id = len(vocabulary) - 1

    def from_document(self, documents: list[Document], index: int) -> list[Example]:
        """Cut one document into chunks of about the target length, an example each."""
        max_tokens = self.settings.max_seq_length - 3  # [CLS], [SEP], [SEP]
        target = max_tokens
        if self.random.random() < self.settings.short_seq_prob:
            target = self.random.randint(2, max_tokens)
        document = documents[index]
        examples = []
        chunk: list[Sentence] = []
        chunk_length = 0
        place = 0
        while place < len(document):
            chunk.append(document[place])
            chunk_length += len(document[place])
            if place == len(document) - 1 or chunk_length >= target:
                example, unused = self._from_chunk(chunk, documents, index, target, max_tokens)
                examples.append(example)
                place -= unused  # sentences that a random second segment left over
                chunk, chunk_length = [], 0
            place += 1
        return examples

    def _from_chunk(
        self,
        chunk: list[Sentence],
        documents: list[Document],
        index: int,
        target: int,
        max_tokens: int,
    ) -> tuple[Example, int]:
        first_end = 1
        if len(chunk) >= 2:
            first_end = self.random.randint(1, len(chunk) - 1)
        first = [token for sentence in chunk[:first_end] for token in sentence]
        is_random_next = len(chunk) == 1 or self.random.random() < 0.5
        if is_random_next:
            second = self._random_segment(documents, index, target - len(first))
            unused = len(chunk) - first_end
        else:
            second = [token for sentence in chunk[first_end:] for token in sentence]
            unused = 0
        first, second = self._truncate(first, second, max_tokens)
        ids = [self.cls, *first, self.sep, *second, self.sep]
        first_length = len(first) + 2
        ids, positions, labels = self._mask(ids, first_length - 1)
        return Example(ids, first_length, positions, labels, is_random_next), unused

    def _random_segment(self, documents: list[Document], index: int, target: int) -> Sentence:
        for _ in range(10):
            other = self.random.randint(0, len(documents) - 1)
            if other != index:
                break
        document = documents[other]
        segment: Sentence = []
        for place in range(self.random.randint(0, len(document) - 1), len(document)):
            segment.extend(document[place])
            if len(segment) >= target:
                break
        return segment

    def _truncate(
        self, first: Sentence, second: Sentence, max_tokens: int
    ) -> tuple[Sentence, Sentence]:
        """Drop tokens of the longer segment, from its front or back by a coin each."""
        starts, ends = [0, 0], [len(first), len(second)]
        excess = len(first) + len(second) - max_tokens
        for _ in range(excess):
            longer = 0 if ends[0] - starts[0] > ends[1] - starts[1] else 1
            if self.random.random() < 0.5:
                starts[longer] += 1
            else:
                ends[longer] -= 1
        return first[starts[0] : ends[0]], second[starts[1] : ends[1]]

    def _mask(self, ids: list[int], middle: int) -> tuple[list[int], list[int], list[int]]:
        """Mask some tokens; `middle` is where the first [SEP] stands.

        Of the chosen ones 80% become [MASK], 10% stay, 10% become a random token.
        """
        candidates = [*range(1, middle), *range(middle + 1, len(ids) - 1)]
        # A [CLS] or [SEP] that came from the text is no candidate either.
        specials = (self.cls, self.sep)
        candidates = [place for place in candidates if ids[place] not in specials]
        self.random.shuffle(candidates)
        wanted = max(1, round(len(ids) * self.settings.masked_lm_prob))
        wanted = min(self.settings.max_predictions_per_seq, wanted)
        positions = []
        masked = list(ids)
        for place in candidates[:wanted]:
            positions.append(place)
            if self.random.random() < 0.8:
                masked[place] = self.mask
            elif self.random.random() >= 0.5:
                masked[place] = self.random.randint(0, self.last_id)
        positions.sort()
        return masked, positions, [ids[place] for place in positions]
