"""The definition of every operator in readable PyTorch, for any dtype, float64 included.

The tests compare every other provider with these functions.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_pretraining.kernels.provider import OPERATORS, Provider, find_in

IGNORED = -1  # the label of rows that only pad a batch to a fixed size; the loss skips them


def attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float) -> Tensor:
    """Multi-head self-attention inside each sequence: softmax(Q K' / sqrt(D)) V.

    qkv: (T, 3, heads, D); cu_seqlens: (B + 1,) int32; dropout: the probability of zeroing an
    attention weight (the others are scaled by 1 / (1 - dropout)).
    Returns (T, heads, D); tokens after the last sequence give zeros.
    """
    contexts = []
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        query, key, value = qkv[start:end].permute(1, 2, 0, 3)
        scores = query @ key.transpose(-1, -2) / math.sqrt(qkv.shape[-1])
        weights = _dropped(softmax(scores), dropout)
        contexts.append((weights @ value).transpose(0, 1))
    contexts.append(torch.zeros_like(qkv[bounds[-1] :, 0]))
    return torch.cat(contexts)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, in at least float32."""
    return torch.softmax(scores, dim=-1, dtype=_at_least_float32(scores)).to(scores.dtype)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias) in its tanh approximation (Hendrycks and Gimpel 2016, section 2).

    x: (..., C); bias: (C,).
    """
    x = x + bias
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias, in at least float32.

    x: (..., C); weight, bias: (C,).
    """
    wide = x.to(_at_least_float32(x))
    centred = wide - wide.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return (centred / torch.sqrt(variance + epsilon) * weight + bias).to(x.dtype)


def bias_dropout_residual_layer_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    dropout: float,
) -> Tensor:
    """LayerNorm(residual + dropout(x + bias)).

    x, residual: (T, C); bias, weight, norm_bias: (C,).
    """
    return layer_norm(residual + _dropped(x + bias, dropout), weight, norm_bias, epsilon)


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
    """dropout(LayerNorm(word + position + segment embedding)).

    ids: (T,) int32 or int64; tables: (entries, C); weight, norm_bias: (C,). Returns (T, C).
    """
    embedded = word_table[input_ids] + position_table[position_ids] + segment_table[segment_ids]
    return _dropped(layer_norm(embedded, weight, norm_bias, epsilon), dropout)


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(logits)[label], and the number of labels that have the highest logit.

    logits: (M, V); labels: (M,) int64, IGNORED for rows to skip. Returns two scalars, the first
    at least float32, the second int64; both are 0 for M = 0.
    """
    counts = labels != IGNORED
    wide = logits[counts].to(_at_least_float32(logits))
    labels = labels[counts]
    chosen = wide.gather(1, labels[:, None])[:, 0]
    loss_sum = (torch.logsumexp(wide, dim=1) - chosen).sum()
    return loss_sum, (wide.argmax(dim=1) == labels).sum()


def _dropped(x: Tensor, dropout: float) -> Tensor:
    # Not `training=dropout > 0`: where torch.compile makes the number a symbol, F.dropout refuses.
    return F.dropout(x, dropout) if dropout else x


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


PROVIDER = Provider("reference", OPERATORS, find_in("reference", globals()))
