"""The arithmetic that a batch asks of the model."""

from __future__ import annotations

from typing import NamedTuple

from bert_pretraining.model.bert_config import BertConfig


class Amount(NamedTuple):
    """What decides the arithmetic of some batches.

    tokens: real ones, without padding. token_pairs: the sum of the squares of the sequences'
    lengths, since every token attends to every token of its sequence. masked: masked tokens.
    """

    tokens: int
    token_pairs: int
    masked: int

    def __add__(self, other: Amount) -> Amount:
        return Amount(*(one + two for one, two in zip(self, other, strict=True)))


NOTHING = Amount(0, 0, 0)


def step_flops(amount: Amount, config: BertConfig) -> float:
    """Floating-point operations that forward and backward over these tokens need.

    Only matrix products count, with a multiplication and an addition each. With the hidden
    size H, the intermediate size I, the length L and the vocabulary V, each layer needs
    8 H^2 + 4 H I for a token and 4 L^2 H for a sequence (attention), and the MLM head needs
    2 H^2 + 2 H V for a masked token. Backward needs twice as many as forward. What activation
    checkpointing computes a second time does not count.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    projections = 2 * hidden * (4 * hidden + 2 * inner) * amount.tokens
    attention = 4 * hidden * amount.token_pairs
    head = amount.masked * 2 * hidden * (hidden + config.padded_vocab_size)
    return 3.0 * (config.num_hidden_layers * (projections + attention) + head)
