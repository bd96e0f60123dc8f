"""The problems that a kernel's proof gives to an operator: inputs, masks, exact results.

A problem lies on the run's device and has the batch's full size. Only a part of it is compared:
some rows, all of their columns. The gradient that flows into the operator is zero outside this
part, so that every gradient depends on the part alone, and is zero elsewhere. So the exact
results, in float64 on the CPU, cost little for a batch of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bert_pretraining.runtime import device as devices

# Elements of the widest tensor that are compared. For BERT-large the exact results of all cases of
# a provider then take 0.3 s on one core (measured on an AMD EPYC), for a batch of any size.
COMPARED = 2**19
SEED = 1234

Part = tuple[tuple[int, Tensor], ...]
"""A part of a tensor: (dimension, the indices of this dimension that belong to it), ..."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a batch in a model.

    lengths: tokens of each sequence. masked: rows of the logits. inner: columns of bias_gelu.
    vocabulary, positions, segments: rows of the embedding tables. dropout: the run's, with which
    providers are timed.
    """

    lengths: tuple[int, ...]
    masked: int
    heads: int
    head_size: int
    inner: int
    vocabulary: int
    positions: int
    segments: int
    epsilon: float
    dropout: float

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def hidden(self) -> int:
        return self.heads * self.head_size


def small(sizes: Sizes) -> Sizes:
    """A small problem with an odd number of tokens and a sequence of one, for the same kernels."""
    heads = min(3, sizes.heads)
    return Sizes(
        lengths=tuple(min(length, sizes.positions) for length in (33, 1, 8, 11)),
        masked=11,
        heads=heads,
        head_size=sizes.head_size,
        inner=4 * heads * sizes.head_size,
        vocabulary=104,
        positions=min(40, sizes.positions),
        segments=sizes.segments,
        epsilon=sizes.epsilon,
        dropout=sizes.dropout,
    )


def lengths_of(sequences: int, longest: int, tokens: int) -> tuple[int, ...]:
    """Lengths with about this sum: the longest, one of a single token, the others alike.

    tokens: at most sequences * longest.
    """
    if sequences < 3:
        return (longest, 1)[:sequences]
    mean, more = divmod(max(tokens - longest - 1, sequences - 2), sequences - 2)
    others = [min(mean + (number < more), longest) for number in range(sequences - 2)]
    return (longest, 1, *others)


class GivenMasks(TorchFunctionMode):
    """While it is active, F.dropout applies these masks, one after the other."""

    def __init__(self, masks: Iterable[Tensor]) -> None:
        super().__init__()
        self._masks = iter(masks)

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func is F.dropout:
            probability = (kwargs or {}).get("p", 0.5)
            mask = next(self._masks, None) if probability else None
            return args[0] if mask is None else args[0] * mask / (1.0 - probability)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Exact:
    """The exact value of one compared tensor, in float64 on the CPU.

    magnitude: of the same shape; a computation whose every intermediate result is off by a
    relative error u is expected to be off by a small multiple of u * magnitude.
    """

    value: Tensor
    magnitude: Tensor


class Problem:
    """One operator's problem. Subclasses make the inputs and know the operator.

    Attributes:
        inputs: by their names in `reference.py`, those that get gradients, on the device.
        parts: name -> the compared part of an input; a missing name: all of it.
        output_part: the compared part of the output.
        drops: whether the operator has dropout.
        multiplies: whether it multiplies matrices, which a device may do in TF32.
    """

    drops = True
    multiplies = False

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.inputs: dict[str, Tensor] = {}
        self.parts: dict[str, Part] = {}
        self.output_part: Part = ()
        self._direction: Tensor | None = None
        self._without_masks: dict[str, Exact] | None = None
        torch.manual_seed(SEED)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype).requires_grad_()

    def call(self, function: Callable, inputs: Sequence[Tensor], dropout: float) -> Tensor:
        """The operator's differentiable output."""
        raise NotImplementedError

    def call_whole(self, function: Callable, dropout: float) -> Tensor:
        """As `call`, with the whole batch's work where the proof leaves something out."""
        return self.call(function, list(self.inputs.values()), dropout)

    def fault(self) -> str | None:
        """What is wrong with the latest call beside its output and gradients, or None."""
        return None

    def direction(self, output: Tensor) -> Tensor:
        """The gradient that flows into the output; zero outside the compared part."""
        if self._direction is None:
            torch.manual_seed(SEED + 1)  # other numbers than those of the inputs
            full = torch.randn(output.shape, device=self.device).to(output.dtype)
            part = local(full) - outside(full, self.output_part)
            self._direction = part.to(self.device)
        return self._direction

    def draw_masks(
        self, function: Callable, dropout: float, seed: int, factor: float
    ) -> list[Tensor]:
        """Masks (True: kept) that the operator draws after `torch.manual_seed(seed)`.

        They belong to the compared part, and lie on the CPU. factor: of the inputs that show them.
        """
        raise NotImplementedError

    def exact(self, dropout: float, masks: list[Tensor]) -> dict[str, Exact]:
        """The output (under "output") and the gradients (under the inputs' names).

        `direction` must have been called before.
        """
        if not masks:
            self._without_masks = self._without_masks or self._exact(0.0, [])
            return self._without_masks
        return self._exact(dropout, masks)

    def _exact(self, dropout: float, masks: list[Tensor]) -> dict[str, Exact]:
        given = {name: take(self.inputs[name], self.parts.get(name, ())) for name in self.inputs}
        for tensor in given.values():
            tensor.requires_grad_()
        with GivenMasks(masks):
            output = self.call_reference(list(given.values()), dropout)
        gradient = torch.ones((), dtype=torch.float64)
        if output.dim():
            gradient = take(self._direction, self.output_part)
        gradients = torch.autograd.grad(output, list(given.values()), gradient)
        values = dict(zip(("output", *given), (output.detach(), *gradients), strict=True))
        with torch.no_grad():
            scale = [mask / (1.0 - dropout) for mask in masks] or [torch.ones(())]
            magnitudes = self.magnitudes(list(given.values()), gradient, values, scale)
        return {name: Exact(values[name], magnitudes[name]) for name in values}

    def call_reference(self, inputs: list[Tensor], dropout: float) -> Tensor:
        """As `call`, with the compared part in float64."""
        raise NotImplementedError

    def magnitudes(
        self, inputs: list[Tensor], gradient: Tensor, values: dict[str, Tensor], scale: list[Tensor]
    ) -> dict[str, Tensor]:
        """See `Exact`. values: the exact ones. scale: of the masks' elements, dropped ones 0."""
        raise NotImplementedError


def local(tensor: Tensor) -> Tensor:
    """The tensor where every operator of PyTorch works: on a CPU or a CUDA device."""
    tensor = tensor.detach()
    return tensor if tensor.device.type == "cpu" or devices.is_cuda(tensor.device) else tensor.cpu()


def take(tensor: Tensor, part: Part) -> Tensor:
    """The part, in float64 on the CPU."""
    tensor = local(tensor)
    for dimension, indices in part:
        tensor = tensor.index_select(dimension, indices.to(tensor.device))
    return tensor.cpu().double()


def outside(tensor: Tensor, part: Part) -> Tensor:
    """The tensor, `local`, with zeros in place of the part."""
    tensor = local(tensor)
    inside = torch.ones((), dtype=torch.bool, device=tensor.device)
    for dimension, indices in part:
        line = torch.zeros(tensor.shape[dimension], dtype=torch.bool, device=tensor.device)
        line[indices.to(tensor.device)] = True
        inside = inside & line.view([-1 if d == dimension else 1 for d in range(tensor.dim())])
    return tensor.masked_fill(inside, 0.0)


def spread(count: int, wanted: int, device: torch.device) -> Tensor:
    """At most `wanted` of the indices below `count`: the first, the last, and some between."""
    places = torch.linspace(0, count - 1, max(1, min(count, wanted)), dtype=torch.float64)
    return places.round().long().unique().to(device)


def growth(terms: int, dtype: torch.dtype) -> float:
    """By what adding terms in float32, one after the other, multiplies a sum's magnitude.

    Independent errors of n terms of size a, of eps * a each, give eps * a * sqrt(n). Adding rounds
    n partial sums, of which number i is about a * sqrt(i), and so adds eps32 * a * n / sqrt(24):
    a fifth of eps32 * sqrt(n) times the first.
    """
    inner = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    return 1.0 + 0.25 * inner * terms**0.5


def of_sum(terms: Tensor, dtype: torch.dtype) -> Tensor:
    """The magnitude of a sum over the first dimension, from those of its terms."""
    return terms.square().sum(0).sqrt() * growth(terms.shape[0], dtype)
