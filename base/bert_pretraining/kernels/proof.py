"""The proof of a kernel: it is run once and compared with `reference` in float64, elementwise.

An element may differ from the exact one by

    FACTOR * eps * magnitude

where eps is the spacing of the compute dtype's numbers at 1, and the magnitude (`Exact`) says how
far rounding every intermediate result by that much moves this element. For the magnitudes, the
errors of a sum's terms count as independent: n terms of size a add an error of eps * a * sqrt(n),
not of eps * a * n. The bound is therefore as narrow as the dtype allows: an element that is wrong
by its whole magnitude is beyond it, unless it is a small difference of large numbers. Such a
statistical bound needs a factor for the largest of many elements (about 5 standard deviations of
several roundings of at most eps / 2 each). Measured: over all providers, dtypes and shapes of the
tests, errors reach at most a third of this bound.

In a proof with dropout the operator first shows its mask: special inputs make every dropped
element visible (`Problem.draw_masks`). The exact results with this mask are then compared with a
forward and backward pass after the same random state. So a backward pass that uses another mask is
caught.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bert_pretraining.kernels.proof_attention import Attention
from bert_pretraining.kernels.proof_operators import (
    BiasGelu,
    CrossEntropy,
    Embedding,
    ResidualLayerNorm,
)
from bert_pretraining.kernels.proof_problem import (
    SEED,
    Exact,
    Part,
    Problem,
    Sizes,
    local,
    outside,
    small,
    take,
)
from bert_pretraining.kernels.provider import Target
from bert_pretraining.runtime import arithmetic
from bert_pretraining.runtime import device as devices

FACTOR = 8.0
DROPOUTS = (0.0, 0.1)
# A provider may round the dropout's probability to 16 bits (dropout.py), which changes the scale of
# kept elements by so much.
DROPOUT_GRAIN = 2.0**-16
# FlashAttention-2 even rounds it to 8 bits: it drops 26 / 256 of the elements instead of 0.1.
PROBABILITY_GRAIN = 2.0**-8
TIMED, WARM_UP = 7, 2

PROBLEMS: dict[str, type[Problem]] = {
    "attention": Attention,
    "bias_gelu": BiasGelu,
    "bias_dropout_residual_layer_norm": ResidualLayerNorm,
    "embedding_layer_norm_dropout": Embedding,
    "masked_cross_entropy": CrossEntropy,
}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Case:
    """One comparison: the run's own sizes, or the small ones that follow from them."""

    operator: str
    sizes: Sizes
    is_small: bool
    dropout: float

    def problem(self, target: Target) -> Problem:
        """Its inputs, on the target. Cases of other dropout have the same."""
        sizes = small(self.sizes) if self.is_small else self.sizes
        return PROBLEMS[self.operator](sizes, target.device, target.dtype)

    def describe(self, dtype: torch.dtype) -> str:
        """Shape, dtype and dropout for people."""
        sizes = small(self.sizes) if self.is_small else self.sizes
        shape = {
            "attention": (sizes.tokens, sizes.heads, sizes.head_size),
            "bias_gelu": (sizes.tokens, sizes.inner),
            "masked_cross_entropy": (sizes.masked, sizes.vocabulary),
        }.get(self.operator, (sizes.tokens, sizes.hidden))
        text = f"{' x '.join(map(str, shape))} {_NAMES.get(dtype, dtype)}"
        return f"{text}, dropout {self.dropout:g}" if PROBLEMS[self.operator].drops else text


def cases(operator: str, sizes: Sizes) -> list[Case]:
    """All cases of an operator, the small ones first."""
    dropouts = DROPOUTS if PROBLEMS[operator].drops else DROPOUTS[:1]
    return [
        Case(operator, sizes, is_small, dropout)
        for is_small in (True, False)
        for dropout in dropouts
    ]


@dataclass(frozen=True)
class Judgement:
    """What a proof found of one run of an operator.

    fault: what is wrong with it, or None.
    worst: the largest error as a share of its bound, over all elements that were compared: at most
        1 where nothing is wrong. None where an element had no error that could be measured, as NaN.
    """

    fault: str | None
    worst: float | None


def find_fault(function: Callable, problem: Problem, dropout: float) -> str | None:
    """Run the operator once, forward and backward; what is wrong with it, or None.

    Exceptions of the operator pass through.
    """
    return judge(function, problem, dropout).fault


def judge(function: Callable, problem: Problem, dropout: float) -> Judgement:
    """As `find_fault`, with the worst error; after a fault no other tensor is looked at."""
    masks: list[Tensor] = []
    if dropout:
        masks = problem.draw_masks(function, dropout, SEED, 1.0)
        fault = _fault_of_masks(masks, function, problem, dropout)
        if fault:
            return Judgement(fault, None)
    torch.manual_seed(SEED)
    inputs = list(problem.inputs.values())
    output = problem.call(function, inputs, dropout)
    gradients = torch.autograd.grad(output, inputs, problem.direction(output), allow_unused=True)
    fault = problem.fault()
    if fault:
        return Judgement(fault, None)
    found = dict(zip(("output", *problem.inputs), (output, *gradients), strict=True))
    exact = problem.exact(dropout, masks)
    grain = DROPOUT_GRAIN if dropout else 0.0
    spacing = torch.finfo(problem.dtype).eps
    if problem.multiplies:
        spacing = arithmetic.rounding(problem.device, problem.dtype)
    unit = FACTOR * max(spacing, grain)
    worst = 0.0
    for name, tensor in found.items():
        what, part = "output", problem.output_part
        if name != "output":
            what, part = f"gradient of {name}", problem.parts.get(name, ())
        if tensor is None:
            return Judgement(f"there is no {what}", None)
        of_this = _difference(tensor, part, exact[name], unit)
        if of_this.fault is None and name != "output":
            spilt = _spill(tensor, part)
            of_this = Judgement(spilt, None) if spilt else of_this
        if of_this.fault:
            return Judgement(f"{what} {of_this.fault}", of_this.worst)
        worst = max(worst, of_this.worst)
    return Judgement(None, worst)


def _difference(tensor: Tensor, part: Part, exact: Exact, unit: float) -> Judgement:
    """How the tensor differs from the exact one, at the element that is farthest beyond its bound.

    All elements must be finite; those of the part are compared.
    """
    tensor = local(tensor)
    finite = torch.isfinite(tensor)
    if not finite.all():
        place = (~finite).nonzero()[0]
        return Judgement(f"is {tensor[tuple(place)].item()}{_at(place.tolist())}", None)
    ours = take(tensor, part)
    if ours.shape != exact.value.shape:
        return Judgement(f"has the shape {list(tensor.shape)}", None)
    difference = (ours - exact.value).abs()
    # The least number of float16 is far larger than the other dtypes'.
    bound = unit * exact.magnitude + torch.finfo(tensor.dtype).tiny * unit
    excess = (difference / bound).flatten()
    index = int(excess.argmax())
    worst = excess[index].item()
    if worst <= 1.0:
        return Judgement(None, worst)
    place = [int(number) for number in torch.unravel_index(torch.tensor(index), ours.shape)]
    for dimension, indices in part:
        place[dimension] = int(indices[place[dimension]])
    fault = (
        f"differs by {difference.flatten()[index].item():.2g}{_at(place)} "
        f"(bound {bound.flatten()[index].item():.2g})"
    )
    return Judgement(fault, worst)


def _spill(gradient: Tensor, part: Part) -> str | None:
    """Outside the part the gradient must be zero, because none flows in there."""
    if not part:
        return None
    beyond = outside(gradient, part)
    if not beyond.any():
        return None
    place = beyond.nonzero()[0]
    return f"is {beyond[tuple(place)].item():.2g}{_at(place.tolist())} instead of 0"


def _at(place: list[int]) -> str:
    return f" at {place}" if place else ""


def _fault_of_masks(
    masks: list[Tensor], function: Callable, problem: Problem, dropout: float
) -> str | None:
    """Masks must follow the random state alone, and drop about as many elements as they should."""
    again = problem.draw_masks(function, dropout, SEED, 2.0)
    if not all(torch.equal(*pair) for pair in zip(masks, again, strict=True)):
        return "its dropout mask does not follow from the random state alone"
    others = problem.draw_masks(function, dropout, SEED + 7, 1.0)
    if all(torch.equal(*pair) for pair in zip(masks, others, strict=True)):
        return "its dropout mask is the same for every random state"
    count = sum(mask.numel() for mask in masks)
    dropped = 1.0 - sum(int(mask.sum()) for mask in masks) / count
    allowed = 6.0 * (dropout * (1.0 - dropout) / count) ** 0.5 + PROBABILITY_GRAIN
    if abs(dropped - dropout) > allowed:
        return f"it drops {dropped:.1%} of the elements"
    return None


def measure(function: Callable, problem: Problem, dropout: float) -> float:
    """Seconds of a forward and backward pass: the median of a few, after a warm-up."""
    inputs = list(problem.inputs.values())
    if not problem.drops:
        dropout = 0.0
    times = []
    for _ in range(WARM_UP + TIMED):
        devices.synchronize(problem.device)
        started = time.perf_counter()
        output = problem.call_whole(function, dropout)
        torch.autograd.grad(output, inputs, problem.direction(output))
        devices.synchronize(problem.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP:])
