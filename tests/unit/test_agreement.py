"""What ranks find out about each other, as threads that exchange real messages."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bert_pretraining.errors import TrainingError
from bert_pretraining.runtime import agreement, process_group, replicas
from rank_threads import as_ranks

CPU = torch.device("cpu")
COUNTS = [2, 3, 5, 8]


@pytest.mark.parametrize("count", COUNTS)
def test_sums_largest_and_smallest(count: int) -> None:
    found = as_ranks(
        count,
        lambda rank: [
            reduce([rank, -2.0 * rank, 2**24 - 1 - rank], CPU)
            for reduce in (process_group.total, process_group.largest, process_group.smallest)
        ],
    )
    last, total = count - 1, count * (count - 1) / 2
    assert (
        found
        == [
            [
                [total, -2 * total, count * (2**24 - 1) - total],
                [last, 0, 2**24 - 1],
                [0, -2 * last, 2**24 - 1 - last],
            ]
        ]
        * count
    )


@pytest.mark.parametrize("count", COUNTS)
def test_the_median_is_that_of_the_ranks(count: int) -> None:
    """Of any numbers: equal ones, 0, and those that differ in the last bits of float32."""
    random = np.random.RandomState(count)
    sets = [
        random.lognormal(-3, 2, count),
        random.randint(0, 3, count).astype(float),
        np.zeros(count),
        0.1 * (1 + 2.0**-22 * random.permutation(count)),
    ]
    for values in sets:
        found = as_ranks(count, lambda rank, of=values: agreement.median(float(of[rank]), CPU))
        assert found == [statistics.median(values.tolist())] * count


def test_nobody_or_the_first_who_has_something_says_it() -> None:
    for said, expected in (
        ({}, None),
        ({3: "last"}, "last"),
        ({1: "second", 2: "third"}, "second"),
        ({0: ""}, ""),
    ):
        found = as_ranks(4, lambda rank, of=said: agreement.first_said(of.get(rank), CPU))
        assert found == [expected] * 4
    places = [2, 1, 0, 0]
    found = as_ranks(4, lambda rank: agreement.said_first(f"of {rank}", CPU, places[rank]))
    assert found == [agreement.Said(2, "of 2")] * 4


def test_each_text_is_sent_once() -> None:
    texts = [["a", "b"], [], ["b", "c", "a"], ["c"]]
    broadcasts = []

    def work(rank: int) -> list[str]:
        sent = dist.broadcast_object_list

        def counted(box: list, src: int) -> None:
            broadcasts.append(rank)
            sent(box, src=src)

        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr(dist, "broadcast_object_list", counted)
            dist.barrier()
            found = agreement.distinct(texts[rank], CPU)
            dist.barrier()
        return found

    assert as_ranks(4, work) == [["a", "b", "c"]] * 4
    assert len(broadcasts) == 3 * 4  # on four ranks


def test_bytes_that_differ_on_one_rank_are_noticed() -> None:
    contents = [b"same", b"same", b"same"]
    assert as_ranks(3, lambda rank: process_group.is_same(contents[rank], CPU)) == [True] * 3
    contents[2] = b"sane"
    assert as_ranks(3, lambda rank: process_group.is_same(contents[rank], CPU)) == [False] * 3


def test_rank_0_alone_gets_all_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a gather, which some backends lack, and others make of a connection to each rank."""

    def no_gather(*_: object, **__: object) -> None:
        raise RuntimeError("does not support gather")

    for name in ("gather", "gather_object"):
        monkeypatch.setattr(dist, name, no_gather)
    found = as_ranks(3, lambda rank: process_group.gather_to_main({"rank": rank}))
    assert found == [[{"rank": 0}, {"rank": 1}, {"rank": 2}], None, None]


def test_other_weights_end_every_rank() -> None:
    def work(rank: int) -> None:
        weights = {"same": torch.ones(3), "other": torch.full((4,), float(rank == 2))}
        replicas.check_replicas(weights, updates=7)

    found = as_ranks(3, work)
    assert [type(error) for error in found] == [TrainingError] * 3
    assert "different weights after 7 updates: first other on rank 2" in str(found[0])


def test_a_rank_alone_exchanges_nothing() -> None:
    assert agreement.median(0.25, CPU) == 0.25
    assert agreement.first_said("mine", CPU) == "mine"
    assert agreement.first_said(None, CPU) is None
    assert agreement.distinct(["a", "b", "a"], CPU) == ["a", "b"]
    assert process_group.is_same(b"", CPU)
    assert process_group.gather_to_main(3) == [3]
    assert process_group.largest([3, 4], CPU) == [3, 4]
