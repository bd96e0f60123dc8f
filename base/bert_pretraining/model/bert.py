"""BERT over packed tokens: embeddings, encoder, pooler.

Modules have the names of the published checkpoints, so that `state_dict()` is in the apex format:
`bert.embeddings...`, `bert.encoder.layer.N.attention.self.query...`, `cls....`.

Modules with a product of matrices have an attribute `scaling`: None, or the scales with which they
compute in fp8. `Fp8State.of` sets those of the encoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bert_pretraining.kernels import Kernels
from bert_pretraining.kernels.fp8 import Scaling
from bert_pretraining.kernels.fp8_linear import linear
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.layer_form import PLAIN, LayerForm


class LayerNormParameters(nn.Module):
    """Weight and bias of a LayerNorm that a fused operator applies."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))


class Embeddings(nn.Module):
    """Word + position + segment embeddings, LayerNorm, dropout."""

    def __init__(self, config: BertConfig, kernels: Kernels) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, hidden)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = LayerNormParameters(hidden)
        self.epsilon = config.layer_norm_epsilon
        self.dropout = config.hidden_dropout_prob
        self.kernels = kernels

    def forward(self, batch: PackedBatch) -> Tensor:
        """Returns (T, hidden)."""
        return self.kernels.embedding_layer_norm_dropout(
            batch.input_ids,
            batch.position_ids,
            batch.segment_ids,
            self.word_embeddings.weight,
            self.position_embeddings.weight,
            self.token_type_embeddings.weight,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.epsilon,
            self.dropout if self.training else 0.0,
        )


class SelfAttention(nn.Module):
    """Query, key and value projections (one matrix product), then attention."""

    def __init__(self, config: BertConfig, kernels: Kernels) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.kernels = kernels
        self.scaling: Scaling | None = None

    def groups(self) -> tuple[tuple[nn.Parameter, ...], ...]:
        """The weights of query, key and value, and their biases.

        They are separate parameters, because LAMB has one trust ratio per published tensor.
        """
        parts = (self.query, self.key, self.value)
        return tuple(part.weight for part in parts), tuple(part.bias for part in parts)

    def forward(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """hidden: (T, hidden). Returns (T, hidden)."""
        weight, bias = map(torch.cat, self.groups())
        qkv = linear(hidden, weight, bias, self.scaling)
        qkv = qkv.view(hidden.shape[0], 3, self.num_heads, -1)
        dropout = self.dropout if self.training else 0.0
        context = self.kernels.attention(qkv, batch.cu_seqlens, batch.max_seqlen, dropout)
        return context.reshape(hidden.shape)


class ResidualOutput(nn.Module):
    """Projection, then bias + dropout + residual + LayerNorm in one operator."""

    def __init__(self, in_features: int, config: BertConfig, kernels: Kernels) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = LayerNormParameters(config.hidden_size)
        self.epsilon = config.layer_norm_epsilon
        self.dropout = config.hidden_dropout_prob
        self.kernels = kernels
        self.scaling: Scaling | None = None

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x: (T, in_features); residual: (T, hidden). Returns (T, hidden)."""
        return self.kernels.bias_dropout_residual_layer_norm(
            linear(x, self.dense.weight, None, self.scaling),
            self.dense.bias,
            residual,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.epsilon,
            self.dropout if self.training else 0.0,
        )


class Attention(nn.Module):
    def __init__(self, config: BertConfig, kernels: Kernels) -> None:
        super().__init__()
        self.self = SelfAttention(config, kernels)
        self.output = ResidualOutput(config.hidden_size, config, kernels)

    def forward(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        return self.output(self.self(hidden, batch), hidden)


class DenseGelu(nn.Module):
    """Projection and GELU. Checkpoints call the projection `dense`."""

    def __init__(self, in_features: int, out_features: int, kernels: Kernels) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, out_features)
        self.kernels = kernels
        self.scaling: Scaling | None = None

    def forward(self, x: Tensor) -> Tensor:
        projected = linear(x, self.dense.weight, None, self.scaling)
        return self.kernels.bias_gelu(projected, self.dense.bias)


class Layer(nn.Module):
    """One encoder layer: attention, then the feed-forward network."""

    def __init__(self, config: BertConfig, kernels: Kernels) -> None:
        super().__init__()
        self.attention = Attention(config, kernels)
        self.intermediate = DenseGelu(config.hidden_size, config.intermediate_size, kernels)
        self.output = ResidualOutput(config.intermediate_size, config, kernels)

    @property
    def has_dropout(self) -> bool:
        """Whether anything is dropped in training."""
        return self.attention.self.dropout > 0 or self.output.dropout > 0

    def forward(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        hidden = self.attention(hidden, batch)
        return self.output(self.intermediate(hidden), hidden)


class Encoder(nn.Module):
    """All layers. With `checkpoint_activations`, the backward pass recomputes each layer."""

    def __init__(self, config: BertConfig, kernels: Kernels, checkpoint_activations: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, kernels) for _ in range(config.num_hidden_layers))
        self.checkpoint_activations = checkpoint_activations

    def forward(self, hidden: Tensor, batch: PackedBatch, form: LayerForm) -> Tensor:
        recompute = self.checkpoint_activations and self.training
        for layer in form.layers(self.layer, batch, apart=recompute):
            if recompute:
                hidden = checkpoint(layer, hidden, batch, use_reentrant=False)
            else:
                hidden = layer(hidden, batch)
        return hidden


class Pooler(nn.Module):
    """tanh(projection) of each sequence's first token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """hidden: (T, hidden). Returns (B, hidden)."""
        # An empty sequence at the end, which only pads a batch, has no first token. It gets the
        # last token, to stay within bounds.
        first_tokens = batch.cu_seqlens[:-1].clamp(max=hidden.shape[0] - 1)
        return torch.tanh(self.dense(hidden.index_select(0, first_tokens)))


class Bert(nn.Module):
    """Embeddings and encoder, and a pooler if a head needs it.

    forward returns the hidden state of every token; `pooler` computes one vector per sequence from
    these. `form` is how its parts run; see `layer_form.py`.
    """

    def __init__(
        self, config: BertConfig, kernels: Kernels, checkpoint_activations: bool, with_pooler: bool
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, kernels)
        self.encoder = Encoder(config, kernels, checkpoint_activations)
        if with_pooler:
            self.pooler = Pooler(config)
        self.form: LayerForm = PLAIN

    def forward(self, batch: PackedBatch) -> Tensor:
        """Returns (T, hidden)."""
        embedded = self.form.call(_embed, self.embeddings, batch)
        return self.encoder(embedded, batch, self.form)


def _embed(embeddings: Embeddings, batch: PackedBatch) -> Tensor:
    return embeddings(batch)
