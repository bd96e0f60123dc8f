"""Evaluation: exact, and bit for bit the same at any world size."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bert_pretraining.data.loader import EvaluationSet
from bert_pretraining.kernels.fp8 import Fp8State
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.losses import LossMeans, LossTotals
from bert_pretraining.runtime import capture, compat, rank_reports
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.device_types import Graph
from bert_pretraining.runtime.process_group import Ranks, sum_over_ranks
from bert_pretraining.training.step_proof import first_fault

# A graph keeps memory of the driver, which no figure of PyTorch contains. A set of more batches
# than this should have larger ones.
MOST_GRAPHS = 128


class Evaluation(NamedTuple):
    """losses: means over all masked tokens (mlm) and all sequences (nsp) of the set."""

    losses: LossMeans
    num_sequences: int
    seconds: float

    @property
    def loss(self) -> float:
        """The sum of the losses' means, in nats."""
        return self.losses.loss

    @property
    def mlm_accuracy(self) -> float:
        return self.losses.accuracy["mlm"]


class Sums(NamedTuple):
    """Of one batch, for each of the model's k losses: (k,) float32, and (k,) int64."""

    loss: Tensor
    correct: Tensor


class Evaluator:
    """Evaluates a model again and again.

    Called with this rank's part of a set, it evaluates all batches of all ranks, and returns an
    `Evaluation`. Each batch's sums go into a row of their own, which exactly one rank fills: adding
    the other ranks' zeros is exact, and the rows are then added in the same order everywhere. The
    host waits for the device once, at the end.

    Args:
        pool: the memory pool of the training step's graph, if the step is captured. Then the
            forward pass of each batch is captured too, after the first evaluation, in the same
            memory: the step and the evaluation never run at the same time. Each batch keeps its own
            shape, so that later evaluations compute the same bits as without graphs. The batches
            must stay on the device, and up to MOST_GRAPHS of a rank are captured.
        proves: whether the first batch's graph is compared with what was computed without it.
        fp8: the scales of layers that compute in fp8. Nothing is captured while these measure.
        say: is told why nothing is captured after all.
    """

    def __init__(
        self,
        model: BertForPreTraining,
        ranks: Ranks,
        pool: object = None,
        proves: bool = True,
        fp8: Fp8State | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._model, self._ranks = model, ranks
        self._pool, self._proves, self._fp8, self._say = pool, proves, fp8, say
        self._captures = pool is not None
        self._set: EvaluationSet | None = None  # for which graphs were captured
        self._graphs: list[tuple[Graph, Sums]] = []

    @torch.no_grad()
    def __call__(self, evaluation_set: EvaluationSet) -> Evaluation:
        started = time.perf_counter()
        model = self._model
        measures = self._fp8 is not None and not self._fp8.calibrated
        graphs = self._graphs if evaluation_set is self._set and not measures else []
        with _evaluating(model):
            found = []
            for place, batch in enumerate(evaluation_set.on(self._ranks.device)):
                found.append(_replayed(*graphs[place]) if graphs[place:] else _sums(model, batch))
                rank_reports.heartbeat()
            rows = _rows(model, evaluation_set, found, self._ranks.device)
            *sums, sequences = sum_over_ranks(rows).cpu().double().sum(dim=0).tolist()
            seconds = time.perf_counter() - started
            if self._captures and not measures:
                self._captures = False
                self._capture(evaluation_set, found)
        return Evaluation(LossMeans.of(model.losses, sums), int(sequences), seconds)

    def _capture(self, evaluation_set: EvaluationSet, found: list[Sums]) -> None:
        """Capture the batches on all ranks, or on none. found: this rank's sums without graphs."""
        fault = first_fault(lambda: self._try_to_capture(evaluation_set, found), self._ranks.device)
        if fault is None:
            self._set = evaluation_set
            return
        self._graphs = []
        devices.free_unused_memory(self._ranks.device)
        self._say(f"Notice: evaluation is not captured: the run goes on without it ({fault})")

    def _try_to_capture(self, evaluation_set: EvaluationSet, found: list[Sums]) -> None:
        model, device = self._model, self._ranks.device
        batches = [batch for _, batch in evaluation_set.batches]
        if any(batch.input_ids.device != device for batch in batches):
            raise RuntimeError("the evaluation set does not stay on the device")
        # The evaluation of a run that was resumed comes while threads load data.
        with compat.cheap_captures():
            self._graphs = [
                capture.captured(device, lambda b=batch: _sums(model, b), self._pool, True)
                for batch in batches[:MOST_GRAPHS]
            ]
        if self._proves and self._graphs:
            pairs = zip(_replayed(*self._graphs[0]), found[0], strict=True)
            if not all(torch.allclose(a, b, 0.0, 0.0, equal_nan=True) for a, b in pairs):
                raise RuntimeError("a graph gives other sums than the same batch without it")


def evaluate(model: BertForPreTraining, evaluation_set: EvaluationSet, ranks: Ranks) -> Evaluation:
    """Evaluate once; see `Evaluator`."""
    return Evaluator(model, ranks)(evaluation_set)


@contextlib.contextmanager
def _evaluating(model: BertForPreTraining) -> Iterator[None]:
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)


def _sums(model: BertForPreTraining, batch: PackedBatch) -> Sums:
    sums = model(batch)
    parts = zip(*(sums[name] for name in model.losses), strict=True)
    return Sums(*(torch.stack(part) for part in parts))


def _replayed(graph: Graph, sums: Sums) -> Sums:
    graph.replay()
    return sums


def _rows(
    model: BertForPreTraining,
    evaluation_set: EvaluationSet,
    found: list[Sums],
    device: torch.device,
) -> Tensor:
    """A row for each batch of all ranks: what `LossTotals.flat` has, and the sequences.

    found: the sums of this rank's batches. Rows of other ranks' batches are 0.
    """
    losses, dtype = model.losses, devices.wide(device)
    columns = LossTotals.columns(losses) + 1
    rows = torch.zeros(evaluation_set.num_batches, columns, dtype=dtype, device=device)
    if not found:
        return rows
    loss, correct = (torch.stack(part).to(dtype) for part in zip(*found, strict=True))
    counts = torch.tensor(
        [
            [*(batch.num_predictions(name) for name in losses), batch.num_sequences]
            for _, batch in evaluation_set.batches
        ],
        dtype=dtype,
    )
    own = torch.tensor([number for number, _ in evaluation_set.batches])
    values = [torch.stack([loss, correct], dim=2).flatten(1), devices.sent(counts, device)]
    return rows.index_copy_(0, devices.sent(own, device), torch.cat(values, dim=1))
