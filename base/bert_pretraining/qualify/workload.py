"""BERT-large's update on a rank, as `train` builds it, with made-up sequences.

The sequences have the lengths of the MLPerf data set. The model has random weights; the sizes of
its layers are those of BERT-large, and the context says how many layers it has.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from bert_pretraining.bench.workload import BERT_LARGE, batch_of, wikipedia_lengths
from bert_pretraining.config import Resolved
from bert_pretraining.data.packing import on_device
from bert_pretraining.logs.run_log import RunLog
from bert_pretraining.logs.sinks import Work
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.optim import Schedule
from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.kept import keep_progress
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.build import Setup, Training, build
from bert_pretraining.training.outcomes import UpdateResult
from bert_pretraining.training.step_clock import over_ranks

SCHEDULE = Schedule(4e-4, 6700, 0, 0)
BATCHES = 4  # different ones, in turn


class Quiet(RunLog):
    """A log without outputs, which keeps what it is told in words."""

    def __init__(self, resolved: Resolved, ranks: Ranks) -> None:
        # Only rank 0 would write files.
        super().__init__(resolved, 1, devices.name(ranks.device), ranks.world_size)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@dataclass(frozen=True)
class Outcome:
    """What became of some updates. result: of the latest. work: of all, over all ranks."""

    result: UpdateResult
    work: Work


class Workload:
    """Updates of one rank. Every rank makes the same calls.

    Args:
        batch_size: sequences of a rank in an update.
        seed: of the weights and of the sequences.

    Attributes:
        training: what `train` would work with.
        said: the lines that `train` would have said while building.
        model: the sizes.
    """

    def __init__(
        self, context: Context, ranks: Ranks, batch_size: int, seed: int = 1, **settings: object
    ) -> None:
        config = dataclasses.replace(
            context.config,
            train_batch_size=batch_size,
            nnodes=1,
            nproc_per_node=ranks.world_size,
            device=context.device,
            **settings,
        )
        self.model: BertConfig = dataclasses.replace(BERT_LARGE, num_hidden_layers=context.layers)
        self._context, self._ranks, log = context, ranks, Quiet(Resolved(config, "", {}), ranks)
        torch.manual_seed(seed + ranks.rank)
        self.training: Training = build(Setup(config, self.model, None, seed, SCHEDULE, ranks, log))
        self.training.module.train()
        self.said = log.lines
        self._batches = on_device(_endless(batch_size, seed + ranks.rank, self.model), ranks.device)

    def update(self, batch: PackedBatch | None = None) -> None:
        """One update; the host need not wait for the device.

        batch: on the device; None: the next one of this rank's own.
        """
        if batch is None:
            with self.training.clock.part("data"):
                batch = next(self._batches)
        self._totals = self.training.update([batch])

    def read(self) -> Outcome:
        """What became of all updates since the last call; waits for the device."""
        result = self.training.update.outcomes.read(0, self._totals)
        keep_progress(self._context, self._ranks.rank)
        clock = self.training.clock
        return Outcome(result, over_ranks(clock.take(), clock.measures, self.model, self._ranks))


def made_up(batch_size: int, seed: int, model: BertConfig, count: int) -> list[PackedBatch]:
    """So many different batches, in main memory."""
    lengths, random = wikipedia_lengths(batch_size), np.random.RandomState(seed)
    return [batch_of(random.permutation(lengths), model) for _ in range(count)]


def _endless(batch_size: int, seed: int, model: BertConfig) -> Iterator[PackedBatch]:
    return itertools.cycle(made_up(batch_size, seed, model, BATCHES))
