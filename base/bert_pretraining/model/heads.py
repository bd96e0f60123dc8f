"""The MLM and NSP heads, the loss and the accuracy."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_pretraining.kernels import Kernels
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.bert import Bert, DenseGelu, LayerNormParameters
from bert_pretraining.model.bert_config import BertConfig


class PretrainingSums(NamedTuple):
    """Sums over a batch, so that any average over batches and ranks can be formed.

    mlm_loss, next_sentence_loss: float32 scalars, nats. mlm_correct: int64 scalar.
    """

    mlm_loss: Tensor
    mlm_correct: Tensor
    next_sentence_loss: Tensor


class Transform(DenseGelu):
    """Projection, GELU and LayerNorm of the masked tokens."""

    def __init__(self, config: BertConfig, kernels: Kernels) -> None:
        super().__init__(config.hidden_size, config.hidden_size, kernels)
        self.LayerNorm = LayerNormParameters(config.hidden_size)
        self.epsilon = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """x: (M, hidden). Returns (M, hidden)."""
        norm = self.LayerNorm
        return F.layer_norm(
            super().forward(x), norm.weight.shape, norm.weight, norm.bias, self.epsilon
        )


class Decoder(nn.Module):
    """Holds the word embedding a second time, as the checkpoints name it."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class MaskedLanguageModelHead(nn.Module):
    """Vocabulary logits of the masked tokens; the decoder is the word embedding."""

    def __init__(self, config: BertConfig, kernels: Kernels, word_embedding: nn.Parameter) -> None:
        super().__init__()
        self.transform = Transform(config, kernels)
        self.decoder = Decoder(word_embedding)
        self.bias = nn.Parameter(torch.zeros(config.padded_vocab_size))

    def forward(self, masked_hidden: Tensor) -> Tensor:
        """masked_hidden: (M, hidden). Returns (M, padded vocabulary)."""
        return F.linear(self.transform(masked_hidden), self.decoder.weight, self.bias)


class Heads(nn.Module):
    """`predictions` (MLM) and `seq_relationship` (NSP)."""

    def __init__(self, config: BertConfig, kernels: Kernels, word_embedding: nn.Parameter) -> None:
        super().__init__()
        self.predictions = MaskedLanguageModelHead(config, kernels, word_embedding)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class BertForPreTraining(nn.Module):
    """BERT with both heads; returns sums of losses.

    Args:
        config: the model's sizes.
        kernels: the operators to run.
        seed: of the random initial weights, N(0, initializer_range); biases are 0.
        checkpoint_activations: keep only each layer's input for the backward pass.
    """

    def __init__(
        self,
        config: BertConfig,
        kernels: Kernels,
        seed: int,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.bert = Bert(config, kernels, checkpoint_activations)
        self.cls = Heads(config, kernels, self.bert.embeddings.word_embeddings.weight)
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.data.normal_(0.0, self.config.initializer_range, generator=generator)
            if isinstance(module, nn.Linear):
                module.bias.data.zero_()
        # Rows beyond the vocabulary belong to no token.
        self.bert.embeddings.word_embeddings.weight.data[self.config.vocab_size :] = 0.0

    def forward(self, batch: PackedBatch) -> PretrainingSums:
        hidden, pooled = self.bert(batch)
        logits = self.cls.predictions(hidden[batch.masked_positions])
        mlm_loss, mlm_correct = self.kernels.masked_cross_entropy(logits, batch.masked_labels)
        next_sentence_loss, _ = self.kernels.masked_cross_entropy(
            self.cls.seq_relationship(pooled), batch.next_sentence_labels
        )
        return PretrainingSums(mlm_loss, mlm_correct, next_sentence_loss)
