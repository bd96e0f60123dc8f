"""What one rank computes in an update, as checksums: of two equal updates they are equal.

An update's fingerprint is a list of marks in the order in which things are computed: the weights
before the update; outputs, losses and this rank's own gradients of a pass through the plain
modules; then the update itself, as `train` makes it: loss sums and gradient norm over the ranks.
The first mark that differs tells where the difference arose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bert_pretraining.errors import TrainingError
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.layer_form import PLAIN
from bert_pretraining.model.losses import mean_loss
from bert_pretraining.qualify.workload import Workload
from bert_pretraining.runtime.replicas import digest

OF_UPDATE = "update: "  # begins the names of marks of the update as `train` makes it


class Mark(NamedTuple):
    """name: of a tensor or number. digest: of all its bits. value: the mean of its absolute values,
    or the number itself."""

    name: str
    digest: str
    value: float | None


class Marks:
    """Collects marks; the device is waited for once, in `read`."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._digests: list[Tensor] = []
        self._means: dict[int, Tensor] = {}

    def add(self, name: str, tensor: Tensor, with_mean: bool = False) -> None:
        """with_mean: whether the mean of its absolute values is of interest."""
        if with_mean:
            self._means[len(self._names)] = tensor.detach().float().abs().mean()
        self._names.append(name)
        self._digests.append(digest(tensor))

    def read(self) -> list[Mark]:
        rows = torch.stack(self._digests).tolist()
        means = {}
        if self._means:
            values = torch.stack(list(self._means.values())).tolist()
            means = dict(zip(self._means, values, strict=True))
        return [
            Mark(name, f"{first:x}.{second:x}", means.get(number))
            for number, (name, (first, second)) in enumerate(zip(self._names, rows, strict=True))
        ]


class Start:
    """The state before the first update; `restore` brings it back, bit for bit.

    Moments are zero, and masters are the weights, of which 16-bit weights are the rounding.
    """

    def __init__(self, work: Workload) -> None:
        training = work.training
        self._training, optimizer = training, training.optimizer
        named = list(zip(optimizer.names, optimizer.parameters, strict=True))
        zero = torch.zeros(())
        masters = {name: one.detach().to("cpu", torch.float32, copy=True) for name, one in named}
        self._state: dict[str, object] = {"updates": 0, "master": masters}
        for slot in optimizer.SLOTS:
            self._state[slot] = {name: zero.expand(one.shape) for name, one in named}
        self._scaling = training.loss_scale.state_dict()
        self._fp8 = training.fp8.state_dict() if training.fp8 else None

    def restore(self) -> None:
        training = self._training
        training.optimizer.load_state_dict(self._state)
        for name, value in self._scaling.items():  # a fixed scale too, which NaN may have replaced
            getattr(training.loss_scale, name).fill_(value)
        if training.fp8 is not None:
            training.fp8.load_state_dict(self._fp8)


def fingerprint(work: Workload, batch: PackedBatch, seed: int) -> list[Mark]:
    """Make an update, and return its fingerprint. Every rank must call it with the same batch.

    seed: of its dropout.
    """
    marks, module = Marks(), work.training.module
    add_weights(marks, module)
    gradients = plain_pass(work, batch, seed, marks)
    for name, gradient in reversed(gradients.items()):
        marks.add(f"gradient of {name}", gradient)
    del gradients
    torch.manual_seed(seed)
    work.update(batch)
    try:
        result = work.read().result
    except TrainingError as error:  # a gradient is not finite: on one rank, if it is faulty
        return [*marks.read(), Mark(f"{OF_UPDATE}outcome", str(error), None)]
    numbers = {"loss sums": sum(result.sums), "gradient norm": result.gradient_norm}
    digests = {"loss sums": repr(result.sums), "gradient norm": repr(result.gradient_norm)}
    return [
        *marks.read(),
        *(Mark(f"{OF_UPDATE}{name}", digests[name], value) for name, value in numbers.items()),
    ]


def add_weights(marks: Marks, module: nn.Module) -> None:
    """The weights, as they are now."""
    for name, weight in module.named_parameters():
        marks.add(f"weight {name}", weight)


def plain_pass(
    work: Workload, batch: PackedBatch, seed: int, marks: Marks | None = None
) -> dict[str, Tensor]:
    """This rank's gradients by name, from the plain modules; nothing is changed but fp8's maxima.

    marks: gets outputs and losses.
    """
    module = work.training.module
    torch.manual_seed(seed)
    with module.layers_as(PLAIN):
        with _outputs_marked(module, marks):
            sums = module(batch)
        if marks is not None:
            for name, part in sums.items():
                marks.add(f"loss {name}", part.loss, with_mean=True)
                marks.add(f"correct predictions {name}", part.correct, with_mean=True)
        named = dict(module.named_parameters())
        gradients = torch.autograd.grad(
            mean_loss(sums, batch), list(named.values()), allow_unused=True
        )
    return {
        name: gradient
        for name, gradient in zip(named, gradients, strict=True)
        if gradient is not None
    }


@contextmanager
def _outputs_marked(module: nn.Module, marks: Marks | None) -> Iterator[None]:
    """Forward passes of the model meanwhile add the outputs of its parts to the marks.

    Recomputing activations in the backward pass comes later, and adds nothing.
    """
    if marks is None:
        yield
        return
    parts = {"embeddings": module.bert.embeddings}
    for number, layer in enumerate(module.bert.encoder.layer):
        parts |= {
            f"attention of layer {number}": layer.attention,
            f"layer {number}": layer,
        }
    if hasattr(module.bert, "pooler"):
        parts["pooler"] = module.bert.pooler
    parts["MLM transform"] = module.cls.predictions.transform
    hooks = [
        part.register_forward_hook(
            lambda _, __, output, name=name: marks.add(f"output of {name}", output, with_mean=True)
        )
        for name, part in parts.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
