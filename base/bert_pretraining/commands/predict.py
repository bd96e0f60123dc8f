"""The command line of `predict`: parse the flags, load the checkpoint, print its answers."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bert_pretraining import config
from bert_pretraining.commands.checkpoint import FORMS
from bert_pretraining.commands.data_flags import add_number
from bert_pretraining.errors import EXIT_USAGE, UserError
from bert_pretraining.model.bert_config import BERT_CONFIG_NAME

if TYPE_CHECKING:
    from bert_pretraining.predict import Predictor

PROMPT = "> "


def main(arguments: list[str]) -> int:
    """`predict CHECKPOINT TEXT [TEXT]`, or with --interactive a text a line."""
    values = _parser().parse(arguments, intermixed=True)
    if values.interactive and values.texts:
        raise UserError(
            "--interactive reads texts from standard input, and the command line has some too",
            "leave out one of them",
        )
    if not values.interactive and not values.texts:
        raise UserError("no text", 'pass one, such as "the [MASK] sleeps .", or --interactive')
    if not values.interactive:
        from bert_pretraining.predict.texts import sentences_of

        values.texts = list(map(_in_utf8, values.texts))
        sentences_of(values.texts)  # a wrong text is told before a large checkpoint is read

    from bert_pretraining import predict

    sources = predict.Sources(
        values.checkpoint, values.bert_config, values.vocab, values.do_lower_case
    )
    predictor = predict.load(sources, values.device, _notice)
    if values.interactive:
        return _converse(predictor, values)
    _answer(predictor, values.texts, values)
    return 0


def _parser() -> config.FlagParser:
    parser = config.FlagParser(
        prog="python -m bert_pretraining predict", allow_abbrev=False,
        usage='%(prog)s CHECKPOINT [flags] "the [MASK] sleeps ." ["A second sentence ."]',
        description="What a checkpoint has learned: the likeliest words for each [MASK], and for "
        "two sentences (two texts, or one with [SEP] between) whether the second follows the "
        f"first. CHECKPOINT: {FORMS}.",
    )  # fmt: skip
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="the checkpoint")
    add("texts", nargs="*", metavar="TEXT", help="one sentence with [MASK], or two sentences")
    add("--vocab", type=Path, metavar="FILE",
        help="WordPiece tokens, one a line (default: vocab.txt beside the checkpoint, beside its "
        f"{BERT_CONFIG_NAME}, or in the data set of its run)")  # fmt: skip
    add("--bert_config", "--bert_config_path", type=Path, metavar="FILE",
        help=f"the model's sizes (default: {BERT_CONFIG_NAME} beside the checkpoint, Hugging "
        "Face's config.json beside its weights, or that of its run)")  # fmt: skip
    add_number(parser, "--top", 5, 1, "words for each [MASK]")
    add("--do_lower_case", nargs="?", const=True, type=config.parse_bool, metavar="BOOL",
        help="lower-case the text, true or false (default: true, unless the vocabulary has words "
        "in capitals)")  # fmt: skip
    add("--device", default="auto", metavar="TYPE",
        help="cpu, cuda or another type of device (default: auto, an accelerator if there is "
        "one)")  # fmt: skip
    add("--interactive", action="store_true",
        help="read a text a line from standard input, until its end or Ctrl-D; [SEP] stands "
        "between two sentences (default: no)")  # fmt: skip
    add("--json", action="store_true",
        help="print each answer as a line of JSON (default: as text)")  # fmt: skip
    return parser


def _in_utf8(argument: str) -> str:
    """A word of the command line, where the locale (LANG=C) is of another encoding than its bytes.

    Bytes that are no UTF-8 stay as Python holds them.
    """
    if not any(0xDC80 <= ord(character) <= 0xDCFF for character in argument):
        return argument
    return os.fsencode(argument).decode("utf-8", "surrogateescape")


def _notice(text: str) -> None:
    print(f"Notice: {text}", file=sys.stderr)


def _answer(predictor: Predictor, texts: list[str], values: argparse.Namespace) -> None:
    from bert_pretraining.preparation.text_files import listed

    found = predictor.predict(texts, values.top)
    if found.unknown:
        words = listed([repr(word) for word in found.unknown])
        _notice(f"[UNK] stands for what the vocabulary cannot spell: {words}")
    if found.is_pair and found.is_next is None:
        _notice("the checkpoint has no next-sentence head, so whether B follows A is not told")
    print(json.dumps(found.to_json()) if values.json else found.describe(), flush=True)


def _converse(predictor: Predictor, values: argparse.Namespace) -> int:
    """Answer line by line. The exit code tells a script that a line was refused."""
    on_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        print("A text with [MASK], or two sentences with [SEP] between; Ctrl-D ends.")
    refused = 0
    for number, text in _lines(PROMPT if on_terminal else ""):
        try:
            _answer(predictor, [text], values)
        except UserError as error:
            refused += 1
            where = "" if on_terminal else f"line {number}: "
            print(f"Error: {where}{error}", file=sys.stderr, flush=True)
            if values.json:
                print(json.dumps({"error": str(error)}), flush=True)
            continue
        if not values.json:
            print(flush=True)
    return EXIT_USAGE if refused and not on_terminal else 0


def _lines(prompt: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line of standard input that is not blank."""
    if sys.stdin is None:
        raise UserError("--interactive: standard input is closed", "give it a terminal or a pipe")
    number = 0
    while True:
        print(prompt, end="", flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            print(end="\n" if prompt else "")
            return
        number += 1
        # Bytes that are no UTF-8 are told of with the text, and do not end the reading.
        text = line.decode("utf-8", "surrogateescape").strip()
        if text:
            yield number, text
