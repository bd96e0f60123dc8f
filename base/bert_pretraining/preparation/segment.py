"""`data segment`: raw text becomes one sentence a line, with evaluation articles set apart.

What a document is, is described in documents.py, and where a sentence ends, in sentences.py.
"""

from __future__ import annotations

import os
import random
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from bert_pretraining.errors import UserError
from bert_pretraining.preparation import documents, text_files, text_statistics
from bert_pretraining.preparation.held_out import document_digest, repeated
from bert_pretraining.preparation.sentences import sentences
from bert_pretraining.preparation.text_statistics import TextStatistics
from bert_pretraining.runtime.file_kind import shown
from bert_pretraining.runtime.files import real, whole_folder
from bert_pretraining.runtime.words import counted, plural

PART_BYTES = 32 << 20  # of the parts that files of one document each are gathered into
FEW_SENTENCES = 6  # of a document, where each paragraph is taken for one
_FILE_SEED_STEP = 13  # the reference's


@dataclass(frozen=True)
class SegmentReport:
    """What was made. `without_text` counts articles that have only a title."""

    output_dir: Path
    num_parts: int
    train_articles: int
    eval_articles: int
    sentences: int
    without_text: int


def segment(
    inputs: Sequence[Path],
    output_dir: Path,
    num_eval_articles: int,
    seed: int,
    num_parts: int | None = None,
    form: str | None = None,
    allow_missing_parts: bool = False,
) -> SegmentReport:
    """Write `part-NNNNN-of-MMMMM` and `eval.txt`: a sentence a line, a blank line after
    each article.

    inputs: files, or folders of files. They are sorted by their paths as text. There is one part
    for each, or `num_parts` parts, each of consecutive inputs. Files that are a document each are
    first gathered to about PART_BYTES, because documents of one part are each other's random next.
    form: one of documents.FORMS; None guesses it, and prints the guess on stderr, where the figures
    of the text go too. When anything fails, no output_dir is left behind. It needs memory of up to
    ten times the largest input file.

    The evaluation articles are those that the MLPerf reference picks. Of F inputs (or gathered
    groups), number f (from 0) gives int((f + 1) * num_eval_articles / F) -
    int(f * num_eval_articles / F) articles. A generator with the seed `seed + 13 * f` picks them.
    As in the reference, it picks among the pieces between the blank lines of the segmented file,
    and the empty piece behind the last blank line counts too. If that one is picked, there is one
    evaluation article less; the report has the true number.

    Raises UserError for an input that is missing, empty, given twice, no text, not
    UTF-8 or cut off in an article, for one with fewer articles than are needed for evaluation, for
    a part without articles, for missing parts that are not allowed, and for an output_dir that
    holds anything or is in an input folder.
    """
    output_dir = Path(os.path.abspath(output_dir))
    for path in inputs:
        if path.is_dir() and real(path) in (real(output_dir), *real(output_dir).parents):
            raise UserError(
                f"--output_dir {output_dir} is in the --input folder {path}, so that the next run "
                "would take it for raw text",
                "choose an --output_dir outside of it",
            )
    found = text_files.expanded(inputs)
    paths = sorted(found.files, key=str)
    wanted = 1 if num_parts is None else num_parts
    if not paths or num_eval_articles < 0 or not 1 <= wanted <= len(paths):
        raise UserError(
            f"{len(paths)} --input files, --num_eval_articles {num_eval_articles}, --num_parts "
            f"{num_parts} do not fit together",
            "give an input, no negative number, and at most a part for each input",
        )
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"{output_dir} exists", "delete it, or choose another --output_dir")
    names = [path.name for path in paths]
    warnings = text_files.require_all_parts(names, "--input", allow_missing_parts)
    _require_different(paths)
    forms = documents.guess(paths) if form is None else dict.fromkeys(paths, form)
    groups = _groups(paths, forms)
    parts = min(num_parts, len(groups)) if num_parts else len(groups)
    with whole_folder(output_dir) as staging:
        writer = _Writer(staging, parts, num_eval_articles, seed, forms)
        counts = writer.write(groups)
    # Only now, because an error should stand alone.
    if found.left_out:
        print(f"Left out of --input: {text_files.listed(found.left_out, 10)}", file=sys.stderr)
    text_statistics.warn(warnings)
    if form is None:
        _tell_guess(forms)
    writer.tell(guessed=form is None)
    return SegmentReport(output_dir, parts, *counts)


def describe(report: SegmentReport) -> str:
    """The lines that `data segment` prints."""
    lines = [
        f"Made {report.output_dir}: {counted(report.train_articles, 'article')} in "
        f"{counted(report.num_parts, 'part')} to train on, {report.eval_articles:,} in eval.txt, "
        f"{counted(report.sentences, 'sentence')} in all"
    ]
    if report.without_text:
        lines.append(f"Left out {counted(report.without_text, 'article')} without text")
    return "\n".join(lines)


def eval_choice(num_pieces: int, wanted: int, seed: int) -> set[int]:
    """The pieces of a file that the MLPerf reference picks for evaluation.

    `wanted` must not exceed `num_pieces`.
    """
    generator = random.Random(seed)
    chosen: set[int] = set()
    while len(chosen) < wanted:
        chosen.add(int(generator.random() * num_pieces))
    return chosen


def _require_different(paths: Sequence[Path]) -> None:
    """Raise UserError for a file that is given twice, also through links."""
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        try:
            status = os.stat(os.path.realpath(path))
        except OSError:
            continue  # the reader says why
        first = seen.setdefault((status.st_dev, status.st_ino), path)
        if first is not path:
            raise UserError(
                f"{path}: given twice, so that its articles would be in both sets (the same file "
                f"as {first})",
                "give it once",
            )


def _tell_guess(forms: dict[Path, str]) -> None:
    counts = Counter(forms.values())
    guessed = ", ".join(
        f"{form} ({counted(count, 'file')})" for form, count in counts.most_common()
    )
    print(
        f"Documents: {guessed}, guessed by the files; --documents says otherwise", file=sys.stderr
    )


def _groups(paths: Sequence[Path], forms: dict[Path, str]) -> list[list[Path]]:
    """Files whose articles are picked from together: one file, or consecutive documents."""
    groups: list[list[Path]] = []
    size = 0
    for path in paths:
        last_is_document = groups and forms[groups[-1][-1]] == "file"
        if forms[path] == "file" and last_is_document and size < PART_BYTES:
            groups[-1].append(path)
        else:
            groups.append([path])
            size = 0
        if forms[path] == "file":
            size += path.stat().st_size
    return groups


def _too_few(paths: Sequence[Path], there: str, wanted: int, num_groups: int) -> UserError:
    """The error for files with fewer documents than are wanted of them for evaluation."""
    share = f": each of {num_groups:,} inputs gives its share" if num_groups > 1 else " alone"
    return UserError(
        f"{_name(paths, num_groups)}: {there}, but {wanted:,} "
        f"{plural(wanted, 'is')} wanted for evaluation{share}",
        "give more text, or a smaller --num_eval_articles",
    )


def _none_left(paths: Sequence[Path], there: str, wanted: int, num_groups: int) -> UserError:
    """The error for files whose documents are all for evaluation, or without text."""
    taken = f", and {wanted:,} {plural(wanted, 'is')} wanted for evaluation" if wanted else ""
    return UserError(
        f"{_name(paths, num_groups)}: {there}{taken}, so that none is left to train on",
        "give more text, or a smaller --num_eval_articles or --num_parts",
    )


def _name(paths: Sequence[Path], num_groups: int) -> str:
    """What a message calls files: one by itself, all by their folder, some by the outer two."""
    if len(paths) == 1:
        return shown(paths[0])
    if num_groups == 1:
        return shown(os.path.commonpath([path.parent for path in paths]) or "--input")
    return f"{shown(paths[0])} to {shown(paths[-1])}"


class _Writer:
    """Writes the parts and the evaluation text, and counts."""

    def __init__(
        self,
        directory: Path,
        num_parts: int,
        num_eval_articles: int,
        seed: int,
        forms: dict[Path, str],
    ) -> None:
        self.directory, self.num_parts = directory, num_parts
        self.num_eval_articles, self.seed = num_eval_articles, seed
        self.forms = forms
        self.trained = [0] * num_parts
        self.num_sentences = self.without_text = self.paragraphs_taken = 0
        self.statistics = {"training": TextStatistics(), "evaluation": TextStatistics()}
        self.digests = {"training": array("Q"), "evaluation": array("Q")}
        self.contents: dict[str, str] = {}

    def write(self, groups: Sequence[Sequence[Path]]) -> tuple[int, int, int, int]:
        """Segment all files.

        Returns the numbers of training articles, evaluation articles, sentences and empty articles.
        """
        # newline="\n" gives the same bytes on every system.
        with open(self.directory / "eval.txt", "w", encoding="utf-8", newline="\n") as evaluation:
            for number, paths in enumerate(groups):
                self._write_group(number, len(groups), paths, evaluation)
        evaluated = len(self.digests["evaluation"])
        return sum(self.trained), evaluated, self.num_sentences, self.without_text

    def _write_group(
        self, number: int, num_groups: int, paths: Sequence[Path], evaluation: IO[str]
    ) -> None:
        every = [article for path in paths for article in self._articles(path)]
        kept = [article for article in every if article]
        there = counted(len(kept), "document") + " with text" * (len(kept) < len(every))
        self.without_text += len(every) - len(kept)
        self.num_sentences += sum(len(article) for article in kept)
        before, behind = (
            count * self.num_eval_articles // num_groups for count in (number, number + 1)
        )
        if behind - before > len(kept):
            raise _too_few(paths, there, behind - before, num_groups)
        # There is one more piece than articles: the empty one behind the last blank line.
        chosen = eval_choice(len(kept) + 1, behind - before, self.seed + number * _FILE_SEED_STEP)
        part = number * self.num_parts // num_groups
        name = f"part-{part:05d}-of-{self.num_parts:05d}"
        with open(self.directory / name, "a", encoding="utf-8", newline="\n") as training:
            for index, article in enumerate(kept):
                text = "\n".join(article)
                held_out = index in chosen
                (evaluation if held_out else training).write(text + "\n\n")
                self._count("evaluation" if held_out else "training", article, text)
        self.trained[part] += len(kept) - len(chosen - {len(kept)})
        if not self.trained[part] and (number + 1) * self.num_parts // num_groups != part:
            raise _none_left(paths, there, behind - before, num_groups)

    def _articles(self, path: Path) -> Iterator[list[str]]:
        """The sentences of each article of a file."""
        text = text_files.read_text(path)
        if not text.strip():
            raise UserError(f"{path}: empty", "give text, or leave the file out")
        form = self.forms[path]
        self.contents[str(path)] = document_digest(text)
        self.paragraphs_taken += form == "blank_line" and documents.are_paragraphs(text)
        for article in documents.documents_of(text, form, str(path)):
            yield [sentence for paragraph in article for sentence in sentences(paragraph)]

    def _count(self, which: str, article: list[str], text: str) -> None:
        words = [sentence.split() for sentence in article]
        self.statistics[which] += text_statistics.count_documents([words])
        self.digests[which].append(int(document_digest(text)[:16], 16))

    def tell(self, guessed: bool) -> None:
        """Print the figures and what is wrong with them on stderr."""
        for which, counts in self.statistics.items():
            if not counts.documents:
                continue
            # Each article was counted as a corpus of its own.
            lone = int(counts.documents == 1 and which == "training")
            one = TextStatistics(
                corpora=1, lone=lone, documents=counts.documents, sentences=counts.sentences,
                tokens=counts.tokens, of_one_sentence=counts.of_one_sentence,
            )  # fmt: skip
            text_statistics.tell(f"the {which} text", one, "words")
        text_statistics.warn(
            [
                *(self._of_paragraphs() if guessed else []),
                *repeated(self.contents),
                *self._of_copies(),
            ]
        )

    def _of_paragraphs(self) -> list[str]:
        counts = self.statistics["training"]
        if not self.paragraphs_taken or counts.sentences >= FEW_SENTENCES * counts.documents:
            return []
        return [
            f"each paragraph of {counted(self.paragraphs_taken, 'plain file')} "
            "became a document, of "
            f"{counts.sentences / counts.documents:.1f} sentences on average. If each file is a "
            "document, pass --documents file; if not, put two blank lines between documents"
        ]

    def _of_copies(self) -> list[str]:
        trained, evaluated = (
            np.frombuffer(self.digests[which] or array("Q", [0]), dtype=np.uint64)
            for which in ("training", "evaluation")
        )
        if not self.digests["evaluation"]:
            return []
        copies = int(np.isin(evaluated, trained).sum())
        if not copies:
            return []
        return [
            f"{copies:,} of {len(evaluated):,} evaluation articles {plural(copies, 'is')} in the "
            "training text too, because the text has them twice: data prepare leaves such training "
            "articles out if they are more than 1%"
        ]
