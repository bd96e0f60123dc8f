"""What a model that knows nothing but the commonest token would score on the evaluation set."""

from __future__ import annotations

import torch

from bert_pretraining.data.loader import EvaluationSet
from bert_pretraining.logs.sinks import EvaluationSetFacts
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime import process_group
from bert_pretraining.runtime.process_group import Ranks


def commonest_token(
    evaluation_set: EvaluationSet, vocab_size: int, ranks: Ranks
) -> EvaluationSetFacts:
    """Count the masked tokens of all ranks' batches, which are still in main memory.

    The same on every rank. Without any masked token, the share is 0.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for _, batch in evaluation_set.batches:
        counts += torch.bincount(batch.masked_labels, minlength=vocab_size)
    # A floating-point number of this type holds these counts exactly.
    counts = counts.to(ranks.device, devices.wide(ranks.device))
    counts = process_group.sum_over_ranks(counts).cpu()
    total, commonest = int(counts.sum()), int(counts.argmax())
    return EvaluationSetFacts(total, commonest, float(counts[commonest]) / max(total, 1))
