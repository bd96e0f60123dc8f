"""Forward and backward of one micro-batch: at once, or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from bert_pretraining.errors import UserError
from bert_pretraining.kernels.fp8 import Fp8State
from bert_pretraining.kernels.reference import IGNORED
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.losses import OBJECTIVES, LossSum
from bert_pretraining.runtime import capture
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.device_types import Graph
from bert_pretraining.training.static_batch import Budget, StaticBatch

WARM_UP_STEPS = 3  # before a capture: lazy initialisation and autotuning do their work there


def forward_backward(
    model: nn.Module, batch: PackedBatch, weights: Mapping[str, Tensor]
) -> dict[str, LossSum]:
    """Add one micro-batch's gradients to the parameters'.

    weights: by the loss's name, 0-d float32, what its sum is multiplied by (loss scale included).
    Returns the sums by name, detached.
    """
    return _backward(model(batch), weights)


def _backward(sums: dict[str, LossSum], weights: Mapping[str, Tensor]) -> dict[str, LossSum]:
    torch.autograd.backward(
        [part.loss for part in sums.values()],
        [weights[name].to(part.loss.dtype) for name, part in sums.items()],
    )
    return {name: LossSum(part.loss.detach(), part.correct.detach()) for name, part in sums.items()}


class MicroStep:
    """`forward_backward` for a model, in the way that was chosen.

    Args:
        model: called with a batch; may be replicated.
        budget: the constant shape. A batch that does not fit it keeps its own shape; without a
            budget, every batch does.
        graph: replay a captured CUDA graph for the budget. `prepare` captures it.
        losses: the names of the model's losses.
        instead: called with the error when the forward pass fails, as a compiled one may for a new
            shape. It changes the model so that the pass can be tried again, or raises.
        fp8: the scales of layers that compute in fp8. Before their first update, steps measure
            every tensor, which a graph does not; so no graph is replayed until then.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        budget: Budget | None,
        graph: bool,
        losses: Sequence[str] = OBJECTIVES["mlm_nsp"],
        instead: Callable[[Exception], None] | None = None,
        fp8: Fp8State | None = None,
    ) -> None:
        self._model, self._device = model, device
        self._static = None if budget is None else StaticBatch(budget, device, IGNORED)
        self._weights = {name: torch.ones((), device=device) for name in losses}
        self._capture: list[tuple[Graph, dict[str, LossSum]]] = []  # one, once prepared
        self._graph = graph
        self._instead = instead
        self._fp8 = fp8

    @property
    def captured(self) -> bool:
        """Whether a graph is replayed.

        Gradients must then stay where they lie: the graph adds to them there. And nothing can be
        sent to other ranks before it ends.
        """
        return self._graph

    @property
    def pool(self) -> object:
        """The memory pool of the graph that is replayed; None without one. See `captured`."""
        return self._capture[0][0].pool() if self._capture else None

    def __call__(self, batch: PackedBatch, weights: Mapping[str, Tensor]) -> dict[str, LossSum]:
        """As `forward_backward`; the result is overwritten by the next call."""
        if self._static is None or not self._static.budget.fits(batch):
            return self._step(batch, weights)
        loaded = self._static.load(batch)
        measures = self._fp8 is not None and not self._fp8.calibrated
        if not self._graph or measures:
            return self._step(loaded, weights)
        for name, weight in self._weights.items():
            weight.copy_(weights[name])
        graph, sums = self._capture[0]
        graph.replay()
        return sums

    def _step(self, batch: PackedBatch, weights: Mapping[str, Tensor]) -> dict[str, LossSum]:
        if self._instead is None:
            return forward_backward(self._model, batch, weights)
        try:
            sums = self._model(batch)
        except torch.OutOfMemoryError:
            raise  # the other forms of the model need more memory still
        except Exception as error:
            failed = error
        else:
            return _backward(sums, weights)
        # No gradient was added yet, so that the whole step can be done again. An error of the
        # batch or of the device comes again there.
        self._instead(failed)
        self._instead = None
        return forward_backward(self._model, batch, weights)

    def forward(self, batch: PackedBatch | None) -> None:
        """The forward pass for the budget, or for this batch without a budget; no gradients.

        A compiled model is compiled in it. batch: None: nothing runs without a budget.
        """
        if self._static is not None:
            _dummies_only(self._static)
            batch = self._static.batch
        if batch is not None:
            self._model(batch)

    def prepare(self, zero_grad: Callable[[], None]) -> None:
        """Compile and capture for the budget, with dummy tokens only, before time counts.

        zero_grad leaves every parameter's gradient in place, zeroed.
        """
        if self._static is None:
            return
        _dummies_only(self._static)
        # A capture needs that what came before ran on another stream than the usual one.
        with devices.side_stream(self._device) if self._graph else nullcontext():
            for _ in range(WARM_UP_STEPS):
                forward_backward(self._model, self._static.batch, self._weights)
        if self._graph:
            zero_grad()
            self._capture = [self._captured_step(self._static)]
        zero_grad()

    def _captured_step(self, static: StaticBatch) -> tuple[Graph, dict[str, LossSum]]:
        def work() -> dict[str, LossSum]:
            return forward_backward(self._model, static.batch, self._weights)

        try:
            return capture.captured(self._device, work)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"use_cuda_graph: these kernels and settings cannot be captured ({reason})",
                "leave it out, or try --kernels triton without --checkpoint_activations",
            ) from error


def _dummies_only(static: StaticBatch) -> None:
    """Sequences of about equal length without any label that counts."""
    budget, batch = static.budget, static.batch
    ends = torch.linspace(0, budget.tokens, len(batch.cu_seqlens), device=batch.cu_seqlens.device)
    batch.cu_seqlens.copy_(ends.to(torch.int32))
