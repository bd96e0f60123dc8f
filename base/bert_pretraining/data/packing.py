"""Shards' rows -> `PackedBatch`es, on the host and on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from bert_pretraining.data.flat_shard import FlatShard, ragged_arange
from bert_pretraining.model.batch import PackedBatch


def pack(
    shards: Sequence[FlatShard],
    shard_of: np.ndarray,
    rows: np.ndarray,
    batch_size: int,
    pin_memory: bool = False,
) -> list[PackedBatch]:
    """Pack chosen sequences, in the order given, into batches of batch_size.

    Several batches at once, because small arrays cost NumPy calls rather than copying. The
    batches are views of common arrays.

    Args:
        shards: where the sequences lie.
        shard_of, rows: (N,) integers, N at least 1: sequence n is row rows[n] of
            shards[shard_of[n]].
        batch_size: sequences a batch; the last batch gets what remains.
        pin_memory: page-locked memory, for copies that do not block (needs a CUDA device).
    """
    lengths, starts, masked_counts, masked_starts, next_sentence = _gather(shards, shard_of, rows)
    first_rows = np.arange(0, len(rows), batch_size)
    num_sequences = np.diff(first_rows, append=len(rows))
    num_tokens = np.add.reduceat(lengths, first_rows)
    num_masked = np.add.reduceat(masked_counts, first_rows)
    # Where each sequence starts in the common arrays, and in its batch.
    token_starts = np.cumsum(lengths) - lengths
    starts_in_batch = token_starts - np.repeat(token_starts[first_rows], num_sequences)
    ends_of_batch = np.cumsum(num_sequences)
    position_ids = np.arange(token_starts[-1] + lengths[-1], dtype=np.int32)
    position_ids -= np.repeat(token_starts.astype(np.int32), lengths)
    tokens = np.repeat(starts, lengths)
    tokens += position_ids
    masked = ragged_arange(masked_starts, masked_counts)

    def take(name: str, index: np.ndarray, counts: np.ndarray, dtype: type) -> np.ndarray:
        if len(shards) == 1:
            return getattr(shards[0], name).take(index).astype(dtype)
        taken, source = np.empty(len(index), dtype=dtype), np.repeat(shard_of, counts)
        for which, shard in enumerate(shards):
            here = np.flatnonzero(source == which)
            taken[here] = getattr(shard, name).take(index[here])
        return taken

    masked_positions = take("masked_positions", masked, masked_counts, np.int32)
    masked_positions += np.repeat(starts_in_batch.astype(np.int32), masked_counts)
    # 32-bit integers where they do: half the memory to touch here and to copy to a device.
    common = {
        "input_ids": (take("input_ids", tokens, lengths, np.int32), num_tokens),
        "segment_ids": (take("segment_ids", tokens, lengths, np.int32), num_tokens),
        "position_ids": (position_ids, num_tokens),
        "cu_seqlens": (
            np.insert(starts_in_batch, ends_of_batch, num_tokens).astype(np.int32),
            num_sequences + 1,
        ),
        "masked_positions": (masked_positions, num_masked),
        "masked_labels": (take("masked_labels", masked, masked_counts, np.int64), num_masked),
        "next_sentence_labels": (next_sentence, num_sequences),
    }
    parts = []
    for array, sizes in common.values():
        tensor = torch.from_numpy(array)
        parts.append((tensor.pin_memory() if pin_memory else tensor).split(sizes.tolist()))
    longest = np.maximum.reduceat(lengths, first_rows).tolist()
    return [
        PackedBatch(**dict(zip(common, tensors, strict=True)), max_seqlen=max_seqlen)
        for *tensors, max_seqlen in zip(*parts, longest, strict=True)
    ]


def pack_rows(shard: FlatShard, rows: np.ndarray) -> PackedBatch:
    """One batch of these rows of one shard."""
    (batch,) = pack([shard], np.zeros(len(rows), dtype=np.int64), rows, len(rows))
    return batch


def _gather(
    shards: Sequence[FlatShard], shard_of: np.ndarray, rows: np.ndarray
) -> list[np.ndarray]:
    """What is known of each sequence, (N,) int64: lengths and starts, of tokens and masks."""
    names = ("lengths", "offsets", "masked_counts", "masked_offsets", "next_sentence_labels")
    if len(shards) == 1:
        return [getattr(shards[0], name)[rows].astype(np.int64) for name in names]
    gathered = [np.empty(len(rows), dtype=np.int64) for _ in names]
    for index, shard in enumerate(shards):
        places = np.flatnonzero(shard_of == index)
        for values, name in zip(gathered, names, strict=True):
            values[places] = getattr(shard, name)[rows[places]]
    return gathered


def on_device(batches: Iterator[PackedBatch], device: torch.device) -> Iterator[PackedBatch]:
    """The same batches on `device`.

    On a CUDA device each is copied on a stream of its own while the one before it is worked
    on; the batches should lie in pinned memory.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copying = torch.cuda.Stream(device)
    ahead: tuple[PackedBatch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            copied = batch.to(device), copying.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = copied
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(batch: PackedBatch, copied: torch.cuda.Event) -> PackedBatch:
    working = torch.cuda.current_stream(batch.input_ids.device)
    working.wait_event(copied)
    for tensor in batch.tensors().values():
        # Its memory must not be given away while the working stream may still read it.
        tensor.record_stream(working)
    return batch
