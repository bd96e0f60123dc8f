"""The proof's problem of attention. See `proof_problem.py`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_pretraining.kernels import reference
from bert_pretraining.kernels.proof_problem import COMPARED, Problem, Sizes, growth, spread, take


class Attention(Problem):
    multiplies = True

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self._size, self._longest = sizes.head_size, max(sizes.lengths)
        self.inputs = {"qkv": self.random(sizes.tokens, 3, sizes.heads, sizes.head_size)}
        bounds = [0, *itertools.accumulate(sizes.lengths)]
        self._cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        # The first two, of which one is the longest, and as many as the limit allows; then heads.
        chosen = [number for number in (0, 1, 2, 3) if number < len(sizes.lengths)]
        while len(chosen) > 2 and sum(sizes.lengths[n] ** 2 for n in chosen) > COMPARED:
            chosen.pop()
        self._lengths = [sizes.lengths[number] for number in chosen]
        weights = sum(length**2 for length in self._lengths)
        heads = spread(sizes.heads, max(1, COMPARED // weights), device)
        tokens = torch.cat([torch.arange(bounds[n], bounds[n + 1]) for n in chosen]).to(device)
        self.parts = {"qkv": ((0, tokens), (2, heads))}
        self.output_part = ((0, tokens), (1, heads))

    def call(self, function: Callable, inputs: Sequence[Tensor], dropout: float) -> Tensor:
        return function(*inputs, self._cu_seqlens, self._longest, dropout)

    def call_reference(self, inputs: list[Tensor], dropout: float) -> Tensor:
        bounds = torch.tensor([0, *itertools.accumulate(self._lengths)])
        return reference.attention(*inputs, bounds, self._longest, dropout)

    def draw_masks(
        self, function: Callable, dropout: float, seed: int, factor: float
    ) -> list[Tensor]:
        """All weights are 1 / length. The value of key number n is the unit vector n modulo D.

        One call shows the weights of D keys of each sequence: the other keys' values are 0. So
        each call draws the same masks, from the same random state.
        """
        (query,) = self.inputs.values()
        places = torch.cat([torch.arange(n) for n in self._cu_seqlens.cpu().diff().tolist()])
        shown: list[list[Tensor]] = [[] for _ in self._lengths]
        for first in range(0, self._longest, self._size):
            values = F.one_hot((places - first).clamp(-1, self._size) + 1, self._size + 2)[:, 1:-1]
            probe = torch.zeros_like(query.detach())
            probe[:, 2] = (factor * values[:, None]).to(probe)
            torch.manual_seed(seed)
            context = self.call(function, [probe.requires_grad_()], dropout)
            for number, piece in enumerate(take(context, self.output_part).split(self._lengths)):
                shown[number].append(piece)
        masks = []
        for length, pieces in zip(self._lengths, shown, strict=True):
            weights = torch.cat(pieces, dim=2)[..., :length].transpose(0, 1)
            masks.append(weights * length > 0.25)
        return masks

    def magnitudes(
        self, inputs: list[Tensor], gradient: Tensor, values: dict[str, Tensor], scale: list[Tensor]
    ) -> dict[str, Tensor]:
        pieces = inputs[0].split(self._lengths), gradient.split(self._lengths)
        scales = itertools.cycle(scale) if len(scale) == 1 else iter(scale)
        found = [
            _attention_magnitudes(qkv, towards, scale, self.dtype)
            for qkv, towards, scale in zip(*pieces, scales, strict=False)
        ]
        return {
            "output": torch.cat([output for output, _ in found]),
            "qkv": torch.cat([gradients for _, gradients in found]),
        }


def _attention_magnitudes(
    qkv: Tensor, gradient: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of one sequence: qkv (L, 3, heads, D), gradient (L, heads, D), scale (heads, L, L).

    The scores S = Q K' / sqrt(D) are rounded, so the weights P = softmax(S) have a relative error
    of 1 + |S|, and that of S as a sum. Products with P add independent errors: the root of a sum
    of squares. With dP = scale (dO V') and delta = rowsum(P dP), the scores' gradient is
    P (dP - delta).
    """
    query, key, value = qkv.permute(1, 2, 0, 3)
    towards = gradient.transpose(0, 1)
    root, length = math.sqrt(qkv.shape[-1]), qkv.shape[0]
    by_size, by_length = growth(qkv.shape[-1], dtype), growth(length, dtype)

    def product(left: Tensor, right: Tensor) -> Tensor:
        return (left.square() @ right.square()).sqrt()

    scores = query @ key.transpose(1, 2) / root
    weights = torch.softmax(scores, -1)
    relative = 1.0 + scores.abs() + (by_size - 1.0) * product(query, key.transpose(1, 2)) / root
    kept = weights * relative * scale
    output = product(kept, value) * by_length
    values = product(kept.transpose(1, 2), towards) * by_length
    into = scale * (towards @ value.transpose(1, 2))
    roundings = scale * product(towards, value.transpose(1, 2)) * by_size
    delta = (weights * into).sum(-1, keepdim=True)
    of_delta = (weights * (into.abs() + roundings)).square().sum(-1, keepdim=True).sqrt()
    of_delta = of_delta + (output * towards).square().sum(-1, keepdim=True).sqrt() + delta.abs()
    of_scores = weights * (relative * (into - delta).abs() + into.abs() + roundings + of_delta)
    queries = product(of_scores, key) * by_length / root
    keys = product(of_scores.transpose(1, 2), query) * by_length / root
    return output.transpose(0, 1), torch.stack([queries, keys, values]).permute(2, 0, 1, 3)
