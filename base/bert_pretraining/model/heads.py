"""The MLM and NSP heads, and BERT with its heads, which computes the losses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_pretraining.kernels import Kernels
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.bert import Bert, DenseGelu, LayerNormParameters
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.layer_form import LayerForm
from bert_pretraining.model.losses import OBJECTIVES, LossSum


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
    """The word embedding under the second name that it has in checkpoints."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class MaskedLanguageModelHead(nn.Module):
    """Vocabulary logits of the masked tokens; the decoder's weight is the word embedding."""

    def __init__(self, config: BertConfig, kernels: Kernels, word_embedding: nn.Parameter) -> None:
        super().__init__()
        self.transform = Transform(config, kernels)
        self.decoder = Decoder(word_embedding)
        self.bias = nn.Parameter(torch.zeros(config.padded_vocab_size))

    def forward(self, masked_hidden: Tensor) -> Tensor:
        """masked_hidden: (M, hidden). Returns (M, padded vocabulary)."""
        return F.linear(self.transform(masked_hidden), self.decoder.weight, self.bias)


class Heads(nn.Module):
    """`predictions` (MLM) and, if that loss is trained, `seq_relationship` (NSP)."""

    def __init__(
        self,
        config: BertConfig,
        kernels: Kernels,
        word_embedding: nn.Parameter,
        losses: Sequence[str],
    ) -> None:
        super().__init__()
        self.predictions = MaskedLanguageModelHead(config, kernels, word_embedding)
        if "nsp" in losses:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)


class BertForPreTraining(nn.Module):
    """BERT with its heads; returns sums of losses by name.

    Args:
        config: the model's sizes.
        kernels: the operators to run.
        seed: of the random initial weights, N(0, initializer_range); biases are 0.
        checkpoint_activations: keep only each layer's input for the backward pass.
        losses: names of the losses to train with: "mlm", with or without "nsp". Without "nsp"
            the model has neither a pooler nor `cls.seq_relationship`.
    """

    def __init__(
        self,
        config: BertConfig,
        kernels: Kernels,
        seed: int,
        checkpoint_activations: bool = False,
        losses: Sequence[str] = OBJECTIVES["mlm_nsp"],
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.losses = tuple(losses)
        self.bert = Bert(config, kernels, checkpoint_activations, with_pooler="nsp" in losses)
        self.cls = Heads(config, kernels, self.bert.embeddings.word_embeddings.weight, losses)
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.data.normal_(0.0, self.config.initializer_range, generator=generator)
            if isinstance(module, nn.Linear):
                module.bias.data.zero_()
        # Rows beyond the vocabulary are padding and belong to no token.
        self.bert.embeddings.word_embeddings.weight.data[self.config.vocab_size :] = 0.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BertForPreTraining:
        """What `to` and the like call; the decoder keeps the word embedding's weight.

        On a type of device that an extension package brings, nn.Module makes new parameters, and
        one parameter in two places would become two.
        """
        super()._apply(fn, recurse)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
        return self

    @contextlib.contextmanager
    def layers_as(self, form: LayerForm) -> Iterator[None]:
        """Run the model's parts in this form meanwhile."""
        before, self.bert.form = self.bert.form, form
        try:
            yield
        finally:
            self.bert.form = before

    def parameters_in_memory_order(self) -> list[tuple[str, nn.Parameter]]:
        """The named parameters, as `named_parameters` gives them, but in another order.

        The weights of value, key and query follow each other, and so do their biases. An optimizer
        that lays out memory from the last parameter to the first puts query, key and value side
        by side.
        """
        names = {parameter: name for name, parameter in self.named_parameters()}
        groups = {
            group[0]: group[::-1]
            for layer in self.bert.encoder.layer
            for group in layer.attention.self.groups()
        }
        inside = {parameter for group in groups.values() for parameter in group[:-1]}
        ordered = []
        for parameter in names:
            if parameter in groups:
                ordered += groups[parameter]
            elif parameter not in inside:
                ordered.append(parameter)
        return [(names[parameter], parameter) for parameter in ordered]

    def forward(self, batch: PackedBatch) -> dict[str, LossSum]:
        """Each loss by name, summed over the batch, in the order of `losses`."""
        hidden = self.bert(batch)
        return self.bert.form.call(BertForPreTraining.losses_of, self, hidden, batch)

    def losses_of(self, hidden: Tensor, batch: PackedBatch) -> dict[str, LossSum]:
        """What `forward` returns, from the hidden state of every token, (T, hidden)."""
        pooled = self.bert.pooler(hidden, batch) if "nsp" in self.losses else None
        logits = self.cls.predictions(hidden.index_select(0, batch.masked_positions))
        sums = {"mlm": LossSum(*self.kernels.masked_cross_entropy(logits, batch.masked_labels))}
        if pooled is not None:
            logits, labels = self.cls.seq_relationship(pooled), batch.next_sentence_labels
            sums["nsp"] = LossSum(*self.kernels.masked_cross_entropy(logits, labels))
        return sums
