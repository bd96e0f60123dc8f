"""`data segment`: raw text becomes one sentence a line, with evaluation articles set apart.

The first line that is not blank tells which of two forms the input has.

The output of WikiExtractor has articles in `<doc ...>` ... `</doc>`, each tag on a line of
its own. As in the MLPerf reference the first line of an article, its title, is dropped, and
each further line is a paragraph. HTML entities are resolved, and other tags are removed.

In plain text, lines up to a blank line are a paragraph. If the text has two or more blank
lines in a row anywhere between paragraphs, these separate articles, and a single blank
line separates paragraphs. Otherwise each paragraph is an article.

A sentence ends at `.`, `!` or `?` (one or more, then perhaps closing quotes or brackets)
if white space and then a capital letter, a digit, an opening quote or an opening bracket
follow; and at the end of a paragraph. It does not end at a single period

- after one of ABBREVIATIONS, in capitals or not ("Dr. Watson"; this wrongly joins
  "... and Co. They ..." to the next sentence),
- after one of BEFORE_NUMBERS if a digit follows ("No. 5", but "She said no. They left."),
- after a single capital, or letters with periods between them ("J. Smith", "U.S. Army",
  "e.g. X"; this wrongly joins "So do I. They ..." and "... the U.S. They ...").

A decimal ("3.14") has no white space. White space, also at line ends, becomes one space.
The rule is made for English. Text without capital letters is split only before digits and
quotes.
"""

from __future__ import annotations

import contextlib
import html
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.errors import UserError
from bert_pretraining.preparation.text_sources import read_text
from bert_pretraining.runtime.files import whole_folder

ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof rev hon st mt ft jr sr gen col maj capt lt sgt cmdr adm gov sen rep pres "
    "etc vs cf ca al approx est inc ltd co corp bros dept univ assn ave blvd ph.d".split()
)
BEFORE_NUMBERS = frozenset(
    "no nos p pp vol vols ch chap sec fig figs art op v c b d r "
    "jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
OPENING = "\"'([{\u2018\u201c\u00ab"
CLOSING = "\"')]}\u2019\u201d\u00bb"
_SENTENCE_END = re.compile(rf"([.!?]+)([{re.escape(CLOSING)}]*) (?=(\S))")
_LINE_BREAK_TAG = re.compile(r"</?(?:br|p|div|li)\s*/?>", re.IGNORECASE)
# A name, then attributes with "=": "a <b and c> d" is no tag.
_TAG = re.compile(r"</?[A-Za-z][A-Za-z0-9]*(?:\s+[\w:-]+\s*=[^<>]*)?\s*/?>|<!--.*?-->")
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
    num_files: int | None = None,
) -> SegmentReport:
    """Write `part-NNNNN-of-MMMMM` and `eval.txt`: a sentence a line, a blank line after
    each article.

    The inputs are sorted by their paths as text. There is one part for each, or
    `num_files` parts, each of consecutive inputs. When anything fails, no output_dir is left
    behind. It needs memory of up to ten times the largest input file.

    The evaluation articles are those that the MLPerf reference picks. Of F inputs, number f
    (from 0) gives int((f + 1) * num_eval_articles / F) - int(f * num_eval_articles / F)
    articles. A generator with the seed `seed + 13 * f` picks them. As in the reference, it
    picks among the pieces between the blank lines of the segmented file, and the empty piece
    behind the last blank line counts too. If that one is picked, there is one evaluation
    article less; the report has the true number.

    Raises UserError for an input that is missing, empty, given twice, not UTF-8 or cut off
    in an article, for one with fewer articles than are needed for evaluation, for a part
    without articles, and for an output_dir that holds anything.
    """
    paths = sorted(inputs, key=str)
    num_parts = len(paths) if num_files is None else num_files
    output_dir = Path(os.path.abspath(output_dir))
    if not paths or num_eval_articles < 0 or not 1 <= num_parts <= len(paths):
        raise UserError(
            f"{len(paths)} --input files, --num_eval_articles {num_eval_articles}, --num_files "
            f"{num_parts} do not fit together",
            "give an input, no negative number, and at most a part for each input",
        )
    seen: set[str] = set()
    for path in paths:
        if os.path.realpath(path) in seen:
            raise UserError(
                f"{path}: given twice, so that its articles would be in both sets", "give it once"
            )
        seen.add(os.path.realpath(path))
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"{output_dir} exists", "delete it, or choose another --output_dir")

    with whole_folder(output_dir) as staging:
        report = _write(paths, staging, num_parts, num_eval_articles, seed)
    return SegmentReport(output_dir, num_parts, *report)


def describe(report: SegmentReport) -> str:
    """The lines that `data segment` prints."""
    lines = [
        f"Made {report.output_dir}: {report.train_articles} articles in {report.num_parts} parts "
        f"to train on, {report.eval_articles} in eval.txt, {report.sentences} sentences in all"
    ]
    if report.without_text:
        lines.append(f"Left out {report.without_text} articles without text")
    return "\n".join(lines)


def sentences(paragraph: str) -> list[str]:
    """The sentences of one paragraph, by the rule of this module."""
    text = " ".join(paragraph.split())
    found, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        marks, closing, following = match.groups()
        if not (following.isupper() or following.isdigit() or following in OPENING):
            continue
        word = text[start : match.start()].rpartition(" ")[2].lstrip(OPENING)
        if marks == "." and not closing and _is_abbreviation(word, following):
            continue
        found.append(text[start : match.end() - 1])
        start = match.end()
    return [*found, text[start:]] if text else []


def articles(text: str, where: str) -> Iterator[list[str]]:
    """The paragraphs of each article, by the rules of this module; an article may have none.

    Raises UserError, which begins with `where`, if `<doc ...>` and `</doc>` do not alternate.
    """
    lines = text.split("\n")
    first = next((line for line in lines if line.strip()), "")
    return _wiki_articles(lines, where) if _opens(first) else _plain_articles(lines)


def eval_choice(num_pieces: int, wanted: int, seed: int) -> set[int]:
    """The pieces of a file that the MLPerf reference picks for evaluation.

    `wanted` must not exceed `num_pieces`.
    """
    generator = random.Random(seed)
    chosen: set[int] = set()
    while len(chosen) < wanted:
        chosen.add(int(generator.random() * num_pieces))
    return chosen


def _is_abbreviation(word: str, following: str) -> bool:
    """Whether a period behind `word` belongs to it, and so ends no sentence."""
    lowered = word.lower()
    if lowered in ABBREVIATIONS or (lowered in BEFORE_NUMBERS and following.isdigit()):
        return True
    letters = word.replace("-", "").split(".")  # "J.-P." has two
    single = all(len(letter) == 1 and letter.isalpha() for letter in letters)
    return single and (len(letters) > 1 or word.isupper())


def _opens(line: str) -> bool:
    return line.lstrip().startswith("<doc ")


def _wiki_articles(lines: list[str], where: str) -> Iterator[list[str]]:
    body: list[str] | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if _opens(line) != (body is None):
            raise UserError(
                f"{where}: line {number} does not fit <doc ...> ... </doc>",
                "extract the text again",
            )
        if body is None:
            body = []
        elif line.strip() == "</doc>":
            yield [_without_tags(paragraph) for paragraph in body[1:]]
            body = None
        else:
            body.append(line)
    if body is not None:
        raise UserError(f"{where}: cut off, its last </doc> is missing", "extract the text again")


def _without_tags(line: str) -> str:
    return _TAG.sub("", _LINE_BREAK_TAG.sub(" ", html.unescape(line)))


def _plain_articles(lines: list[str]) -> Iterator[list[str]]:
    """Blank lines at the start and the end of the file do not count."""
    stripped = "\n".join(line.strip() for line in lines).strip("\n")
    separator = "\n\n\n+" if "\n\n\n" in stripped else "\n\n"
    for article in re.split(separator, stripped):
        yield article.split("\n\n")


def _read(path: Path) -> str:
    text = read_text(path, "utf-8-sig")
    if not text.strip():
        raise UserError(f"{path}: empty", "give text, or leave the file out")
    return text


def _write(
    paths: list[Path], directory: Path, num_parts: int, num_eval_articles: int, seed: int
) -> tuple[int, int, int, int]:
    """Segment all files.

    Returns the numbers of training articles, evaluation articles, sentences and empty articles.
    """
    trained = [0] * num_parts
    evaluated = num_sentences = without_text = 0
    with contextlib.ExitStack() as stack:
        # newline="\n" gives the same bytes on every system.
        evaluation = stack.enter_context(
            open(directory / "eval.txt", "w", encoding="utf-8", newline="\n")
        )
        for number, path in enumerate(paths):
            every = [
                [sentence for paragraph in article for sentence in sentences(paragraph)]
                for article in articles(_read(path), str(path))
            ]
            kept = [article for article in every if article]
            without_text += len(every) - len(kept)
            num_sentences += sum(len(article) for article in kept)
            before, behind = (
                count * num_eval_articles // len(paths) for count in (number, number + 1)
            )
            if behind - before > len(kept):
                raise UserError(
                    f"{path}: {len(kept)} articles with text, {behind - before} of them wanted "
                    "for evaluation",
                    "give longer files, or a smaller --num_eval_articles",
                )
            # There is one more piece than articles: the empty one behind the last blank line.
            chosen = eval_choice(len(kept) + 1, behind - before, seed + number * _FILE_SEED_STEP)
            part = number * num_parts // len(paths)
            name = f"part-{part:05d}-of-{num_parts:05d}"
            with open(directory / name, "a", encoding="utf-8", newline="\n") as training:
                for index, article in enumerate(kept):
                    file = evaluation if index in chosen else training
                    file.write("\n".join(article) + "\n\n")
            picked = len(chosen - {len(kept)})
            evaluated += picked
            trained[part] += len(kept) - picked
            if not trained[part] and (number + 1) * num_parts // len(paths) != part:
                raise UserError(
                    f"{path}: no article is left for {name}",
                    "give longer files, or a smaller --num_eval_articles or --num_files",
                )
    return sum(trained), evaluated, num_sentences, without_text
