"""The kernels of a run: by declaration, or proven at the sizes of the run's batches."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bert_pretraining.config import Config
from bert_pretraining.kernels import Kernels, Target, select
from bert_pretraining.kernels.proof_problem import Sizes, lengths_of
from bert_pretraining.kernels.proven import select_proven
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.training.static_batch import MEAN_TOKENS

MASKED_SHARE = 0.15  # of the tokens


def choose_kernels(
    config: Config,
    bert_config: BertConfig,
    dtype: torch.dtype,
    device: torch.device,
    say: Callable[[str], None],
) -> Kernels:
    """Choose the operators as the settings ask, and say which; on every rank at once.

    UserError for a provider that cannot run, or that was asked for by name and is wrong.
    """
    named = config.kernels_by_operator
    if config.proves_kernels_on(device.type):
        target = Target(device, dtype, bert_config.head_size)
        again = config.prove_kernels == "on"
        sizes = batch_sizes(config, bert_config)
        started = time.perf_counter()
        kernels, notices = select_proven(
            config.kernels, target, sizes, named, again, by_time=not config.deterministic
        )
        for notice in notices:
            say(f"Notice: {notice}")
        say(f"Kernels proven in {time.perf_counter() - started:.1f} s")
    else:
        kernels = select(config.kernels, device, dtype, bert_config.head_size, named)
    say(f"Kernels: {kernels.describe()}")
    return kernels


def batch_sizes(config: Config, bert_config: BertConfig) -> Sizes:
    """The sizes of the run's usual batch; no sequence has been read yet.

    The lengths are such as in the MLPerf data set: its mean, and one sequence of each extreme.
    """
    sequences, longest = config.train_batch_size, bert_config.max_position_embeddings
    tokens = config.static_tokens or round(sequences * MEAN_TOKENS)
    lengths = lengths_of(sequences, longest, min(tokens, sequences * longest))
    return Sizes(
        lengths=lengths,
        masked=max(1, round(MASKED_SHARE * sum(lengths))),
        heads=bert_config.num_attention_heads,
        head_size=bert_config.head_size,
        inner=bert_config.intermediate_size,
        vocabulary=bert_config.padded_vocab_size,
        positions=bert_config.max_position_embeddings,
        segments=bert_config.type_vocab_size,
        epsilon=bert_config.layer_norm_epsilon,
        dropout=bert_config.hidden_dropout_prob,
    )
