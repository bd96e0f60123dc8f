"""What a document is in raw text: the forms of `data segment --documents`.

doc_tags: the output of WikiExtractor. Articles stand in `<doc ...>` ... `</doc>`, each tag on a
line of its own. As in the MLPerf reference the first line of an article, its title, is dropped,
and each further line is a paragraph. HTML entities are resolved, and other tags are removed.

json: the output of WikiExtractor's --json and of many others: an object on each line (or one list
of objects) with the document under "text". Each line of that is a paragraph, as in doc_tags; a
first line that equals "title" is dropped.

blank_line: plain text. Lines up to a blank line are a paragraph. If a file has two or more blank
lines in a row anywhere between paragraphs, these separate documents, and a single blank line
separates paragraphs. Otherwise each paragraph is a document.

file: plain text, each file a document. A blank line separates paragraphs.

Without the flag the first line of a file that is not blank tells doc_tags and json. Of plain text,
many small files of which few have two blank lines in a row are a document each; others are
blank_line.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from bert_pretraining.errors import UserError
from bert_pretraining.preparation.text_files import read_start, read_text

FORM_WORDS = {"json": "JSON", "doc_tags": "WikiExtractor's output"}
FORMS = ("file", "blank_line", "json", "doc_tags")
MANY_FILES = 8
SMALL_FILE = 200_000  # bytes on average
ONE_A_LINE = "give text with one sentence a line"
EXTRACT_AGAIN = "extract the text again"
_LINE_BREAK_TAG = re.compile(r"</?(?:br|p|div|li)\s*/?>", re.IGNORECASE)
_NOT_BLANK = re.compile(r"\S")
# A name, then attributes with "=": "a <b and c> d" is no tag.
_TAG = re.compile(r"</?[A-Za-z][A-Za-z0-9]*(?:\s+[\w:-]+\s*=[^<>]*)?\s*/?>|<!--.*?-->")


def guess(paths: Sequence[Path]) -> dict[Path, str]:
    """The form of each file, by the beginnings of all.

    Raises UserError for a file that cannot be read or is no text.
    """
    forms: dict[Path, str | None] = {}
    separated = 0
    for path in paths:
        start = read_start(path)
        forms[path] = form_of_line(first_line(start))
        separated += forms[path] is None and "\n\n\n" in _stripped(start.split("\n"))
    plain = [path for path, form in forms.items() if form is None]
    small = sum(path.stat().st_size for path in plain) <= SMALL_FILE * len(plain)
    alone = len(plain) >= MANY_FILES and small and 2 * separated < len(plain)
    return {path: form or ("file" if alone else "blank_line") for path, form in forms.items()}


def form_of_line(line: str) -> str | None:
    """The form that the first line of a file tells: doc_tags, json, or None for plain text."""
    if _opens(line):
        return "doc_tags"
    return "json" if re.match(r'(\[\s*)?\{\s*("|$)|\[$', line) else None


def first_line(text: str) -> str:
    """The first line that is not blank, without white space around it."""
    return next((line.strip() for line in text.split("\n") if line.strip()), "")


def documents_of(text: str, form: str, where: str) -> Iterator[list[str]]:
    """The paragraphs of each document, by the rules of this module; a document may have none.

    form: one of FORMS. Raises UserError, which begins with `where`, if the text has another form.
    """
    lines = text.split("\n")
    if form == "doc_tags":
        return _wiki_articles(lines, where)
    if form == "json":
        return _json_documents(lines, where)
    if form == "file":
        return iter([re.split("\n\n+", _stripped(lines))])
    return _plain_articles(lines)


def read_sentences(path: Path) -> str:
    """Text of one sentence a line, as the stages behind `data segment` take it.

    Raises UserError for text that cannot be read, is empty or has another form.
    """
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path}: empty", ONE_A_LINE)
    form = form_of_line(first_line(text))
    if form is not None:
        raise UserError(
            f"{path}: {FORM_WORDS[form]}, not text of one sentence a line",
            f"turn it into sentences first: python -m bert_pretraining data segment --input {path}",
        )
    return text


def are_paragraphs(text: str) -> bool:
    """Whether there are several paragraphs, and blank_line takes each for a document."""
    stripped = _stripped(text.split("\n"))
    return "\n\n" in stripped and "\n\n\n" not in stripped


def _opens(line: str) -> bool:
    return re.match(r"\s*<doc[\s>]", line) is not None


def _wiki_articles(lines: list[str], where: str) -> Iterator[list[str]]:
    body: list[str] | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if _opens(line) != (body is None):
            raise UserError(
                f"{where}: line {number} does not fit <doc ...> ... </doc>",
                EXTRACT_AGAIN,
            )
        if body is None:
            body = []
        elif line.strip() == "</doc>":
            yield [_without_tags(paragraph) for paragraph in body[1:]]
            body = None
        else:
            body.append(line)
    if body is not None:
        raise UserError(f"{where}: cut off, its last </doc> is missing", EXTRACT_AGAIN)


def _without_tags(line: str) -> str:
    return _TAG.sub("", _LINE_BREAK_TAG.sub(" ", html.unescape(line)))


def _plain_articles(lines: list[str]) -> Iterator[list[str]]:
    stripped = _stripped(lines)
    separator = "\n\n\n+" if "\n\n\n" in stripped else "\n\n"
    for article in re.split(separator, stripped):
        yield article.split("\n\n")


def _json_documents(lines: list[str], where: str) -> Iterator[list[str]]:
    text = "\n".join(lines)
    first = first_line(text)
    whole = _parsed(text) if first.startswith("[") else None
    unit = "object"
    if isinstance(whole, list):
        numbered = enumerate(whole, start=1)
    elif first.startswith("{") and not isinstance(_parsed(first), dict):
        numbered = enumerate(_values(text), start=1)
    else:
        numbered = (
            (number, _parsed(line)) for number, line in enumerate(lines, start=1) if line.strip()
        )
        unit = "line"
    for number, value in numbered:
        if not isinstance(value, dict):
            raise UserError(
                f"{where}: {unit} {number} is no JSON object",
                "give one object a line, or pass the right --documents",
            )
        text = value.get("text")
        if not isinstance(text, str):
            keys = ", ".join(sorted(map(str, value))[:8]) or "nothing"
            raise UserError(
                f'{where}: the JSON object in {unit} {number} has no text under "text" '
                f"(it has: {keys})",
                'put the text of each document under "text"',
            )
        paragraphs = [_without_tags(line) for line in text.split("\n") if line.strip()]
        if paragraphs and paragraphs[0].strip() == value.get("title"):
            del paragraphs[0]
        yield paragraphs


def _values(text: str) -> Iterator[object]:
    """JSON values that follow one another, over any lines; None in place of what is no JSON."""
    decoder, place = json.JSONDecoder(), 0
    while (start := _NOT_BLANK.search(text, place)) is not None:
        try:
            value, place = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            yield None
            return
        yield value


def _parsed(text: str) -> object:
    """The JSON value; None where the text is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _stripped(lines: list[str]) -> str:
    """The lines without white space around them, without blank lines at both ends."""
    return "\n".join(line.strip() for line in lines).strip("\n")
