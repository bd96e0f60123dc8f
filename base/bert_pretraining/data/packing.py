"""Packing rows of shards into `PackedBatch`es, and copying these to the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from bert_pretraining.data.flat_shard import FlatShard, ragged_arange
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.runtime import device as devices


def pack(
    shards: Sequence[FlatShard],
    shard_of: np.ndarray,
    rows: np.ndarray,
    batch_size: int,
    pin_for: torch.device | None = None,
) -> list[PackedBatch]:
    """Pack the chosen sequences, in the given order, into batches of batch_size.

    Several batches are packed at once, because NumPy calls on small arrays cost more than
    the copying. The batches are views of common arrays.

    Args:
        shards: the shards with the sequences.
        shard_of, rows: (N,) integers, N at least 1: sequence n is row rows[n] of
            shards[shard_of[n]].
        batch_size: sequences of each batch; the last batch may have fewer.
        pin_for: the device to which the batches are copied later. They are then in page-locked
            memory where it has such, so that copies do not block.
    """
    lengths, starts, masked_counts, masked_starts, next_sentence = _gather(shards, shard_of, rows)
    first_rows = np.arange(0, len(rows), batch_size)
    num_sequences = np.diff(first_rows, append=len(rows))
    num_tokens = np.add.reduceat(lengths, first_rows)
    num_masked = np.add.reduceat(masked_counts, first_rows)
    # The start of each sequence in the common arrays, and in its batch.
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
    # 32-bit integers where they suffice: half the memory to write here and to copy to a device.
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
        if pin_for is not None:
            tensor = devices.pinned(tensor, pin_for)
        parts.append(tensor.split(sizes.tolist()))
    longest = np.maximum.reduceat(lengths, first_rows).tolist()
    pairs = np.add.reduceat(lengths * lengths, first_rows).tolist()
    return [
        PackedBatch(**dict(zip(common, tensors, strict=True)), max_seqlen=most, token_pairs=squares)
        for *tensors, most, squares in zip(*parts, longest, pairs, strict=True)
    ]


def pack_rows(shard: FlatShard, rows: np.ndarray) -> PackedBatch:
    """One batch of these rows of one shard."""
    (batch,) = pack([shard], np.zeros(len(rows), dtype=np.int64), rows, len(rows))
    return batch


def _gather(
    shards: Sequence[FlatShard], shard_of: np.ndarray, rows: np.ndarray
) -> list[np.ndarray]:
    """For each sequence, (N,) int64 each: length and start of its tokens, number and start of
    its masked tokens, next-sentence label."""
    names = ("lengths", "offsets", "masked_counts", "masked_offsets", "next_sentence_labels")
    if len(shards) == 1:
        return [getattr(shards[0], name)[rows].astype(np.int64) for name in names]
    gathered = [np.empty(len(rows), dtype=np.int64) for _ in names]
    for index, shard in enumerate(shards):
        here = np.flatnonzero(shard_of == index)
        for values, name in zip(gathered, names, strict=True):
            values[here] = getattr(shard, name)[rows[here]]
    return gathered


def on_device(batches: Iterator[PackedBatch], device: torch.device) -> Iterator[PackedBatch]:
    """The same batches on `device`.

    On a device with streams, a stream of its own copies each batch while the step works on the
    batch before. The batches should be in pinned memory.
    """
    with_streams = devices.streams(device)
    if with_streams is None:
        yield from (batch.to(device, devices.can_pin(device)) for batch in batches)
        return
    copy_stream = with_streams.Stream(device)
    ahead: tuple[PackedBatch, torch.Event] | None = None
    for batch in batches:
        with with_streams.stream(copy_stream):
            copied = batch.to(device, devices.can_pin(device)), copy_stream.record_event()
        if ahead is not None:
            yield _arrived(*ahead, with_streams.current_stream(device))
        ahead = copied
    if ahead is not None:
        yield _arrived(*ahead, with_streams.current_stream(device))


def _arrived(batch: PackedBatch, copied: torch.Event, compute_stream: torch.Stream) -> PackedBatch:
    compute_stream.wait_event(copied)
    for tensor in batch.tensors().values():
        # The allocator must not reuse its memory while the compute stream may still read it.
        tensor.record_stream(compute_stream)
    return batch
