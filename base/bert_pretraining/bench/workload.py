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


def step_flops(lengths: np.ndarray, num_masked: int, config: BertConfig) -> float:
    """Floating-point operations that forward and backward over real tokens need.

    Only matrix products count, with a multiplication and an addition each. With the hidden
    size H, the intermediate size 4 H, the length L and the vocabulary V, each layer needs
    24 H^2 for a token and 4 L^2 H for a sequence (attention), and the MLM head needs
    2 H^2 + 2 H V for a masked token. Backward needs twice as many as forward.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    projections = 2 * hidden * (4 * hidden + 2 * inner) * int(lengths.sum())
    attention = 4 * hidden * int((lengths.astype(np.int64) ** 2).sum())
    head = num_masked * 2 * hidden * (hidden + config.padded_vocab_size)
    return 3.0 * (config.num_hidden_layers * (projections + attention) + head)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product; the best of 7."""
    rows, inner, columns = (2048, 1024, 4096) if device.type == "cpu" else (12288, 4096, 4096)
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(inner, columns, device=device).to(dtype)
    return 2.0 * rows * inner * columns / best_of_7(lambda: left @ right, device)


def best_of_7(call: Callable[[], object], device: torch.device) -> float:
    """The shortest of 7 measurements of a call, in seconds."""
    watch = Stopwatch(call, device)
    for _ in range(7):
        watch.repeat()
    return min(watch.times.seconds)
