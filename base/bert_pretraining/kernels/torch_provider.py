"""The operators through PyTorch's own fused functions. Shapes: see `reference.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_pretraining.errors import UserError
from bert_pretraining.kernels.cpu_attention import cpu_attention, padded_attention
from bert_pretraining.kernels.cuda_attention import (
    EFFICIENT,
    FLASH,
    efficient_attention,
    flash_attention,
)
from bert_pretraining.kernels.dropout import dropout as fast_dropout
from bert_pretraining.kernels.dropout import dropout_add
from bert_pretraining.kernels.provider import OPERATORS, Implementation, Provider, Target
from bert_pretraining.kernels.reference import IGNORED
from bert_pretraining.kernels.reference import attention as reference_attention

NAME = "torch"
GROSS = 0.05  # of the largest number: an error far beyond the rounding of 16-bit numbers


def attention_for(device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[Callable, str]:
    """The attention function for a device, dtype and head size, and why it was chosen.

    On a GPU each candidate is run on two small sequences, forward and backward, because what works
    depends on the build of PyTorch as much as on the GPU's compute capability.
    """
    if device.type == "cpu":
        return cpu_attention, "padded for small sequences, else one by one"
    refusals = []
    for name, attention in (
        ("flash", flash_attention),
        ("memory-efficient", efficient_attention),
        ("padded", padded_attention),
    ):
        try:
            try_attention(attention, device, dtype, head_size)
        except (RuntimeError, NotImplementedError) as error:
            refusals.append(f"{name} refused: {str(error).splitlines()[0][:80]}")
            continue
        return attention, "; ".join([name, *refusals])
    raise UserError(f"no attention runs on {device}: {'; '.join(refusals)}", "use --device cpu")


def try_attention(
    attention: Callable, device: torch.device, dtype: torch.dtype, head_size: int
) -> None:
    """Run attention forward and backward on two small sequences; its errors pass through.

    Raises RuntimeError too where a result is grossly wrong or not finite, so that the next variant
    is tried; `proof.py` looks closer. Nothing is drawn from the CPU's generator.
    """
    generator = torch.Generator().manual_seed(1)
    exact = torch.randn(16, 3, 2, head_size, generator=generator).to(dtype).double()
    direction = torch.randn(16, 2, head_size, generator=generator).to(dtype).double()
    ours = exact.to(device, dtype).requires_grad_()
    exact.requires_grad_()
    ends = torch.tensor([0, 5, 16], dtype=torch.int32)
    attention(ours, ends.to(device), 11, 0.1).sum().backward()
    ours.grad = None
    context = attention(ours, ends.to(device), 11, 0.0)
    context.backward(direction.to(device, dtype))
    expected = reference_attention(exact, ends, 11, 0.0)
    expected.backward(direction)
    for found, right in ((context, expected), (ours.grad, exact.grad)):
        difference = (found.detach().cpu().double() - right.detach()).abs().max()
        if not difference <= GROSS * right.detach().abs().max():  # NaN is not
            raise RuntimeError("its results are wrong")


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def bias_dropout_residual_layer_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    dropout: float,
) -> Tensor:
    summed = dropout_add(x, bias, residual, dropout)
    return _layer_norm(summed, weight, norm_bias, epsilon)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """F.layer_norm, which computes in float32 internally for 16-bit input.

    Not so on a CPU: there it adds up the gradients of weight and bias in 16 bits, one row after
    the other. With 4,096 rows they are off by a quarter.
    """
    if x.device.type == "cpu" and x.dtype.itemsize == 2:
        wide = F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), epsilon)
        return wide.to(x.dtype)
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def embedding_layer_norm_dropout(
    input_ids: Tensor,
    position_ids: Tensor,
    segment_ids: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    segment_table: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    dropout: float,
) -> Tensor:
    embedded = F.embedding(input_ids, word_table) + F.embedding(position_ids, position_table)
    embedded = embedded + F.embedding(segment_ids, segment_table)
    return fast_dropout(_layer_norm(embedded, weight, norm_bias, epsilon), dropout)


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    loss_sum = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return loss_sum, (logits.argmax(dim=1) == labels).sum()


def find(operator: str, target: Target) -> Implementation:
    """The operator; for attention, the first variant that runs on the target. See `Provider`."""
    if operator != "attention":
        return Implementation(globals()[operator], NAME)
    function, why = attention_for(target.device, target.dtype, target.head_size)
    pairs = {flash_attention: FLASH, efficient_attention: EFFICIENT}
    return Implementation(function, f"{NAME} ({why})", pairs.get(function))


PROVIDER = Provider(NAME, OPERATORS, find)
