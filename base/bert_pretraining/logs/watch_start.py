"""Faults that the accuracy of the start weights shows.

Two start checkpoints are known by name, with the accuracy that they have on their evaluation set:

- MLPerf's model.ckpt-28252: 0.3409 on MLPerf's 10,000 sequences (mlcommons/training_results_v2.0,
  issue 8, prints 0.340857 for weights that were never updated).
- The packaged one of the mini data set: 0.3405 on its 1,114 sequences.

Precision and the way of averaging move such an accuracy by less than 0.01. The band is twice that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.config import Config
from bert_pretraining.logs.sinks import EvaluationFigures, EvaluationSetFacts, RunOutline

IMPOSSIBLE_LOSS = 20.0  # nats; guessing evenly among 250,000 tokens has 13
# Of fewer masked tokens the share of the commonest says little: of a single one it is 1.
MIN_MASKED_TOKENS = 1000
START_NAME = "model.ckpt-28252"  # the beginning of the file names of both checkpoints


@dataclass(frozen=True)
class KnownStart:
    """A start checkpoint whose accuracy on its evaluation set is known.

    layers, hidden_size: of its model. sequences: of the evaluation set. masked_tokens: of that
    set; None where the number is not known. lowest, highest: the band of the accuracy.
    """

    whose: str
    layers: int
    hidden_size: int
    sequences: int
    masked_tokens: int | None
    lowest: float
    highest: float


MLPERF_START = KnownStart("MLPerf's", 24, 1024, 10_000, None, 0.32, 0.36)
MINI_START = KnownStart("the mini data set's", 2, 64, 1114, 9422, 0.32, 0.36)


def starts_anew(config: Config) -> bool:
    """Whether what gives the accuracy may be random: all of the model, or its heads."""
    return config.init_checkpoint == "random" or config.missing_weights == "random"


def known_start(
    config: Config, outline: RunOutline | None, facts: EvaluationSetFacts, sequences: int
) -> KnownStart | None:
    """Which known checkpoint a run starts from, on its own evaluation set; None for another.

    A log does not say what is in the files, so all of this must agree: the checkpoint's file name,
    the model's size, and the evaluation set's size.
    """
    # Without --init_checkpoint it is the file of that name in data_dir.
    has_name = Path(config.init_checkpoint or START_NAME).name.startswith(START_NAME)
    if outline is None or starts_anew(config) or not has_name:
        return None
    size = (outline.layers, outline.hidden_size, sequences)
    for known in (MLPERF_START, MINI_START):
        if size == (known.layers, known.hidden_size, known.sequences) and (
            known.masked_tokens in (None, facts.masked_tokens)
        ):
            return known
    return None


def faults_of_start(
    config: Config,
    outline: RunOutline | None,
    facts: EvaluationSetFacts,
    evaluation: EvaluationFigures,
) -> Iterator[tuple[str, str]]:
    """The kind and a line for each fault; of several that one number shows, the first."""
    accuracy, loss = evaluation.mlm_accuracy, evaluation.loss
    known = known_start(config, outline, facts, evaluation.num_sequences)
    knows_less = accuracy < facts.commonest_share and facts.masked_tokens >= MIN_MASKED_TOKENS
    if accuracy >= config.target_mlm_accuracy:
        yield (
            "target_met_at_start",
            f"the start checkpoint already meets the target ({accuracy:.4f} >= "
            f"{config.target_mlm_accuracy:g}): stopping after one step; to train on, pass a "
            "higher --target_mlm_accuracy",
        )
    elif not starts_anew(config) and (knows_less or loss > IMPOSSIBLE_LOSS):
        yield (
            "start_weights_useless",
            f"the start checkpoint's MLM accuracy is {accuracy:.4f} (loss {loss:.4g}); always "
            f"guessing the commonest token has {facts.commonest_share:.4f}: its weights are "
            "likely damaged, or of another vocabulary or model; look at it with 'python -m "
            "bert_pretraining checkpoint inspect', and use the vocab.txt and bert_config.json that "
            "it was trained with",
        )
    elif known is not None and not known.lowest <= accuracy <= known.highest:
        yield (
            "start_accuracy_unusual",
            f"the start checkpoint's MLM accuracy is {accuracy:.4f} (loss {loss:.4g}); "
            f"{known.whose} {START_NAME} has {known.lowest:g} to {known.highest:g} on "
            f"{known.whose} {known.sequences:,} evaluation sequences: the weights, the vocabulary "
            "or the evaluation set are likely others; look at the checkpoint with 'python -m "
            "bert_pretraining checkpoint inspect', and at the data with 'python -m "
            "bert_pretraining data verify'",
        )
