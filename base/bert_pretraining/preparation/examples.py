"""Making MLM and NSP examples from tokenised documents, as BERT's authors do.

The procedure and the order of its random draws are those of the MLPerf reference
(`create_pretraining_data.py`, HDF5 variant). So the same text, vocabulary and seed give the
same bytes. This code works on token ids where the reference works on words; its list of
words, from which it draws random tokens, has the order of the ids.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from bert_pretraining.data.shards import SCHEMA
from bert_pretraining.preparation.vocabulary import (
    CLS,
    MASK,
    SEP,
    Document,
    Sentence,
    Vocabulary,
    without_garbage_collection,
)


@dataclass(frozen=True)
class ExampleSettings:
    """The flags of the reference, with its defaults."""

    max_seq_length: int = 512
    max_predictions_per_seq: int = 76
    masked_lm_prob: float = 0.15
    short_seq_prob: float = 0.1
    dupe_factor: int = 10


class Example(NamedTuple):
    """One sequence after masking. `positions` ascend."""

    ids: list[int]
    first_length: int
    positions: list[int]
    labels: list[int]
    is_random_next: bool


@without_garbage_collection()
def create_examples(
    documents: list[Document],
    vocabulary: Vocabulary,
    settings: ExampleSettings,
    generator: random.Random,
) -> list[Example]:
    """The examples of all documents, made dupe_factor times, shuffled. Shuffles `documents`."""
    maker = _ExampleMaker(documents, vocabulary, settings, generator)
    shuffle(documents, generator)
    examples = [
        example
        for _ in range(settings.dupe_factor)
        for index in range(len(documents))
        for example in maker.from_document(documents, index)
    ]
    shuffle(examples, generator)
    return examples


def to_arrays(examples: list[Example], settings: ExampleSettings) -> dict[str, np.ndarray]:
    """Padded arrays of the examples, with the names, shapes and dtypes of a shard."""
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
    """`count` examples spread evenly over all, as the reference picks them for evaluation."""
    ratio = len(arrays["next_sentence_labels"]) / count
    rows = [int(index * ratio) for index in range(count)]
    return {key: array[rows] for key, array in arrays.items()}


def shuffle(items: list, generator: random.Random) -> None:
    """Do what `generator.shuffle(items)` does, with the same draws, in half its time.

    Python's shuffle swaps each item, from the last one down, with an item at or before its
    index. To choose that index it draws as many random bits as the number of such indices
    has, and draws again while the result is too large. This code does the same, but calls
    nothing but the generator.
    """
    draw = generator.getrandbits
    index = len(items) - 1
    while index > 0:
        bits = (index + 1).bit_length()
        last = max((1 << bits - 1) - 1, 1)  # the lowest index that needs as many bits
        for here in range(index, last - 1, -1):
            other = draw(bits)
            while other > here:
                other = draw(bits)
            items[here], items[other] = items[other], items[here]
        index = last - 1


def draw_below(count: int, generator: random.Random) -> int:
    """Return what `generator.randint(0, count - 1)` does, with the same draws, in half the time."""
    bits = count.bit_length()
    drawn = generator.getrandbits(bits)
    while drawn >= count:
        drawn = generator.getrandbits(bits)
    return drawn


class _ExampleMaker:
    def __init__(
        self,
        documents: list[Document],
        vocabulary: Vocabulary,
        settings: ExampleSettings,
        generator: random.Random,
    ) -> None:
        self.settings = settings
        self.random = generator
        self.cls, self.sep, self.mask = (vocabulary.ids[token] for token in (CLS, SEP, MASK))
        self.vocab_size = len(vocabulary)
        self.positions = list(range(settings.max_seq_length))
        self.specials_in_text = any(
            self.cls in sentence or self.sep in sentence
            for document in documents
            for sentence in document
        )

    def from_document(self, documents: list[Document], index: int) -> list[Example]:
        """Cut one document into chunks of about the target length, and make examples of them."""
        max_tokens = self.settings.max_seq_length - 3  # [CLS], [SEP], [SEP]
        target = max_tokens
        if self.random.random() < self.settings.short_seq_prob:
            target = 2 + draw_below(max_tokens - 1, self.random)
        document = documents[index]
        examples = []
        chunk: list[Sentence] = []
        chunk_length = 0
        number = 0
        while number < len(document):
            chunk.append(document[number])
            chunk_length += len(document[number])
            if number == len(document) - 1 or chunk_length >= target:
                example, unused = self._from_chunk(chunk, documents, index, target, max_tokens)
                examples.append(example)
                number -= unused  # a random second segment leaves these sentences unused
                chunk, chunk_length = [], 0
            number += 1
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
            first_end = 1 + draw_below(len(chunk) - 1, self.random)
        first = list(chain.from_iterable(chunk[:first_end]))
        is_random_next = len(chunk) == 1 or self.random.random() < 0.5
        if is_random_next:
            second = self._random_segment(documents, index, target - len(first))
            unused = len(chunk) - first_end
        else:
            second = list(chain.from_iterable(chunk[first_end:]))
            unused = 0
        first, second = self._truncate(first, second, max_tokens)
        ids = [self.cls, *first, self.sep, *second, self.sep]
        first_length = len(first) + 2
        ids, positions, labels = self._mask(ids, first_length - 1)
        return Example(ids, first_length, positions, labels, is_random_next), unused

    def _random_segment(self, documents: list[Document], index: int, target: int) -> Sentence:
        for _ in range(10):
            other = draw_below(len(documents), self.random)
            if other != index:
                break
        document = documents[other]
        segment: Sentence = []
        for number in range(draw_below(len(document), self.random), len(document)):
            segment.extend(document[number])
            if len(segment) >= target:
                break
        return segment

    def _truncate(
        self, first: Sentence, second: Sentence, max_tokens: int
    ) -> tuple[Sentence, Sentence]:
        """Drop tokens of the longer segment, each from its front or its end at random."""
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
        """Mask some tokens; `middle` is the position of the first [SEP].

        Of the chosen tokens 80% become [MASK], 10% stay, 10% become a random token.
        """
        candidates = self.positions[1:middle] + self.positions[middle + 1 : len(ids) - 1]
        if self.specials_in_text:
            # A [CLS] or [SEP] that came from the text is not masked either.
            specials = (self.cls, self.sep)
            candidates = [position for position in candidates if ids[position] not in specials]
        shuffle(candidates, self.random)
        wanted = max(1, round(len(ids) * self.settings.masked_lm_prob))
        wanted = min(self.settings.max_predictions_per_seq, wanted)
        chosen = candidates[:wanted]
        masked = list(ids)
        draw = self.random.random
        for position in chosen:
            if draw() < 0.8:
                masked[position] = self.mask
            elif draw() >= 0.5:
                masked[position] = draw_below(self.vocab_size, self.random)
        positions = sorted(chosen)
        return masked, positions, [ids[position] for position in positions]
