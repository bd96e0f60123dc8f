"""What became of the updates: read from the device seldom, and late.

An update leaves a flag on the device: whether it was made, or skipped because its gradients were
not finite. To read the latest flag is to wait until the device has no work left. So a GPU's flags
are read only where something is due after an update. In between, the host copies them to main
memory every few updates, and looks at the copy some updates later, when the device has long made
it. When to do so is decided by counting updates, because all ranks must act on the same one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bert_pretraining.errors import TrainingError
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.losses import LossTotals
from bert_pretraining.optim import LossScale, Optimizer
from bert_pretraining.optim.loss_scale import MAX_SKIPPED_IN_A_ROW
from bert_pretraining.runtime import agreement, process_group
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.runtime.transfer import Copying
from bert_pretraining.runtime.words import counted
from bert_pretraining.training.diagnosis import first_non_finite

# Updates between two copies. A copy is looked at when the next one is made, so that a signal to
# stop is acted on after at most twice as many, and the host is at most so many ahead of the device.
# Fewer than MAX_SKIPPED_IN_A_ROW, so that a series of skipped updates is noticed.
COPY_EVERY = 10


@dataclass(frozen=True)
class UpdateResult:
    """What became of the updates since those of the last result.

    updates, skipped: how many were made, and how many were not finite.
    last_finite: whether the latest update was made; False if that is not known yet.
    loss_scale: after these updates.
    stopping: whether a rank was asked to stop; the same on every rank.
    sums: of the latest update's losses over all ranks, as `LossTotals.flat` has them.
    gradient_norm: of the latest update. Both are only there if its outcome is known.
    """

    updates: int
    skipped: int
    last_finite: bool
    loss_scale: float
    stopping: bool = False
    sums: tuple[float, ...] = ()
    gradient_norm: float = float("nan")


class _Copied(NamedTuple):
    """Numbers on their way to main memory: the flags of the oldest `count` updates, and more."""

    numbers: Copying
    count: int


class Outcomes:
    """The outcomes of one rank's updates. Every rank calls the same methods after the same updates.

    Args:
        module: the bare model, in which the cause is looked for if a step was not finite.
        optimizer, loss_scale: their state after an update belongs to its outcome.
        late: whether outcomes are read late, as described above; by default on a device that
            copies while the host goes on. Else they are read at once: every COPY_EVERY updates, and
            on a CPU after each, where reading costs nothing.
    """

    def __init__(
        self,
        module: BertForPreTraining,
        optimizer: Optimizer,
        loss_scale: LossScale,
        ranks: Ranks,
        late: bool | None = None,
    ) -> None:
        self._module, self._optimizer, self._loss_scale = module, optimizer, loss_scale
        self._ranks = ranks
        self._wide = devices.wide(ranks.device)
        if late is None:
            sends = process_group.sends_from_device(ranks.device)
            late = sends and Copying.is_asynchronous(ranks.device)
        self._late = late
        at_once = ranks.device.type == "cpu" and not self._late
        self._read_every = 1 if at_once else COPY_EVERY
        self._unread: list[tuple[Tensor, list[PackedBatch]]] = []
        self._copied: _Copied | None = None

    @property
    def num_unread(self) -> int:
        """Updates of which the host does not know yet whether they were made."""
        return len(self._unread)

    @property
    def updates_to_agree(self) -> int:
        """How many more updates are made at most before all ranks know that one is to stop."""
        if self._ranks.world_size == 1 or self._read_every == 1:
            return 0
        return COPY_EVERY * (2 if self._late else 1)

    def add(self, finite: Tensor, micro_batches: list[PackedBatch]) -> None:
        """Keep the flag of an update: 0-d bool on the device."""
        self._unread.append((finite, micro_batches))

    def look(
        self, updates_before: int, totals: LossTotals, asked_to_stop: bool
    ) -> UpdateResult | None:
        """What is known of earlier updates, for when nothing is due; None if there is nothing new.

        All is known where a rank was asked to stop some updates ago. Arguments and errors as for
        `read`.
        """
        if asked_to_stop and self._ranks.world_size == 1:
            return self.read(updates_before, totals, asked_to_stop)
        not_copied = self.num_unread - (self._copied.count if self._copied else 0)
        if not_copied < self._read_every:
            return None
        if not self._late:
            return self.read(updates_before, totals, asked_to_stop)
        before = self._copied
        new = [finite for finite, _ in self._unread[-not_copied:]]
        self._copied = _Copied(Copying(self._numbers(new, asked_to_stop)), not_copied)
        if before is None:
            return None
        flags, in_a_row, scale, stopping = _split(before.numbers.wait(), before.count)
        if stopping:
            return self.read(updates_before, totals, asked_to_stop)
        return self._result(updates_before, flags, in_a_row, scale)

    def read(
        self, updates_before: int, totals: LossTotals, asked_to_stop: bool = False
    ) -> UpdateResult:
        """What became of all updates; waits for the device, once.

        updates_before: made before these, for the message. totals: of this rank's latest update.
        asked_to_stop: whether this rank was. Raises TrainingError, on every rank, where a step was
        not finite and no loss scale can help; it names what was not finite first.
        """
        self._copied = None
        sums = process_group.sum_over_ranks(totals.flat())
        more = torch.cat([self._optimizer.gradient_norm.reshape(1).to(self._wide), sums])
        unread = [finite for finite, _ in self._unread]
        numbers = self._numbers(unread, asked_to_stop, more).tolist()
        flags, in_a_row, scale, stopping = _split(numbers, len(unread))
        norm, *summed = numbers[len(unread) + 3 :]
        result = self._result(updates_before, flags, in_a_row, scale)
        return UpdateResult(
            result.updates, result.skipped, bool(flags[-1]), scale, stopping, tuple(summed), norm
        )

    def _numbers(
        self, flags: list[Tensor], asked_to_stop: bool, more: Tensor | None = None
    ) -> Tensor:
        """Flags, updates skipped in a row, loss scale, ranks that were asked to stop, and more."""
        device, scale = self._ranks.device, self._loss_scale
        stopping = torch.full((1,), float(asked_to_stop), dtype=torch.float32, device=device)
        parts = [
            torch.stack(flags),
            scale.skipped_in_a_row.reshape(1),
            scale.scale.reshape(1),
            process_group.sum_over_ranks(stopping),
            *([] if more is None else [more]),
        ]
        return torch.cat([part.to(self._wide) for part in parts])

    def _result(
        self, updates_before: int, flags: list[float], in_a_row: int, value: float
    ) -> UpdateResult:
        """The outcome of the oldest unread updates, which are then read."""
        count = len(flags)
        batches = [micro_batches for _, micro_batches in self._unread[:count]]
        self._unread = self._unread[count:]
        scale = self._loss_scale
        made = int(sum(flags))
        if not scale.dynamic and made < count:
            fix = "--learning_rate or --precision fp32"
            if scale.initial != 1.0:
                fix = "--loss_scale, or 0 for a dynamic one"
            raise TrainingError(
                f"a gradient is not finite after {counted(updates_before + made, 'update')}: "
                f"{self._diagnose(batches[made], scale.initial)}; try a lower {fix}"
            )
        if in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"fp16 overflowed {in_a_row} times in a row after "
                f"{counted(updates_before + made, 'update')}, at last at loss scale "
                f"{value:g}: {self._diagnose(batches[-1], value)}; the weights or the data are "
                "broken, or try --precision bf16"
            )
        return UpdateResult(made, count - made, False, value)

    def _diagnose(self, micro_batches: list[PackedBatch], loss_scale: float) -> str:
        """What was not finite first, on the rank that can tell best; the same on every rank."""
        found = first_non_finite(self._module, micro_batches, loss_scale)
        said = agreement.said_first(found.text, self._ranks.device, found.place)
        return said.item if self._ranks.world_size == 1 else f"rank {said.rank}: {said.item}"


def _split(numbers: list[float], count: int) -> tuple[list[float], int, float, bool]:
    """Flags, skipped in a row, loss scale, whether a rank was asked to stop."""
    in_a_row, scale, stopping = numbers[count : count + 3]
    return numbers[:count], int(in_a_row), scale, stopping > 0
