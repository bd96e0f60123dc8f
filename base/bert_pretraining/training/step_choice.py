"""The choice of the micro-step: the form of the model's layers, at once or as a CUDA graph.

Compiling and capturing depend on versions of compilers and drivers. What fails, or trains otherwise
than the plain modules do, is left out, and the run goes on without it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from bert_pretraining.config.settings import Config
from bert_pretraining.errors import UserError
from bert_pretraining.kernels.fp8 import Fp8State
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.layer_form import PLAIN, CompiledForm, FusedForm, LayerForm
from bert_pretraining.model.losses import OBJECTIVES
from bert_pretraining.model.parameter_memory import OwnGradients
from bert_pretraining.runtime import agreement, packages
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.gradient_sink import GradientSink
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.micro_step import MicroStep, forward_backward
from bert_pretraining.training.static_batch import Budget, usual_budget
from bert_pretraining.training.step_proof import (
    difference,
    first_fault,
    reason_of,
    sample_batch,
)

FORMS = {"compiled": "torch.compile", "fused": "fused layers", "plain": "plain modules"}


@dataclass(frozen=True)
class Trained:
    """What the micro-step works on.

    module: the bare model, whose form is chosen. model: what to call, maybe a replicated module.
    zero_grad: leaves every parameter's gradient in place, zeroed. sink: where the optimizer wants
    the gradients of fused layers, if anywhere. reduces_later: whether the ranks' gradients can be
    averaged after the backward pass, so that autograd need not see them come. fp8: the scales of
    layers that compute in fp8.
    """

    module: BertForPreTraining
    model: nn.Module
    zero_grad: Callable[[], None]
    sink: GradientSink | None = None
    reduces_later: bool = True
    fp8: Fp8State | None = None

    @property
    def gradients(self) -> GradientSink:
        """Where gradients are, and where fused layers put theirs."""
        return self.sink or OwnGradients()


@dataclass(frozen=True)
class Way:
    """How micro-steps run.

    forms: of the layers, names in FORMS; the first that works is taken. graph: whether forward and
    backward are captured. size: the constant shape for compiled code and graphs, if there is one.
    """

    forms: tuple[str, ...]
    graph: bool
    size: Budget | None

    @property
    def used_size(self) -> Budget | None:
        """The constant shape that this way needs."""
        return self.size if self.graph or self.forms[0] == "compiled" else None

    def __str__(self) -> str:
        return "use_cuda_graph" if self.graph else FORMS[self.forms[0]]

    def without(self, blamed: str) -> Way:
        """The way to try when this one has failed. blamed: "use_cuda_graph" or the form."""
        if blamed == "use_cuda_graph":
            return Way(self.forms, False, self.size)
        return Way(self.forms[1:], self.graph, self.size)


def prepared_step(
    config: Config, trained: Trained, max_seqlen: int, ranks: Ranks, say: Callable[[str], None]
) -> MicroStep:
    """Choose the layers' form and whether to capture, as the settings ask and the device allows.

    The step is compiled and captured here, on all ranks at once; what fails is left out. With
    `prove_kernels`, loss and gradients are also compared with those of the plain modules. Random
    states stay as they were. Compiled and captured steps may use a constant shape.

    max_seqlen: the longest sequence that the model takes. say: is told what was chosen.

    UserError if compiling was asked for and cannot be, or fails.
    """
    way = _asked(config, trained, max_seqlen, ranks, say)
    # What is tried here must not move the scales of training.
    with trained.fp8.as_calibrated() if trained.fp8 else contextlib.nullcontext():
        return best_that_works(way, config, trained, max_seqlen, ranks, say)


def best_that_works(
    way: Way,
    config: Config,
    trained: Trained,
    max_seqlen: int,
    ranks: Ranks,
    say: Callable[[str], None],
) -> MicroStep:
    """`prepared_step`, beginning with this way."""
    proves = config.proves_kernels_on(ranks.device.type)
    while way.graph or way.forms[0] != "plain":
        trained.module.bert.form = _form(way, trained)
        step = _make(way, config, trained, ranks, say)
        with devices.generators_kept(ranks.device):
            batch = _sample(way, max_seqlen, ranks.device) if proves else None
            fault, blamed = _prepare(step, way, batch, trained, ranks.device)
            if fault is None and batch is not None:
                blamed = str(way)
                fault = _difference(step, way, trained, batch, config, say)
            trained.zero_grad()
        # A graph cannot use what the plain modules have left behind.
        devices.free_unused_memory(ranks.device)
        if fault is None:
            say(f"Micro-steps: {_described(way)}")
            return step
        if blamed == "torch.compile":
            _compile_failed(fault, config, say)
        else:
            fault = fault.removeprefix("use_cuda_graph: ")
            say(f"Notice: {blamed}: the run goes on without it ({fault})")
        way = way.without(blamed)
    trained.module.bert.form = PLAIN
    return _make(way, config, trained, ranks, say)


def _described(way: Way) -> str:
    return FORMS[way.forms[0]] + (", captured as a CUDA graph" if way.graph else "")


def _form(way: Way, trained: Trained) -> LayerForm:
    if way.forms[0] == "compiled":
        return CompiledForm(None if way.size is None else way.size.tokens)
    if way.forms[0] == "fused":
        module = trained.module
        return FusedForm(module.bert.encoder.layer, module.kernels.pairs, trained.gradients)
    return PLAIN


def _prepare(
    step: MicroStep,
    way: Way,
    batch: PackedBatch | None,
    trained: Trained,
    device: torch.device,
) -> tuple[str | None, str]:
    """Compile and capture; why that failed, or None, and what failed. The same on every rank.

    The forward passes come first: they fail on a rank before other ranks wait for this rank's
    gradients in a backward pass. batch: to compile for if there is no constant shape.
    """
    fault = first_fault(lambda: step.forward(batch), device)
    if fault:
        return fault, "use_cuda_graph" if way.forms[0] == "plain" else FORMS[way.forms[0]]
    return first_fault(lambda: step.prepare(trained.zero_grad), device), str(way)


def _difference(
    step: MicroStep,
    way: Way,
    trained: Trained,
    batch: PackedBatch,
    config: Config,
    say: Callable[[str], None],
) -> str | None:
    """How the step differs from the plain modules, or None; the same on every rank."""
    module, model = trained.module, trained.model
    weights = {
        name: torch.tensor(1.0 / batch.num_predictions(name), device=batch.input_ids.device)
        for name in OBJECTIVES[config.objective]
    }
    found: list[str | None] = []

    def plain() -> dict:
        with module.layers_as(PLAIN):
            return forward_backward(model, batch, weights)

    def compare() -> None:
        try:
            # Without dropout only rounding may differ. A graph has dropout in it, and torch.compile
            # would compile once more without.
            modes = [True] if way.graph or way.forms[0] == "compiled" else [False, True]
            for with_dropout in modes:
                with _training(module, with_dropout):
                    fault = difference(
                        module,
                        plain,
                        lambda: step(batch, weights),
                        trained.zero_grad,
                        trained.gradients.target,
                    )
                if fault:
                    break
            found.append(fault)
        except torch.OutOfMemoryError:  # two models' gradients at once; the step alone may fit
            say(f"Notice: {way} is not compared with the plain modules: too little memory for both")
            found.append(None)

    device = batch.input_ids.device
    fault = first_fault(compare, device)
    return fault or agreement.first_said(found[0], device)


@contextlib.contextmanager
def _training(module: nn.Module, mode: bool) -> Iterator[None]:
    before = module.training
    module.train(mode)
    try:
        yield
    finally:
        module.train(before)


def _compile_failed(reason: str, config: Config, say: Callable[[str], None]) -> None:
    if config.compile == "on":
        raise UserError(
            f"--compile on: torch.compile fails ({reason})",
            "pass --compile off, or --compile auto to go on without it",
        )
    say(f"Notice: torch.compile: the run goes on without it ({reason})")


def _asked(
    config: Config, trained: Trained, max_seqlen: int, ranks: Ranks, say: Callable[[str], None]
) -> Way:
    """What the settings ask for and the device allows."""
    on_gpu = devices.is_cuda(ranks.device)
    fuses = trained.module.kernels.pairs is not None and trained.reduces_later
    forms = ["fused"] if fuses else []
    has_triton = devices.is_installed("triton")
    if trained.fp8 is not None:
        if config.compile == "on":
            say("Notice: --compile on has no effect: layers in fp8 are not compiled")
    elif config.compile == "on":
        forms = ["compiled"]
    elif config.compile == "auto" and on_gpu:
        # Fused layers leave nothing to the compiler, and need no time to compile.
        if has_triton:
            forms.append("compiled")
        elif not fuses:
            say("Notice: not compiled: triton is not installed")
    if forms == ["compiled"] and on_gpu and not has_triton:
        raise UserError(
            "--compile on: on a GPU it needs triton", packages.how_to_install(["triton"])
        )
    balanced = config.resolved_batching == "balanced"
    obstacles = {
        "it needs a device that captures graphs": devices.graphs(ranks.device) is None,
        "it needs --batching balanced": not balanced,
        "this optimizer exchanges gradients during backward": not trained.reduces_later,
    }
    why_not = next((why for why, holds in obstacles.items() if holds), None)
    if config.use_cuda_graph and why_not:
        say(f"Notice: use_cuda_graph has no effect: {why_not}")
    size = None
    if balanced:
        size = usual_budget(config.train_batch_size, max_seqlen, config.static_tokens)
    way = Way((*forms, "plain"), config.use_cuda_graph and not why_not, size)
    if way.used_size:
        say(f"Constant shapes: {size.tokens} tokens, {size.masked} masked rows")
    if config.compile == "on" and not on_gpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("--compile on: on a CPU it needs a C++ compiler", "install g++ or set CXX")
    return way


def _make(
    way: Way, config: Config, trained: Trained, ranks: Ranks, say: Callable[[str], None]
) -> MicroStep:
    def instead(error: Exception) -> None:
        _compile_failed(reason_of(error), config, say)
        trained.module.bert.form = PLAIN

    return MicroStep(
        trained.model,
        ranks.device,
        way.used_size,
        way.graph,
        OBJECTIVES[config.objective],
        instead if way.forms[0] == "compiled" else None,
        trained.fp8,
    )


def _sample(way: Way, max_seqlen: int, device: torch.device) -> PackedBatch:
    """A batch that fits the constant shape; a small one if there is none."""
    size = way.used_size
    if size is not None:
        return sample_batch(size.sequences, size.tokens, size.masked, device)
    length = min(11, max_seqlen)
    return sample_batch(3, 3 * length - 1, length, device)
