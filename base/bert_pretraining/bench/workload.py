"""What the measurements share: batches like the real ones, and the work of a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bert_pretraining.bench.timing import Stopwatch
from bert_pretraining.data.flat_shard import FlatShard, flatten
from bert_pretraining.data.packing import pack_rows
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.bert_config import BertConfig

BERT_LARGE = BertConfig(30522, 1024, 24, 16, 4096, 512)
MASKED_SHARE = 0.15


def wikipedia_lengths(batch_size: int) -> np.ndarray:
    """Lengths of the MLPerf training set at equally spaced quantiles, in random order.

    Quantiles give even a small batch the mean of the data set (255.8 tokens).
    """
    table = Path(__file__).with_name("wikipedia_lengths.json")
    counts = np.array(json.loads(table.read_text(encoding="utf-8"))["counts"], dtype=float)
    share = np.cumsum(counts) / counts.sum()
    lengths = 1 + np.searchsorted(share, (np.arange(batch_size) + 0.5) / batch_size)
    return np.random.RandomState(0).permutation(lengths)


def padded_arrays(lengths: np.ndarray, config: BertConfig) -> dict[str, np.ndarray]:
    """Random sequences of these lengths as in a shard; 15% of the tokens masked."""
    random = np.random.RandomState(1)
    count, longest = len(lengths), config.max_position_embeddings
    mask = np.arange(longest) < lengths[:, None]
    labelled = np.zeros((count, max(1, int(longest * MASKED_SHARE))), dtype=bool)
    positions = np.zeros(labelled.shape, dtype=np.int64)
    for row, length in enumerate(lengths):
        wanted = min(labelled.shape[1], max(1, round(length * MASKED_SHARE)))
        positions[row, :wanted] = np.sort(random.permutation(length)[:wanted])
        labelled[row, :wanted] = True
    return {
        "input_ids": random.randint(5, config.vocab_size, (count, longest)) * mask,
        "input_mask": mask.astype("i1"),
        "segment_ids": ((np.arange(longest) >= lengths[:, None] // 2) & mask).astype("i1"),
        "masked_lm_positions": positions,
        "masked_lm_ids": random.randint(1, config.vocab_size, labelled.shape) * labelled,
        "next_sentence_labels": random.randint(0, 2, count),
    }


def shard_of(lengths: np.ndarray, config: BertConfig) -> FlatShard:
    return flatten(padded_arrays(lengths, config), config.vocab_size, "benchmark")


def batch_of(lengths: np.ndarray, config: BertConfig) -> PackedBatch:
    return pack_rows(shard_of(lengths, config), np.arange(len(lengths)))


def best_of_7(call: Callable[[], object], device: torch.device) -> float:
    """The shortest of 7 measurements of a call, in seconds."""
    watch = Stopwatch(call, device)
    for _ in range(7):
        watch.repeat()
    return min(watch.times.seconds)
