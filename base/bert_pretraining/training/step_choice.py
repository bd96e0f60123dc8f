"""The choice of the micro-step: eager, compiled, or replayed as a CUDA graph.

Compiling and capturing depend on versions of compilers and drivers. What fails, or trains otherwise
than the eager model does, is left out, and the run goes on without it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bert_pretraining.config.settings import Config
from bert_pretraining.errors import UserError
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.losses import OBJECTIVES
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime import process_group
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.micro_step import MicroStep, forward_backward
from bert_pretraining.training.static_batch import Budget, budgets
from bert_pretraining.training.step_proof import difference, sample_batch


@dataclass(frozen=True)
class Way:
    """How micro-steps run. sizes: the constant shapes, if there are any."""

    compiled: bool
    graph: bool
    sizes: tuple[Budget, ...]

    def __str__(self) -> str:
        return "use_cuda_graph" if self.graph else "torch.compile"


EAGER = Way(False, False, ())


def prepared_step(
    config: Config,
    model: nn.Module,
    max_seqlen: int,
    ranks: Ranks,
    say: Callable[[str], None],
    zero_grad: Callable[[], None],
) -> MicroStep:
    """Choose eager, compiled or captured, as the settings ask and the device allows.

    It is compiled and captured here, on all ranks at once; what fails is left out. With
    `prove_kernels`, loss and gradients are also compared with the eager model's. Random states
    stay as they were. Compiled and captured steps may use constant shapes.

    max_seqlen: the longest sequence that the model takes. say: is told what was chosen. zero_grad
    leaves every parameter's gradient in place, zeroed.

    UserError if compiling was asked for and cannot be, or fails.
    """
    way = _asked(config, max_seqlen, ranks, say)
    return best_that_works(way, config, model, max_seqlen, ranks, say, zero_grad)


def best_that_works(
    way: Way,
    config: Config,
    model: nn.Module,
    max_seqlen: int,
    ranks: Ranks,
    say: Callable[[str], None],
    zero_grad: Callable[[], None],
) -> MicroStep:
    """`prepared_step`, beginning with this way."""
    proves = config.proves_kernels_on(ranks.device.type)
    compiled = _compiled(way, model, say)
    while way != EAGER:
        step = _make(way, config, model, compiled, ranks, say)
        with devices.generators_kept(ranks.device):
            batch = _sample(way, max_seqlen, ranks.device) if proves else None
            fault, blamed = _prepare(step, way, batch, zero_grad)
            if fault is None and batch is not None:
                blamed = str(way)
                fault = _difference(step, way, model, batch, config, zero_grad, say)
            zero_grad()
        if fault is None:
            return step
        if blamed == "torch.compile":
            _compile_failed(fault, config, say)
            compiled = model
            way = Way(False, True, way.sizes) if way.graph else EAGER
        else:
            fault = fault.removeprefix("use_cuda_graph: ")
            say(f"Notice: use_cuda_graph: the run goes on without it ({fault})")
            way = Way(True, False, way.sizes) if way.compiled else EAGER
    return _make(EAGER, config, model, model, ranks, say)


def _prepare(
    step: MicroStep, way: Way, batch: PackedBatch | None, zero_grad: Callable[[], None]
) -> tuple[str | None, str]:
    """Compile and capture; why that failed, or None, and what failed. The same on every rank.

    The forward passes come first: they fail on a rank before other ranks wait for this rank's
    gradients in a backward pass. batch: to compile for if there are no constant shapes.
    """
    fault = _first_fault(lambda: step.forward(batch))
    if fault:
        return fault, "torch.compile" if way.compiled else "use_cuda_graph"
    return _first_fault(lambda: step.prepare(zero_grad)), str(way)


def _difference(
    step: MicroStep,
    way: Way,
    model: nn.Module,
    batch: PackedBatch,
    config: Config,
    zero_grad: Callable[[], None],
    say: Callable[[str], None],
) -> str | None:
    """How the step differs from the eager model, or None; the same on every rank."""
    losses = OBJECTIVES[config.objective]
    weights = {
        name: torch.tensor(1.0 / batch.num_predictions(name), device=batch.input_ids.device)
        for name in losses
    }
    found: list[str | None] = []

    def compare() -> None:
        try:
            found.append(
                difference(
                    model,
                    lambda: forward_backward(model, batch, weights),
                    lambda: step(batch, weights),
                    zero_grad,
                )
            )
        except torch.OutOfMemoryError:  # two models' gradients at once; the step alone may fit
            say(f"Notice: {way} is not compared with the eager model: too little memory for both")
            found.append(None)

    fault = _first_fault(compare)
    return fault or next(filter(None, process_group.gather(found[0])), None)


def _first_fault(action: Callable[[], None]) -> str | None:
    """The error of the first rank on which the action fails, in one line, or None."""
    reason = None
    try:
        action()
    except Exception as error:  # compilers raise errors of many kinds
        reason = _reason(error)
    return next(filter(None, process_group.gather(reason)), None)


def _reason(error: Exception) -> str:
    if isinstance(error, UserError):
        return error.problem
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _compile_failed(reason: str, config: Config, say: Callable[[str], None]) -> None:
    if config.compile == "on":
        raise UserError(
            f"--compile on: torch.compile fails ({reason})",
            "pass --compile off, or --compile auto to go on without it",
        )
    say(f"Notice: torch.compile: the run goes on without it ({reason})")


def _asked(config: Config, max_seqlen: int, ranks: Ranks, say: Callable[[str], None]) -> Way:
    """What the settings ask for and the device allows."""
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
    graph = config.use_cuda_graph and not why_not
    sizes: tuple[Budget, ...] = ()
    if balanced and (compiled or graph):
        sizes = budgets(config.train_batch_size, max_seqlen, config.static_tokens)
        say(f"Constant shapes: {sizes[0].tokens} tokens, {sizes[0].masked} masked rows")
    if compiled and not on_gpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("--compile on: on a CPU it needs a C++ compiler", "install g++ or set CXX")
    return Way(compiled, graph, sizes)


def _compiled(way: Way, model: nn.Module, say: Callable[[str], None]) -> nn.Module:
    if not way.compiled:
        return model
    say("Compiling the model with torch.compile")
    return torch.compile(model, dynamic=not way.sizes)


def _make(
    way: Way,
    config: Config,
    model: nn.Module,
    compiled: nn.Module,
    ranks: Ranks,
    say: Callable[[str], None],
) -> MicroStep:
    def instead(error: Exception) -> nn.Module:
        _compile_failed(_reason(error), config, say)
        return model

    return MicroStep(
        compiled if way.compiled else model,
        ranks.device,
        way.sizes,
        way.graph,
        OBJECTIVES[config.objective],
        instead if way.compiled else None,
    )


def _sample(way: Way, max_seqlen: int, device: torch.device) -> PackedBatch:
    """A batch that fits the first constant shape; a small one if there is none."""
    if way.sizes:
        size = way.sizes[0]
        return sample_batch(size.sequences, size.tokens, size.masked, device)
    length = min(11, max_seqlen)
    return sample_batch(3, 3 * length - 1, length, device)
