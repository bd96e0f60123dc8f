"""Forward and backward of one micro-batch: eager, compiled, or replayed as a CUDA graph."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from bert_pretraining.config.settings import Config
from bert_pretraining.errors import UserError
from bert_pretraining.kernels.reference import IGNORED
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.losses import OBJECTIVES, LossSum
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.static_batch import Budget, StaticBatch, budgets

WARM_UP_STEPS = 3  # before a capture: lazy initialisation and autotuning do their work there


def forward_backward(
    model: nn.Module, batch: PackedBatch, weights: Mapping[str, Tensor]
) -> dict[str, LossSum]:
    """Add one micro-batch's gradients to the parameters'.

    weights: by the loss's name, 0-d float32, what its sum is multiplied by (loss scale included).
    Returns the sums by name, detached.
    """
    sums = model(batch)
    torch.stack([part.loss * weights[name] for name, part in sums.items()]).sum().backward()
    return {name: LossSum(part.loss.detach(), part.correct.detach()) for name, part in sums.items()}


class MicroStep:
    """`forward_backward` for a model, in the way that was chosen.

    Args:
        model: called with a batch; may be compiled or replicated.
        budgets: the constant shapes, the smallest first. A batch that fits none of them keeps its
            own shape; without budgets, every batch does.
        graph: replay captured CUDA graphs, one for each budget. `prepare` captures them.
        losses: the names of the model's losses.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        budgets: tuple[Budget, ...],
        graph: bool,
        losses: Sequence[str] = OBJECTIVES["mlm_nsp"],
    ) -> None:
        self._model = model
        self._static = [StaticBatch(budget, device, IGNORED) for budget in budgets]
        self._weights = {name: torch.ones((), device=device) for name in losses}
        self._captures: list[tuple[devices.Graph, dict[str, LossSum]]] = []
        self._graph = graph
        self._device = device

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients must stay where they lie: a captured graph adds to them there."""
        return self._graph

    def __call__(self, batch: PackedBatch, weights: Mapping[str, Tensor]) -> dict[str, LossSum]:
        """As `forward_backward`; the result is overwritten by the next call."""
        for index, static in enumerate(self._static):
            if static.budget.fits(batch):
                loaded = static.load(batch)
                if not self._graph:
                    return forward_backward(self._model, loaded, weights)
                for name, weight in self._weights.items():
                    weight.copy_(weights[name])
                graph, sums = self._captures[index]
                graph.replay()
                return sums
        return forward_backward(self._model, batch, weights)

    def prepare(self, zero_grad: Callable[[], None]) -> None:
        """Compile and capture for every budget, with dummy tokens only, before time counts.

        zero_grad leaves every parameter's gradient in place, zeroed.
        """
        for static in self._static:
            _dummies_only(static)
            for _ in range(WARM_UP_STEPS):
                # A capture needs that what came before ran on another stream than the usual one.
                with devices.side_stream(self._device) if self._graph else nullcontext():
                    forward_backward(self._model, static.batch, self._weights)
            if self._graph:
                zero_grad()
                self._captures.append(self._capture(static))
            zero_grad()

    def _capture(self, static: StaticBatch) -> tuple[devices.Graph, dict[str, LossSum]]:
        graphs = devices.graphs(self._device)
        graph = graphs.create()
        # Only one graph runs at a time, so that all can use the same memory.
        pool = self._captures[0][0].pool() if self._captures else None
        try:
            with graphs.capture(graph, pool=pool):
                sums = forward_backward(self._model, static.batch, self._weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"use_cuda_graph: these kernels and settings cannot be captured ({reason})",
                "leave it out, or try --kernels triton without --checkpoint_activations",
            ) from error
        return graph, sums


def _dummies_only(static: StaticBatch) -> None:
    """Sequences of about equal length without any label that counts."""
    budget, batch = static.budget, static.batch
    ends = torch.linspace(0, budget.tokens, len(batch.cu_seqlens), device=batch.cu_seqlens.device)
    batch.cu_seqlens.copy_(ends.to(torch.int32))


def choose_step(
    config: Config, model: nn.Module, max_seqlen: int, ranks: Ranks, say: Callable[[str], None]
) -> MicroStep:
    """Choose eager, compiled or captured, as the settings ask and the device allows.

    Compiled and captured steps may use constant shapes.

    max_seqlen: the longest sequence that the model takes. say: is told what was chosen.
    UserError if compiling was asked for and cannot be.
    """
    on_gpu = devices.is_cuda(ranks.device)
    compiled = config.compile == "on" or (config.compile == "auto" and on_gpu)
    if compiled and on_gpu and importlib.util.find_spec("triton") is None:
        if config.compile == "on":
            raise UserError("--compile on: on a GPU it needs triton", "pip install triton")
        say("Notice: not compiled: triton is not installed")
        compiled = False
    balanced = config.resolved_batching == "balanced"
    obstacles = {
        "it needs a device that captures graphs": devices.graphs(ranks.device) is None,
        "it needs --batching balanced": not balanced,
        "with several ranks, gradients are exchanged during backward": ranks.world_size > 1,
    }
    why_not = next((why for why, holds in obstacles.items() if holds), None)
    if config.use_cuda_graph and why_not:
        say(f"Notice: use_cuda_graph has no effect: {why_not}")
    sizes: tuple[Budget, ...] = ()
    if balanced and (compiled or (config.use_cuda_graph and not why_not)):
        sizes = budgets(config.train_batch_size, max_seqlen, config.static_tokens)
        say(f"Constant shapes: {sizes[0].tokens} tokens, {sizes[0].masked} masked rows")
    if compiled:
        if not on_gpu and shutil.which(os.environ.get("CXX", "g++")) is None:
            raise UserError(
                "--compile on: on a CPU it needs a C++ compiler", "install g++ or set CXX"
            )
        say("Compiling the model with torch.compile")
        model = torch.compile(model, dynamic=not sizes)
    graph = config.use_cuda_graph and not why_not
    return MicroStep(model, ranks.device, sizes, graph, OBJECTIVES[config.objective])
