"""Outcomes that are read late: nothing is lost, waits are few, all ranks stop together."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bert_pretraining.errors import TrainingError
from bert_pretraining.model.batch import smallest_batch
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.losses import LossTotals
from bert_pretraining.optim import LossScale, Optimizer, OptimizerSettings, create_optimizer
from bert_pretraining.runtime import process_group
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.outcomes import COPY_EVERY, Outcomes, UpdateResult
from helpers import make_model, tiny_config

CPU = torch.device("cpu")
BATCH = smallest_batch(CPU)


class Rank:
    """A rank whose updates are finite or not as a test says, read late as on a GPU."""

    def __init__(self, model: BertForPreTraining, optimizer: Optimizer, ranks: Ranks) -> None:
        self.scale = LossScale(2.0**20, dynamic=True)
        self.outcomes = Outcomes(model, optimizer, self.scale, ranks, late=True)
        self.totals = LossTotals(model.losses, CPU)
        self.results: list[tuple[int, UpdateResult]] = []

    def run(
        self, finite: Callable[[int], bool], due: Callable[[int], bool], asked: int | None = None
    ) -> int | None:
        """100 updates; the number of the one after which the rank stops. asked: to stop, then."""
        for number in range(1, 101):
            flag = torch.tensor(finite(number))
            self.scale.update(flag)
            self.outcomes.add(flag, [BATCH])
            learn = self.outcomes.read if due(number) else self.outcomes.look
            made = sum(result.updates for _, result in self.results)
            result = learn(made, self.totals, asked is not None and number >= asked)
            if result is not None:
                self.results.append((number, result))
                if result.stopping:
                    return number
        return None


@pytest.fixture(scope="module")
def parts() -> tuple[BertForPreTraining, Optimizer]:
    model = make_model(tiny_config())
    return model, create_optimizer("flat", model.named_parameters(), OptimizerSettings())


def alone(parts: tuple) -> Rank:
    return Rank(*parts, Ranks(0, 1, CPU))


@pytest.mark.parametrize("every", [1, 7, 50, 1000])
def test_every_update_is_counted_once_and_in_order(parts: tuple, every: int) -> None:
    def finite(number: int) -> bool:
        return number % 9 != 4

    rank = alone(parts)
    rank.run(finite, lambda number: number % every == 0)
    known = 0
    for number, result in rank.results:
        count = result.updates + result.skipped
        counted = [finite(one) for one in range(known + 1, known + count + 1)]
        assert result.updates == sum(counted)
        known += count
        assert known + rank_lag(number, every) == number
        assert result.last_finite is (finite(number) if number % every == 0 else False)
    assert rank.outcomes.num_unread == 100 - known < 2 * COPY_EVERY


def rank_lag(number: int, every: int) -> int:
    """Updates of which the host knows nothing after this one, where it has learned something."""
    return 0 if number % every == 0 else COPY_EVERY


def test_between_two_readings_nothing_is_read_at_once(
    parts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read = Outcomes.read
    monkeypatch.setattr(Outcomes, "read", lambda *given: reads.append(1) or read(*given))
    alone(parts).run(lambda _: True, lambda number: number == 50)
    assert len(reads) == 1


def test_a_series_of_overflows_ends_the_run(parts: tuple) -> None:
    rank = alone(parts)
    with pytest.raises(TrainingError, match="overflowed 38 times in a row after 2 updates"):
        rank.run(lambda number: number <= 2, lambda _: False)


def test_a_gradient_that_is_not_finite_ends_the_run(parts: tuple) -> None:
    rank = alone(parts)
    rank.scale.dynamic = False
    with pytest.raises(TrainingError, match="a gradient is not finite after 6 updates: "):
        rank.run(lambda number: number < 7, lambda _: False)


def test_a_rank_alone_stops_at_once(parts: tuple) -> None:
    rank = alone(parts)
    assert rank.run(lambda _: True, lambda _: False, asked=13) == 13
    assert sum(result.updates for _, result in rank.results) == 13


@pytest.mark.parametrize(("asked", "due", "stops"), [(13, 1000, 30), (30, 1000, 40), (13, 25, 25)])
def test_all_ranks_stop_after_the_same_update(
    parts: tuple, monkeypatch: pytest.MonkeyPatch, asked: int, due: int, stops: int
) -> None:
    """Two ranks as two threads; only the second is asked. A sum that one of them misses fails."""
    meeting = threading.Barrier(2, timeout=600)
    offered: dict[int, Tensor] = {}

    def sum_over_ranks(values: Tensor) -> Tensor:
        me = threading.get_ident()
        offered[me] = values.clone()
        meeting.wait()
        assert len({one.shape for one in offered.values()}) == 1
        total = sum(offered.values())
        meeting.wait()
        return values.copy_(total)

    monkeypatch.setattr(process_group, "sum_over_ranks", sum_over_ranks)
    ranks = [Rank(*parts, Ranks(number, 2, CPU)) for number in range(2)]
    stopped: dict[int, int | None] = {}

    def work(number: int) -> None:
        when = asked if number == 1 else None
        stopped[number] = ranks[number].run(lambda _: True, lambda one: one % due == 0, when)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert stopped == {0: stops, 1: stops}
    for rank in ranks:
        assert sum(result.updates for _, result in rank.results) == stops
