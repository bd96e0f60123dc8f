"""Other texts for a mini data set: the documentation of this Python, or any files.

The vocabulary holds the most frequent words and word endings of the text. They are counted,
so that the vocabulary is the same on every run.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from bert_pretraining.errors import UserError
from bert_pretraining.preparation.documents import FORM_WORDS, first_line, form_of_line
from bert_pretraining.preparation.text_files import expanded, read_text

MAX_WORDS = 4000
MAX_ENDINGS = 200


def standard_library_documents() -> list[list[str]]:
    """The docstrings of the standard library of this Python, one document for each module."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts or "test" in str(path.relative_to(root)):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # some files of the library are wrong on purpose
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        documents.append([line for text in texts if text for line in sentences(text)])
    return [document for document in documents if len(document) > 1]


def file_documents(paths: Iterable[Path]) -> list[list[str]]:
    """Read plain text, where blank lines separate documents and sentences end in . ! or ?"""
    documents = []
    for path in expanded(paths).files:
        text = read_text(path).replace("\r\n", "\n")
        form = form_of_line(first_line(text))
        if form is not None:
            raise UserError(
                f"{path}: {FORM_WORDS[form]}, not plain text",
                f"make it plain first: python -m bert_pretraining data segment --input {path}",
            )
        documents.extend(sentences(block) for block in re.split(r"\n\s*\n", text))
    return [document for document in documents if document]


def sentences(text: str) -> list[str]:
    """Split text behind every . ! or ? that is followed by a space."""
    flat = " ".join(text.split())
    return [part for part in re.split(r"(?<=[.!?]) ", flat) if part]


def count_vocabulary(documents: list[list[str]]) -> list[str]:
    """A WordPiece vocabulary: special tokens, characters, frequent endings, frequent words."""
    words: Counter[str] = Counter()
    for document in documents:
        for sentence in document:
            words.update(re.findall(r"\w+|[^\w\s]", sentence.lower()))
    characters = sorted({character for word in words for character in word})
    endings: Counter[str] = Counter()
    for word, count in words.items():
        for length in (2, 3, 4):
            if len(word) > length + 2:
                endings[word[-length:]] += count

    def commonest(counter: Counter[str], limit: int) -> list[str]:
        return sorted(counter, key=lambda item: (-counter[item], item))[:limit]

    pieces = [
        *characters,
        *(f"##{character}" for character in characters),
        *(f"##{ending}" for ending in commonest(endings, MAX_ENDINGS)),
        *commonest(words, MAX_WORDS),
    ]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(pieces)]
