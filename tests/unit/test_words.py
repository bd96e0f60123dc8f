"""Numbers and nouns in lines for people agree."""

from __future__ import annotations

import pytest

from bert_pretraining.runtime.words import counted, plural


@pytest.mark.parametrize(
    ("number", "what", "said"),
    [
        (0, "shard", "0 shards"),
        (1, "shard", "1 shard"),
        (2, "shard", "2 shards"),
        (15248, "training example", "15,248 training examples"),
        (1, "entry", "1 entry"),
        (2, "entry", "2 entries"),
        (2, "key", "2 keys"),
        (2, "batch", "2 batches"),
    ],
)
def test_a_number_of_things(number: int, what: str, said: str) -> None:
    assert counted(number, what) == said


def test_verbs_and_measures_agree_too() -> None:
    assert [plural(number, "is") for number in (0, 1, 2)] == ["are", "is", "are"]
    assert (plural(1, "has"), plural(3, "has")) == ("has", "have")
    assert (plural(1.0, "minute"), plural(0.5, "minute")) == ("minute", "minutes")
