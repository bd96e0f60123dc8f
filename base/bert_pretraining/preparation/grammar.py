"""A small probabilistic grammar, which writes the corpus of the mini data set.

Every document has a topic, a person and two things of the topic. A masked token can be
inferred from the tokens on both sides: a determiner and a verb agree with their noun in
number, a pronoun with its person, and each thing has its own adjective, verb and place. The
topics differ, so that a model can tell two sentences of different documents from a real
pair.

Only `random.Random.random()` is used, because its stream is the same on every Python.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

# topic: two people, an adverb, then things as noun/adjective/verb/place
_TOPICS = {
    "garden": (
        "anna hugo slowly",
        "rose/red/bloom/wall hedge/green/grow/gate pear/ripe/ripen/tree bee/busy/hum/hive",
    ),
    "harbour": (
        "martha peter calmly",
        "boat/white/sail/pier gull/grey/scream/mast crab/small/crawl/sand lamp/bright/glow/tower",
    ),
    "kitchen": (
        "clara simon quickly",
        "oven/hot/smoke/stove cake/sweet/rise/plate kettle/round/boil/shelf onion/brown/fry/pan",
    ),
    "forest": (
        "laura felix quietly",
        "wolf/wild/howl/cave owl/wise/hoot/branch fern/soft/spread/stream fox/clever/hide/den",
    ),
    "school": (
        "emma oscar often",
        "pupil/young/learn/desk teacher/kind/explain/class bell/loud/ring/hall map/old/hang/door",
    ),
    "castle": (
        "julia arthur proudly",
        "knight/brave/fight/bridge king/rich/rule/throne horse/black/gallop/yard "
        "dragon/fierce/burn/roof",
    ),
    "station": (
        "sofia walter daily",
        "train/fast/arrive/track clock/square/tick/arch porter/strong/carry/platform "
        "signal/yellow/blink/pole",
    ),
    "market": (
        "nora victor early",
        "baker/cheerful/sell/stall coin/golden/jingle/purse goat/stubborn/bleat/cart "
        "fish/silver/smell/barrel",
    ),
}
_WOMEN = {"anna", "martha", "clara", "laura", "emma", "julia", "sofia", "nora"}
_FUNCTION_WORDS = tuple(
    "the this these that those he she his her it they and but , . is are does do not "
    "at near behind from with who sees likes when".split()
)
_SUFFIX = "##s"
_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class _Thing:
    def __init__(self, spec: str) -> None:
        self.noun, self.adjective, self.verb, self.place = spec.split("/")


class Grammar:
    """Writes random documents, which are lists of sentences."""

    def __init__(self, seed: int) -> None:
        self._uniform = random.Random(seed).random
        self._topics = [
            (people.split(), [_Thing(spec) for spec in things.split()])
            for people, things in _TOPICS.values()
        ]

    def text(self, num_documents: int) -> str:
        """`num_documents` documents of one sentence a line, each with a blank line behind it."""
        documents = (self.document() for _ in range(num_documents))
        return "".join("\n".join(sentences) + "\n\n" for sentences in documents)

    def document(self) -> list[str]:
        """A document of 8 to 16 sentences about one person and two things of one topic."""
        (*people, adverb), things = self._choose(self._topics)
        person = self._choose(people)
        first = self._choose(things)
        second = self._choose([thing for thing in things if thing is not first])
        pairs = ((first, second), (second, first))
        count = 8 + int(self._uniform() * 9)
        return [self._sentence(person, adverb, *self._choose(pairs)) for _ in range(count)]

    def _choose(self, options: Sequence) -> object:
        return options[int(self._uniform() * len(options))]

    def _sentence(self, person: str, adverb: str, thing: _Thing, other: _Thing) -> str:
        plural = self._uniform() < 0.5
        noun = thing.noun + "s" if plural else thing.noun
        verb = thing.verb if plural else thing.verb + "s"
        near, far = ("these", "those") if plural else ("this", "that")
        be, do, they = ("are", "do", "they") if plural else ("is", "does", "it")
        pronoun, owner = ("she", "her") if person in _WOMEN else ("he", "his")
        adjective, place, elsewhere = thing.adjective, thing.place, other.place
        link = self._choose(("at", "near", "behind"))
        act = self._choose(("sees", "likes"))
        kind = int(self._uniform() * 8)
        if kind == 0:
            return f"{near} {adjective} {noun} {verb} {adverb} {link} the {place} ."
        if kind == 1:
            return f"{person} {act} {owner} {adjective} {noun} and {pronoun} {act} the {place} ."
        if kind == 2:
            return f"{far} {noun} {be} {adjective} and {they} {verb} {link} the {place} ."
        if kind == 3:
            return (
                f"when {near} {noun} {verb} , {person} {act} the {other.adjective} {other.noun} ."
            )
        if kind == 4:
            return f"{far} {adjective} {noun} {do} not {thing.verb} {link} the {elsewhere} ."
        if kind == 5:
            return f"{person} , who {act} the {place} , {act} the {adjective} {noun} {adverb} ."
        if kind == 6:
            second = f"{far} {adjective} {noun} {verb} {adverb}"
            return f"{pronoun} is {link} the {elsewhere} but {second} ."
        return f"{near} {noun} from the {place} {verb} with the {other.adjective} {other.noun} ."


def vocabulary() -> list[str]:
    """WordPiece tokens that spell every sentence: special tokens, letters, stems, endings.

    The letters make any other lower-case English word spellable too.
    """
    words = set(_FUNCTION_WORDS)
    for people, things in _TOPICS.values():
        words.update(people.split())
        words.update(part for spec in things.split() for part in spec.split("/"))
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"##{letter}" for letter in letters), _SUFFIX, *sorted(words)]
    return [*_SPECIALS, *dict.fromkeys(pieces)]
