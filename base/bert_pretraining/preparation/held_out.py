"""Which text is trained on: every text file of a folder, and nothing of the evaluation text.

The evaluation text is found again by its path (also through links) and by its content: a copy,
compressed or with other line ends, or its documents inside another file. A document is the text
between blank lines; white space does not matter.

Texts repeat themselves, and the published data sets were made without a look at this. So where less
than one in a hundred of the evaluation documents are training documents too, these are kept, and a
warning says how many they are. A file of evaluation documents alone is never trained on.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from bert_pretraining.errors import UserError
from bert_pretraining.preparation import text_files, text_statistics
from bert_pretraining.preparation.documents import read_sentences
from bert_pretraining.preparation.processes import run_in_processes
from bert_pretraining.preparation.text_files import FolderTexts
from bert_pretraining.runtime.file_kind import require_regular
from bert_pretraining.runtime.words import plural

BY_CHANCE = 0.01  # of the evaluation documents
LONG_SENTENCE = 5  # words; shorter ones are in every text
SENTENCES_BY_CHANCE = 0.1
EVAL_NAME = "eval.txt"
IN_THIS_PROCESS = 64 << 20  # bytes of text that are compared sooner than processes start
_ACCENT = re.compile("[\u0300-\u036f]")  # combining marks
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")


@dataclass(frozen=True)
class EvalText:
    """The evaluation text: its documents' digests, its long sentences, and a digest of it all."""

    documents: frozenset[str]
    sentences: frozenset[str]
    digest: str


@dataclass(frozen=True)
class Comparison:
    """A training text beside the evaluation text.

    Attributes:
        digest: of the content, decompressed.
        documents: how many documents it has.
        shared: digests of the evaluation documents in it, sorted.
        all_shared: whether all its documents are evaluation documents.
        sentences: the evaluation text's long sentences in it.
    """

    digest: str
    documents: int
    shared: list[str]
    all_shared: bool
    sentences: frozenset[str] = frozenset()


@dataclass(frozen=True)
class TrainingText:
    """A file to train on. `without`: digests of the documents in it that are left out.

    notes: what a later run needs to know the same file again without reading it.
    """

    path: Path
    identity: str
    without: frozenset[str]
    notes: dict


@dataclass(frozen=True)
class TrainingTexts:
    """The files to train on; what was left out, with reasons; what the user should know."""

    texts: list[TrainingText]
    eval_digest: str
    left_out: list[str]
    warnings: list[str] = field(default_factory=list)


def candidates(
    text_dir: Path, eval_text: Path, vocab: Path, allow_missing_parts: bool
) -> FolderTexts:
    """The text files in `text_dir` but the evaluation text and the vocabulary; none is opened.

    Prints a warning of missing parts that are allowed. Raises UserError for a folder without text
    and for missing parts that are not.
    """

    def not_training(path: Path) -> str | None:
        if _same_file(path, eval_text):
            return "the evaluation text"
        if path.name == EVAL_NAME:
            return "evaluation text by its name"
        return "the vocabulary" if _same_file(path, vocab) else None

    found = text_files.folder_texts(text_dir, "--text_dir", not_training)
    names = [path.name for path in found.files]
    if _same_file(eval_text.parent, text_dir):
        names.append(eval_text.name)  # a part that is held out is there all the same
    where = f"--text_dir {text_dir}"
    text_statistics.warn(text_files.require_all_parts(names, where, allow_missing_parts))
    return found


def training_texts(
    found: FolderTexts, eval_text: Path, known: Mapping[str, dict], jobs: int
) -> TrainingTexts:
    """What may be trained on of the candidates.

    known: the notes of an earlier run by file name; files of the same size and times are not read
    again.

    Raises UserError for a file that is no text of one sentence a line, and where only evaluation
    text is found.
    """
    warnings: list[str] = []
    evaluation = read_eval_text(eval_text)
    for path in found.files:
        require_regular(path, "move it out of --text_dir")
    comparisons = _compare_all(found.files, eval_text, evaluation, known, jobs)
    left_out = list(found.left_out)
    kept = []
    for path in found.files:
        if comparisons[path].all_shared:
            left_out.append(f"{path.name} (the same documents as in {eval_text})")
        else:
            kept.append(path)
    if not kept:
        raise UserError(
            f"--text_dir holds evaluation text alone: {text_files.listed(left_out)}",
            "put other text there, or pass another --eval_text",
        )
    shared = frozenset(digest for path in kept for digest in comparisons[path].shared)
    without = shared if len(shared) > BY_CHANCE * len(evaluation.documents) else frozenset()
    for path in kept:
        comparison = comparisons[path]
        if without and comparison.shared:
            left_out.append(
                f"{len(comparison.shared):,} of the {comparison.documents:,} documents of "
                f"{path.name} (also in {eval_text})"
            )
    if shared and not without:
        warnings.append(
            f"{len(shared):,} of {len(evaluation.documents):,} evaluation documents "
            f"{plural(len(shared), 'is')} in the training text too, and kept: texts repeat "
            "themselves so often by chance"
        )
    warnings += _shared_sentences(evaluation, [comparisons[path] for path in kept], bool(without))
    warnings += repeated({path.name: comparisons[path].digest for path in kept})
    texts = [_training_text(path, comparisons[path], without, evaluation) for path in kept]
    return TrainingTexts(texts, evaluation.digest, left_out, warnings)


def read_eval_text(path: Path) -> EvalText:
    """Read the evaluation text; UserError where it cannot be read or is no text."""
    text = read_sentences(path)
    sentences = frozenset(
        line.strip() for line in alike(text).split("\n") if len(line.split()) >= LONG_SENTENCE
    )
    documents = frozenset(map(document_digest, documents_of(text)))
    return EvalText(documents, sentences, _digest(text))


def compare(path: Path, evaluation: EvalText) -> Comparison:
    """Look for the evaluation text in a training text."""
    text = read_sentences(path)
    digests = [document_digest(document) for document in documents_of(text)]
    shared = evaluation.documents.intersection(digests)
    sentences = evaluation.sentences.intersection(map(str.strip, alike(text).split("\n")))
    return Comparison(
        digest=_digest(text),
        documents=len(digests),
        shared=sorted(shared),
        all_shared=bool(digests) and shared.issuperset(digests),
        sentences=sentences,
    )


def documents_of(text: str) -> list[str]:
    """The documents of a text of one sentence a line, with blank lines between documents."""
    return [document for document in _BLANK_LINE.split(text) if not document.isspace() and document]


def document_digest(document: str) -> str:
    """The digest of a document; white space and what `alike` leaves out do not matter."""
    words = " ".join(alike(document).split())
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()


def alike(text: str) -> str:
    """The text as a vocabulary without upper case sees it: lower case, without accents."""
    text = text.lower()
    return text if text.isascii() else _ACCENT.sub("", unicodedata.normalize("NFD", text))


def repeated(digests: Mapping[str, str]) -> list[str]:
    """A warning for texts, by name, that have the same digest of their content."""
    first: dict[str, str] = {}
    copies = []
    for name, digest in digests.items():
        if first.setdefault(digest, name) != name:
            copies.append(f"{name} has the content of {first[digest]}")
    if not copies:
        return []
    return [f"text that is there twice is trained on twice: {text_files.listed(copies)}"]


def _same_file(path: Path, other: Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False  # one of them is not there


def _digest(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _compare_all(
    paths: list[Path],
    eval_text: Path,
    evaluation: EvalText,
    known: Mapping[str, dict],
    jobs: int,
) -> dict[Path, Comparison]:
    comparisons = {path: _known(path, evaluation, known) for path in paths}
    unknown = [path for path, comparison in comparisons.items() if comparison is None]
    total = sum(path.stat().st_size for path in unknown)
    with tqdm(
        total=total, desc="compared with the evaluation text", unit="B", unit_scale=True,
        disable=total < IN_THIS_PROCESS,
    ) as bar:  # fmt: skip

        def done(path: Path, comparison: Comparison) -> None:
            comparisons[path] = comparison
            bar.update(path.stat().st_size)

        if jobs > 1 and total >= IN_THIS_PROCESS:
            calls = {path: (path, eval_text) for path in unknown}
            run_in_processes(_compare_in_process, calls, jobs, done)
        else:
            for path in unknown:
                done(path, compare(path, evaluation))
    return {path: comparison for path, comparison in comparisons.items() if comparison}


def _compare_in_process(path: Path, eval_text: Path) -> Comparison:
    return compare(path, _eval_text_of_process(eval_text))


@functools.cache
def _eval_text_of_process(path: Path) -> EvalText:
    return read_eval_text(path)  # each process reads it once


def _times(path: Path) -> dict[str, int]:
    status = path.stat()
    return {
        "size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns
    }  # fmt: skip


def _known(path: Path, evaluation: EvalText, known: Mapping[str, dict]) -> Comparison | None:
    """The comparison of an earlier run, if neither text has changed since."""
    notes = known.get(path.name, {})
    now = {**_times(path), "eval_text": evaluation.digest}
    if any(notes.get(key) != value for key, value in now.items()):
        return None
    return Comparison(notes["md5"], notes["documents"], notes["shared"], all_shared=False)


def _training_text(
    path: Path, comparison: Comparison, without: frozenset[str], evaluation: EvalText
) -> TrainingText:
    left_out = without.intersection(comparison.shared)
    identity = comparison.digest
    if left_out:
        identity = _digest(" ".join([identity, *sorted(left_out)]))
    notes = {
        **_times(path),
        "md5": comparison.digest,
        "eval_text": evaluation.digest,
        "documents": comparison.documents,
        "shared": comparison.shared,
    }
    return TrainingText(path, identity, left_out, notes)


def _shared_sentences(
    evaluation: EvalText, comparisons: Iterable[Comparison], documents_left_out: bool
) -> list[str]:
    """A warning where many of the evaluation text's sentences are in training documents."""
    found = {sentence for comparison in comparisons for sentence in comparison.sentences}
    if documents_left_out or len(found) <= SENTENCES_BY_CHANCE * len(evaluation.sentences):
        return []
    return [
        f"{len(found):,} of {len(evaluation.sentences):,} evaluation sentences of {LONG_SENTENCE} "
        f"words or more {plural(len(found), 'is')} in the training text too, in other documents: "
        "the accuracy will be too good. Is the evaluation text a piece of a training text? Take it "
        "out there"
    ]
