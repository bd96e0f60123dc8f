"""The proof's problems of the operators that work on single rows. See `proof_problem.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bert_pretraining.kernels import reference
from bert_pretraining.kernels.proof_problem import (
    COMPARED,
    Problem,
    Sizes,
    local,
    of_sum,
    spread,
    take,
)


class BiasGelu(Problem):
    drops = False

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self.inputs = {
            "x": self.random(sizes.tokens, sizes.inner),
            "bias": self.random(sizes.inner),
        }
        rows = spread(sizes.tokens, COMPARED // sizes.inner, device)
        self.parts = {"x": ((0, rows),)}
        self.output_part = ((0, rows),)

    def call(self, function: Callable, inputs: Sequence[Tensor], dropout: float) -> Tensor:
        return function(*inputs)

    def call_reference(self, inputs: list[Tensor], dropout: float) -> Tensor:
        return reference.bias_gelu(*inputs)

    def magnitudes(
        self, inputs: list[Tensor], gradient: Tensor, values: dict[str, Tensor], scale: list[Tensor]
    ) -> dict[str, Tensor]:
        summed = inputs[0].abs() + inputs[1].abs()  # |GELU'| < 1.2 and |GELU''| < 1
        x = gradient.abs() * (1.0 + summed)
        return {"output": values["output"].abs() + summed, "x": x, "bias": of_sum(x, self.dtype)}


def norm_magnitudes(
    summed: Tensor,
    summands: Tensor,
    weight: Tensor,
    gradient: Tensor,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes of LayerNorm's output (without its bias), input's and weight's gradients.

    summed: LayerNorm's input, and summands: the sum of the absolute values that it is made of.
    """
    centred = summed - summed.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    normal = (centred * inverse).abs() + summands * inverse
    weighted = gradient * weight
    typical = weighted.square().mean(-1, keepdim=True).sqrt()
    into = inverse * (weighted.abs() + (1.0 + normal) * typical)
    return normal * weight.abs(), into, of_sum(gradient * normal, dtype)


class ResidualLayerNorm(Problem):
    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self._epsilon = sizes.epsilon
        tokens, hidden = sizes.tokens, sizes.hidden
        self.inputs = {
            "x": self.random(tokens, hidden),
            "bias": self.random(hidden),
            "residual": self.random(tokens, hidden),
            "weight": self.random(hidden),
            "norm_bias": self.random(hidden),
        }
        self.output_part = ((0, spread(tokens, COMPARED // hidden, device)),)
        self.parts = {"x": self.output_part, "residual": self.output_part}

    def call(self, function: Callable, inputs: Sequence[Tensor], dropout: float) -> Tensor:
        return function(*inputs, self._epsilon, dropout)

    def call_reference(self, inputs: list[Tensor], dropout: float) -> Tensor:
        return reference.bias_dropout_residual_layer_norm(*inputs, self._epsilon, dropout)

    def draw_masks(
        self, function: Callable, dropout: float, seed: int, factor: float
    ) -> list[Tensor]:
        """Rows of equal numbers: after LayerNorm, dropped elements are far below zero.

        With k of C elements kept, a dropped one becomes -sqrt(k / (C - k)): below -0.5 if at least
        a fifth is kept. The numbers are so small, and so large beside epsilon, that rounding
        cannot reach it where nothing was dropped.
        """
        size = 2.0 ** round(math.log2(1024.0 * math.sqrt(max(self._epsilon, 1e-12))))
        contents = {"x": factor * size, "weight": 1.0}
        shown = [
            torch.full_like(tensor, contents.get(name, 0.0), requires_grad=True)
            for name, tensor in self.inputs.items()
        ]
        torch.manual_seed(seed)
        return [take(self.call(function, shown, dropout), self.output_part) > -0.5]

    def magnitudes(
        self, inputs: list[Tensor], gradient: Tensor, values: dict[str, Tensor], scale: list[Tensor]
    ) -> dict[str, Tensor]:
        x, bias, residual, weight, norm_bias = inputs
        summed = residual + (x + bias) * scale[0]
        summands = residual.abs() + (x.abs() + bias.abs()) * scale[0]
        output, into, weights = norm_magnitudes(
            summed, summands, weight, gradient, self._epsilon, self.dtype
        )
        return {
            "output": output + norm_bias.abs(),
            "x": into * scale[0],
            "bias": of_sum(into * scale[0], self.dtype),
            "residual": into,
            "weight": weights,
            "norm_bias": of_sum(gradient, self.dtype),
        }


class Embedding(Problem):
    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self._epsilon, hidden = sizes.epsilon, sizes.hidden
        positions = torch.cat([torch.arange(length) for length in sizes.lengths])
        segments = torch.randint(sizes.segments, positions.shape)
        words = torch.randint(sizes.vocabulary, positions.shape)
        self._ids = [ids.int().to(device) for ids in (words, positions, segments)]
        entries = (sizes.vocabulary, sizes.positions, sizes.segments)
        names = ("word_table", "position_table", "segment_table")
        self.inputs = {
            name: self.random(count, hidden) for name, count in zip(names, entries, strict=True)
        }
        self.inputs |= {"weight": self.random(hidden), "norm_bias": self.random(hidden)}
        rows = spread(sizes.tokens, COMPARED // hidden, device)
        self.output_part = ((0, rows),)
        self._compact = []  # ids that count the compared rows of the tables
        for name, ids in zip(names, self._ids, strict=True):
            used, inverse = ids.cpu()[rows.cpu()].long().unique(return_inverse=True)
            self.parts[name] = ((0, used.to(device)),)
            self._compact.append(inverse)

    def call(self, function: Callable, inputs: Sequence[Tensor], dropout: float) -> Tensor:
        return function(*self._ids, *inputs, self._epsilon, dropout)

    def call_reference(self, inputs: list[Tensor], dropout: float) -> Tensor:
        return reference.embedding_layer_norm_dropout(
            *self._compact, *inputs, self._epsilon, dropout
        )

    def draw_masks(
        self, function: Callable, dropout: float, seed: int, factor: float
    ) -> list[Tensor]:
        """With weight 0 and bias 1, LayerNorm gives 1 everywhere, which dropout then drops."""
        *tables, weight, bias = (tensor.detach() for tensor in self.inputs.values())
        shown = [*tables, torch.zeros_like(weight), torch.full_like(bias, factor)]
        shown = [tensor.requires_grad_() for tensor in shown]
        torch.manual_seed(seed)
        return [take(self.call(function, shown, dropout), self.output_part) != 0.0]

    def magnitudes(
        self, inputs: list[Tensor], gradient: Tensor, values: dict[str, Tensor], scale: list[Tensor]
    ) -> dict[str, Tensor]:
        *tables, weight, norm_bias = inputs
        found = [table[ids] for table, ids in zip(tables, self._compact, strict=True)]
        summands = sum(rows.abs() for rows in found)
        gradient = gradient * scale[0]
        output, into, weights = norm_magnitudes(
            sum(found), summands, weight, gradient, self._epsilon, self.dtype
        )
        magnitudes = {
            "output": (output + norm_bias.abs()) * scale[0],
            "weight": weights,
            "norm_bias": of_sum(gradient, self.dtype),
        }
        for name, table, ids in zip(self.inputs, tables, self._compact, strict=False):
            # A plain sum: PyTorch adds the rows of one entry in the tables' dtype.
            magnitudes[name] = torch.zeros_like(table).index_add_(0, ids, into)
        return magnitudes


class CrossEntropy(Problem):
    drops = False

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        rows, columns = sizes.masked, sizes.vocabulary
        labels = torch.randint(columns, (rows,))
        logits = local(self.random(rows, columns))
        # The label surely has the highest logit in even rows, and surely not in odd ones.
        where = torch.arange(rows), labels
        where = [index.to(logits.device) for index in where]
        logits[where[0], where[1]] = 8.0 - 16.0 * (where[0] % 2).to(logits.dtype)
        self.inputs = {"logits": logits.to(device).requires_grad_()}
        compared = spread(rows, COMPARED // columns, device)
        compared = compared[: max(1, len(compared) - 1)]  # the last row is ignored too
        self.parts = {"logits": ((0, compared),)}
        self._compact = labels[compared.cpu()]
        self._all_labels = labels.to(device)
        self._labels = torch.full_like(labels, reference.IGNORED)
        self._labels[compared.cpu()] = self._compact
        self._labels = self._labels.to(device)
        self._right = int((compared.cpu() % 2 == 0).sum())
        self._counted = torch.zeros(())

    def call(self, function: Callable, inputs: Sequence[Tensor], dropout: float) -> Tensor:
        loss, self._counted = function(*inputs, self._labels)
        return loss

    def call_whole(self, function: Callable, dropout: float) -> Tensor:
        return function(*self.inputs.values(), self._all_labels)[0]

    def fault(self) -> str | None:
        found = int(self._counted)
        if found != self._right:
            return f"{found} predictions count as correct, not {self._right}"
        return None

    def direction(self, output: Tensor) -> Tensor:
        return torch.ones_like(output)

    def call_reference(self, inputs: list[Tensor], dropout: float) -> Tensor:
        return reference.masked_cross_entropy(*inputs, self._compact)[0]

    def magnitudes(
        self, inputs: list[Tensor], gradient: Tensor, values: dict[str, Tensor], scale: list[Tensor]
    ) -> dict[str, Tensor]:
        """The loss is computed in float32 at least; only its gradient is rounded to the dtype."""
        (logits,) = inputs
        logarithm = torch.logsumexp(logits, 1, keepdim=True)
        inner = torch.finfo(torch.float32).eps / torch.finfo(self.dtype).eps
        chosen = logits.gather(1, self._compact[:, None])
        ours = torch.zeros_like(logits).scatter_(1, self._compact[:, None], 1.0)
        ours += (logits - logarithm).exp() * (1.0 + logits.abs() + logarithm.abs())
        return {
            "output": inner * (1.0 + chosen.abs() + logarithm.abs()).sum(),
            "logits": values["logits"].abs() + inner * ours,
        }
