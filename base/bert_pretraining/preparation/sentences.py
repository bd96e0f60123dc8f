"""Where a sentence ends.

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

import re

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


def _is_abbreviation(word: str, following: str) -> bool:
    """Whether a period behind `word` belongs to it, and so ends no sentence."""
    lowered = word.lower()
    if lowered in ABBREVIATIONS or (lowered in BEFORE_NUMBERS and following.isdigit()):
        return True
    letters = word.replace("-", "").split(".")  # "J.-P." has two
    single = all(len(letter) == 1 and letter.isalpha() for letter in letters)
    return single and (len(letters) > 1 or word.isupper())
