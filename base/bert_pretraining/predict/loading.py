"""From a checkpoint of any known kind, and the files near it, to a model that can be asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from bert_pretraining.checkpoint import Checkpoint, beside, copy_weights, read_checkpoint
from bert_pretraining.checkpoint.names import WORD_EMBEDDING
from bert_pretraining.checkpoint.plausibility import suspicions
from bert_pretraining.checkpoint.structure import (
    MASKED_TOKEN_HEAD,
    NEXT_SENTENCE_HEAD,
    absent_heads,
)
from bert_pretraining.errors import UserError
from bert_pretraining.kernels import select
from bert_pretraining.model.bert_config import BERT_CONFIG_NAME, BertConfig, padded_rows
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.losses import OBJECTIVES
from bert_pretraining.predict.predictor import Predictor
from bert_pretraining.preparation.vocabulary import Vocabulary
from bert_pretraining.runtime import arithmetic
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.words import counted

FIX = "name a checkpoint (see predict --help)"


@dataclass(frozen=True)
class Sources:
    """Where a model comes from.

    bert_config, vocabulary: None for the files that `checkpoint/beside.py` finds. lower_case:
    whether texts are lower-cased; None for what the vocabulary's words tell.
    """

    checkpoint: Path
    bert_config: Path | None = None
    vocabulary: Path | None = None
    lower_case: bool | None = None


def load(sources: Sources, device_name: str, say: Callable[[str], None]) -> Predictor:
    """The model in float32 on a device, as --device names it; `say` is told what is odd.

    Raises UserError for a file that is missing, damaged, or of another model than the others.
    """
    chosen = devices.choose(device_name, local_rank=0)
    for notice in chosen.notices:
        say(notice)
    checkpoint = read_checkpoint(sources.checkpoint, FIX)
    bert_config = sources.bert_config or beside.find_bert_config(sources.checkpoint)
    if bert_config is None:
        raise UserError(
            f"{sources.checkpoint}: no {BERT_CONFIG_NAME} beside it, and the weights do not show "
            "the number of attention heads",
            f"pass --bert_config FILE{beside.data_set_elsewhere(sources.checkpoint)}",
        )
    config = BertConfig.load(bert_config)
    if beside.differs_in_gelu(bert_config, config):
        say(f"{bert_config}: {beside.ERF_NOTE}")
    vocabulary = _vocabulary(sources, bert_config, config, say)
    model = _model(checkpoint, config, chosen.device, say)
    rows = len(checkpoint.weights[WORD_EMBEDDING])
    return Predictor(model, vocabulary, chosen.device, rows)


class _WithoutRandomNumbers(TorchFunctionMode):
    """Parameters keep whatever their memory holds: drawing BERT-large's numbers takes seconds."""

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        if getattr(function, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


def _vocabulary(
    sources: Sources, bert_config: Path, config: BertConfig, say: Callable[[str], None]
) -> Vocabulary:
    path = sources.vocabulary or beside.find_vocabulary(sources.checkpoint, bert_config)
    if path is None:
        raise UserError(
            f"no {beside.VOCABULARY_NAME} beside {sources.checkpoint} or {bert_config}",
            f"pass --vocab FILE{beside.data_set_elsewhere(sources.checkpoint)}",
        )
    vocabulary = Vocabulary.load(path, lower_case=sources.lower_case is not False)
    if sources.lower_case is None and vocabulary.is_cased:
        say(f"{path} has words in capitals, so the text is not lower-cased")
        vocabulary = Vocabulary.load(path, lower_case=False)
    size, wanted = len(vocabulary), config.vocab_size
    if size != wanted and padded_rows(size) != wanted:
        raise UserError(
            f"{path} has {size:,} word pieces, but the model has {wanted:,} ({bert_config})",
            "pass the --vocab with which the checkpoint was trained",
        )
    return vocabulary


def _model(
    checkpoint: Checkpoint, config: BertConfig, device: torch.device, say: Callable[[str], None]
) -> BertForPreTraining:
    """The checkpoint's model, with the next-sentence head if the checkpoint has it."""
    absent = absent_heads(checkpoint.weights)
    if any(head in MASKED_TOKEN_HEAD for head in absent):
        raise UserError(
            f"{checkpoint.path} lacks the head that predicts words "
            f"({'*, '.join(MASKED_TOKEN_HEAD)}*), as BertModel alone or a classifier does",
            "pass a checkpoint of BertForPreTraining or BertForMaskedLM",
        )
    judges_pairs = not any(head in NEXT_SENTENCE_HEAD for head in absent)
    # PyTorch's own operators need neither a compiler nor a proof, and one text is little work.
    kernels = select("torch", device, torch.float32, config.head_size)
    with _WithoutRandomNumbers():
        model = BertForPreTraining(
            config, kernels, seed=0, losses=OBJECTIVES["mlm_nsp" if judges_pairs else "mlm"]
        )
    model.to(device)
    loaded = copy_weights(model, checkpoint, missing="random")  # leaves heads of other tasks out
    if loaded.anew:
        raise UserError(
            f"{checkpoint.path} lacks {counted(len(loaded.anew), 'tensor')} of its heads "
            f"({', '.join(loaded.anew[:3])}{', ...' if loaded.anew[3:] else ''})",
            "pass a whole checkpoint of BertForPreTraining or BertForMaskedLM",
        )
    for notice in suspicions(loaded.weights):
        say(f"{checkpoint.path}: {notice}")
    arithmetic.set_tf32(device, allowed=False)
    return model
