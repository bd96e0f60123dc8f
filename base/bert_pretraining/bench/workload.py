"""What the measurements share: batches like the real ones, their work, timing, progress."""

from __future__ import annotations

import ctypes
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bert_pretraining.data.flat_shard import FlatShard, flatten
from bert_pretraining.data.packing import pack_rows
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.runtime import device as devices

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
    seconds = [timed(lambda: left @ right, device) for _ in range(7)]
    return 2.0 * rows * inner * columns / min(seconds)


def announce(text: str) -> None:
    """Say on stderr what a measurement does now, because it may take minutes."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, including its work on the device."""
    devices.synchronize(device)
    started = time.perf_counter()
    call()
    devices.synchronize(device)
    return time.perf_counter() - started


def alternate(
    candidates: dict[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each call, the candidates in turn, so that a noisy machine disturbs all alike."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(warm_up + repeats):
        for name, call in candidates.items():
            if repeat < warm_up:
                announce(f"{name}: warming up")
            else:
                announce(f"{name}: repeat {repeat - warm_up + 1} of {repeats}")
            seconds = timed(call, device)
            if repeat >= warm_up:
                times[name].append(seconds)
    return times


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """The most MiB that a call needs beyond those in use before it; 0 where nothing tells it."""
    if device.type != "cpu":
        devices.reset_peak_memory(device)
        before = devices.memory(device).in_use or 0
        timed(call, device)
        return max(0, (devices.memory(device).peak or 0) - before) / 2**20
    try:
        # The C library keeps memory that was freed, which would hide what the call needs.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak in /proc/self/status
        before = _status_kib("VmRSS")
        call()
        return (_status_kib("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        call()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")
