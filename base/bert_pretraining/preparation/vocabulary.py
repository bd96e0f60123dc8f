"""The tokenizer of a vocabulary: text to word pieces, as BERT's authors do it."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from bert_pretraining.errors import UserError
from bert_pretraining.preparation.text_files import read_text
from bert_pretraining.runtime.words import counted

Sentence = list[int]
Document = list[Sentence]
CLS, SEP, MASK, UNKNOWN = "[CLS]", "[SEP]", "[MASK]", "[UNK]"
MAX_WORD_LENGTH = 200  # longer words become [UNK], as in the reference's tokenizer


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Switch off the search for reference cycles, which lists of numbers do not have.

    The search would take a tenth of the time or more.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Vocabulary:
    """A WordPiece tokeniser. Raises UserError if the vocabulary has not all special tokens.

    ids: token -> id; the tokens stand in the order of their ids.
    """

    def __init__(self, tokens: Sequence[str], where: str, lower_case: bool = True) -> None:
        self._where = where
        self.ids: dict[str, int] = {}
        for token in tokens:
            self.ids.setdefault(token, len(self.ids))
        missing = [token for token in (CLS, SEP, MASK, UNKNOWN) if token not in self.ids]
        if missing:
            raise UserError(
                f"{where}: the vocabulary lacks {missing[0]}",
                "pass a vocabulary in the form of BERT's vocab.txt",
            )
        self._lower_case = lower_case
        self._tokenizer = Tokenizer(
            models.WordPiece(self.ids, unk_token=UNKNOWN, max_input_chars_per_word=MAX_WORD_LENGTH)
        )
        self._tokenizer.normalizer = normalizers.BertNormalizer(
            lowercase=False,  # `encode` does it
            strip_accents=lower_case,
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    @classmethod
    def load(cls, path: Path, lower_case: bool = True) -> Vocabulary:
        """Read `vocab.txt`, one token a line."""
        text = read_text(path)
        return cls([line.strip() for line in text.rstrip("\n").split("\n")], str(path), lower_case)

    def __str__(self) -> str:
        """What a message calls it: its file and size."""
        return f"{Path(self._where).name} ({counted(len(self), 'piece')})"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_cased(self) -> bool:
        """Whether there are words in capitals, besides special tokens such as [MASK]."""
        return any(re.search("[A-Z]", token) for token in self.ids if not token.startswith("["))

    def encode(self, sentences: list[str]) -> list[Sentence]:
        """The token ids of each sentence; an empty list for a sentence without tokens."""
        if self._lower_case:
            # The reference uses Python's lower(), which knows the Greek final sigma. The
            # tokenizers library lower-cases letter by letter and does not.
            sentences = [sentence.lower() for sentence in sentences]
        # After the lower-casing, no step looks across a space. So each different word is
        # tokenised only once.
        words = dict.fromkeys(chain.from_iterable(sentence.split(" ") for sentence in sentences))
        ids = {word: [self.ids[word]] for word in words if self._is_one_token(word)}
        others = [word for word in words if word not in ids]
        encodings = self._tokenizer.encode_batch_fast(others, add_special_tokens=False)
        ids.update(zip(others, (encoding.ids for encoding in encodings), strict=True))
        return [
            [token for word in sentence.split(" ") for token in ids[word]] for sentence in sentences
        ]

    def _is_one_token(self, word: str) -> bool:
        """Whether the word is a vocabulary entry that needs no normalising and no splitting."""
        return (
            word in self.ids and word.isascii() and word.isalnum() and len(word) <= MAX_WORD_LENGTH
        )

    def documents(self, text: str) -> list[Document]:
        """Documents from text of one sentence a line, with blank lines between documents."""
        return self.documents_of_lines(text.split("\n"))

    @without_garbage_collection()
    def documents_of_lines(self, lines: list[str]) -> list[Document]:
        """Documents from the lines of such a text."""
        lines = [line.strip() for line in lines]
        documents: list[Document] = [[]]
        for line, ids in zip(lines, self.encode(lines), strict=True):
            if not line:
                documents.append([])
            if ids:
                documents[-1].append(ids)
        return [document for document in documents if document]
