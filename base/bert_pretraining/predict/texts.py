"""From one or two texts to the token ids that the model reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bert_pretraining.errors import UserError
from bert_pretraining.preparation.vocabulary import CLS, MASK, SEP, UNKNOWN, Vocabulary
from bert_pretraining.runtime.words import counted

OTHER_MASKS = re.compile(r"\[mask\]|<mask>", re.IGNORECASE)
NOT_IN_TEXT = (CLS, "[PAD]")
HOW_TO_ASK = f"write {MASK} in place of a word, or give a second sentence"


@dataclass(frozen=True)
class Tokens:
    """[CLS] A [SEP], or [CLS] A [SEP] B [SEP].

    ids: of all tokens, these three included. first_length: the tokens of the first segment, its
    [SEP] included. is_pair: whether there is a B. masks: the places of [MASK] in `ids`. unknown:
    words of the texts that hold a character which no word piece of the vocabulary has.
    """

    ids: list[int]
    first_length: int
    is_pair: bool
    masks: list[int]
    unknown: list[str]


def sentences_of(texts: Sequence[str]) -> list[str]:
    """One or two sentences, from two texts, or from one in which [SEP] may stand between.

    A [CLS] in front and a [SEP] at the end, as BERT's own notation has them, are left out.
    Raises UserError for what the model cannot be asked.
    """
    for number, text in enumerate(texts, 1):
        _require_text(text, f"text {number}" if texts[1:] else "the text")
    parts = [part for text in texts for part in _without_ends(text).split(SEP)]
    if len(parts) > 2:
        raise UserError(
            f"{len(parts)} sentences, but BERT takes one or two",
            f"give at most two texts, or one text with one {SEP}; quote each text",
        )
    for number, part in enumerate(parts, 1):
        what = f"sentence {number}" if parts[1:] else "the text"
        if not part.strip():
            raise UserError(f"{what} is empty", "give a sentence")
        for special in NOT_IN_TEXT:
            if special in part:
                raise UserError(f"{what} holds {special}, which stands for no word", "leave it out")
        other = next((one for one in OTHER_MASKS.findall(part) if one != MASK), None)
        if other:
            raise UserError(f"{what} holds '{other}'", f"write {MASK}, in capitals")
    if not parts[1:] and MASK not in parts[0]:
        raise UserError(f"nothing to predict: one sentence, and no {MASK} in it", HOW_TO_ASK)
    return parts


def tokens_of(sentences: Sequence[str], vocabulary: Vocabulary, longest: int) -> Tokens:
    """The tokens of one or two sentences.

    Raises UserError where a sentence gives no token, or both together more than `longest`.
    """
    segments = [_encode(sentence, vocabulary) for sentence in sentences]
    for number, segment in enumerate(segments, 1):
        if not segment:
            what = f"sentence {number}" if segments[1:] else "the text"
            raise UserError(f"{what} has no visible characters", "give a sentence")
    end = vocabulary.ids[SEP]
    first = [vocabulary.ids[CLS], *segments[0], end]
    ids = [*first, *(token for segment in segments[1:] for token in (*segment, end))]
    if len(ids) > longest:
        raise UserError(
            f"{len(ids):,} tokens, {CLS} and {SEP} included, but the model has {longest} positions",
            "give a shorter text",
        )
    mask, unknown = vocabulary.ids[MASK], vocabulary.ids[UNKNOWN]
    words = dict.fromkeys(word for sentence in sentences for word in sentence.split())
    return Tokens(
        ids=ids,
        first_length=len(first),
        is_pair=len(segments) == 2,
        masks=[place for place, token in enumerate(ids) if token == mask],
        unknown=[
            word for word in words if UNKNOWN not in word and unknown in _encode(word, vocabulary)
        ],
    )


def _require_text(text: str, what: str) -> None:
    """UserError where bytes of the text are no UTF-8; Python holds each as half of a character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        found = f"byte 0x{byte:02X}" if 0x80 <= byte <= 0xFF else "half a character"
        raise UserError(
            f"{what} is not UTF-8: {found} after {counted(error.start, 'character')}",
            "give it in UTF-8",
        ) from error


def _without_ends(text: str) -> str:
    return text.strip().removeprefix(CLS).removesuffix(SEP)


def _encode(sentence: str, vocabulary: Vocabulary) -> list[int]:
    """Token ids; [MASK] and [UNK] are tokens, whatever stands beside them."""
    parts = re.split(rf"({re.escape(MASK)}|{re.escape(UNKNOWN)})", sentence)
    encoded = vocabulary.encode(parts)
    return [
        token
        for part, ids in zip(parts, encoded, strict=True)
        for token in ([vocabulary.ids[part]] if part in (MASK, UNKNOWN) else ids)
    ]
