"""The part of `data verify` that reads and checks one file, in blocks of rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from bert_pretraining.data.hdf5 import open_hdf5
from bert_pretraining.data.shard_layout import (
    LABELS,
    SCHEMA,
    VARLENGTH_DATASETS,
    find_layout,
    read_padded,
)
from bert_pretraining.errors import UserError
from bert_pretraining.model.bert_config import BERT_CONFIG_NAME
from bert_pretraining.preparation import verify_report as report
from bert_pretraining.preparation.verify_report import FIX, FileSummary
from bert_pretraining.runtime.file_kind import shown
from bert_pretraining.runtime.words import SINGULAR, counted

FIT_CONFIG = "use data and a bert_config.json that fit together"
BLOCK_ROWS = 2048  # a block's arrays stay in the processor's cache


@dataclass(frozen=True)
class Task:
    """One file to check.

    name: the folder's and the file's, for messages. eval_hashes: (K,) uint64 text hashes to look
    for in a training file; None for an evaluation file. max_positions, vocab_size: None where they
    are not known.
    """

    path: Path
    name: str
    vocab_size: int | None
    max_positions: int | None
    eval_hashes: np.ndarray | None = None
    wants_md5: bool = False


@dataclass(frozen=True)
class _Block:
    """Sequences without padding, none empty, as in `shards.FlatShard`.

    rows: (N,) their row numbers in the file.
    """

    rows: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray
    segments: np.ndarray
    counts: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


class _Faults(dict[str, tuple[int, int]]):
    """For each fault, the number of sequences that have it, and the row of the first one."""

    def add(self, fault: str, rows: np.ndarray) -> None:
        """Count these rows, which ascend. A row that comes several times counts once."""
        if len(rows):
            count, first = self.get(fault, (0, int(rows[0])))
            self[fault] = (count + len(np.unique(rows)), first)


def check_file(task: Task) -> FileSummary:
    """Read and check one file. Its faults are the problems of the summary."""
    summary = FileSummary(task.name, is_eval=task.eval_hashes is None)
    try:
        arrays = _read(task.path, summary)
    except UserError as error:
        problem = error.problem.replace(shown(task.path), task.name)
        summary.problems.append(("unreadable file", f"{problem}; {error.fix}"))
        return summary
    if not len(arrays[LABELS]):
        summary.problems.append(("no sequences", f"{task.name}: no sequences; {FIX}"))
        return summary
    faults = _Faults()
    _summarize(summary, arrays, task, faults)
    for fault, (count, first) in faults.items():
        verb, _, rest = fault.partition(" ")
        words = f"{SINGULAR[verb] if count == 1 else verb} {rest}"
        fix = FIT_CONFIG if BERT_CONFIG_NAME in fault else FIX
        line = f"{task.name}: {counted(count, 'sequence')} {words} (the first: row {first}); {fix}"
        summary.problems.append((fault, line))
    return summary


def _read(path: Path, summary: FileSummary) -> dict[str, np.ndarray]:
    """The arrays of a shard of either form, of the dtypes of SCHEMA where the values allow it.

    UserError where training cannot read the file.
    """
    with open_hdf5(path) as file:
        layout = find_layout(file, path)
        summary.forms += layout.notices
        if layout.max_seq_length is not None:
            arrays = read_padded(file, layout, path)
        else:
            arrays = {key: file[name][()] for key, name in layout.sources.items()}
            rows = {key: h5py.check_vlen_dtype(file[key].dtype) for key in VARLENGTH_DATASETS}
            wider = [key for key, dtype in rows.items() if dtype != np.dtype(SCHEMA[key])]
            summary.forms += [f"'{key}' holds rows of {rows[key]}" for key in wider]
            for key in wider:
                arrays[key][:] = [_narrow(row, key) for row in arrays[key]]
    for key, array in arrays.items():
        if array.dtype.kind != "O" and array.dtype != np.dtype(SCHEMA[key]):
            summary.forms.append(f"'{key}' is {array.dtype}, not {np.dtype(SCHEMA[key])}")
            arrays[key] = _narrow(array, key)
    return arrays


def _narrow(array: np.ndarray, key: str) -> np.ndarray:
    """The array in its dtype of SCHEMA; token ids that do not fit in 16 bits stay int32.

    A value beyond its dtype becomes the nearest one in it, which is as wrong as the value was.
    """
    dtype = np.dtype(SCHEMA[key])
    limits = np.iinfo(dtype)
    if dtype.itemsize > 1 and array.size and array.max() > limits.max:
        dtype, limits = np.dtype(np.int32), np.iinfo(np.int32)
    return np.clip(array, limits.min, limits.max).astype(dtype)


def _summarize(
    summary: FileSummary, arrays: dict[str, np.ndarray], task: Task, faults: _Faults
) -> None:
    """Fill in the summary from the arrays of a file, block by block."""
    varlength = arrays["input_ids"].ndim == 1
    summary.readable = True
    summary.num_sequences = len(arrays[LABELS])
    summary.next_sentence_ones = int(np.count_nonzero(arrays[LABELS] == 1))
    summary.max_seq_length = None if varlength else arrays["input_ids"].shape[1]
    hashes, text_hashes, lengths, row_md5s = [], [], [], []
    for start in range(0, summary.num_sequences, BLOCK_ROWS):
        part = {key: array[start : start + BLOCK_ROWS] for key, array in arrays.items()}
        rows = np.arange(start, start + len(part[LABELS]))
        faults.add(f"have a {LABELS} that is not 0 or 1", rows[part[LABELS].view("u1") > 1])
        block = (_varlength_block if varlength else _fixed_block)(part, rows, faults)
        if not len(block.rows):
            continue
        ends = np.cumsum(block.lengths)
        if summary.special_tokens is None:
            outer = (block.ids[ends - block.lengths], block.ids[ends - 1])
            cls, sep = (Counter(ids.tolist()).most_common(1)[0][0] for ids in outer)
            summary.special_tokens = (cls, sep)
        _check_block(block, ends, task, summary.special_tokens, faults)
        whole, text = _hashes(block, ends)
        hashes.append(whole)
        text_hashes.append(text)
        lengths.append(block.lengths)
        summary.num_masked += len(block.labels)
        summary.num_unmasked += _count_unmasked(block, ends)
        if task.wants_md5:
            row_md5s += report.row_md5s(block.ids, ends)
    if not summary.num_masked:
        summary.problems.append(("no masked tokens", f"{summary.name}: no masked tokens; {FIX}"))
    if not hashes:
        return
    summary.length_counts = np.bincount(np.concatenate(lengths))
    summary.hashes = np.concatenate(hashes)
    summary.digest = hashlib.blake2b(summary.hashes.tobytes()).digest()
    text = np.concatenate(text_hashes)
    summary.text_hashes = text if summary.is_eval else text[np.isin(text, task.eval_hashes)]
    if task.wants_md5:
        summary.md5 = report.md5_of(row_md5s)
        summary.row_md5s = row_md5s if summary.is_eval else []


def _fixed_block(part: dict[str, np.ndarray], rows: np.ndarray, faults: _Faults) -> _Block:
    """Remove the padding of rows. Faults of the padding are counted."""

    def add(fault: str, bad: np.ndarray) -> None:
        if bad.any():
            faults.add(fault, rows[bad.any(axis=1)])

    mask, labels = part["input_mask"], part["masked_lm_ids"] != 0
    inside = mask != 0
    add("have an input_mask with other values than 0 and 1", mask.view("u1") > 1)
    add("have an input_mask that is not ones followed by zeros", inside[:, 1:] > inside[:, :-1])
    add("have tokens behind their input_mask", (part["input_ids"] != 0) & ~inside)
    add("have a label behind a padded one", labels[:, 1:] > labels[:, :-1])
    add("have other masked positions than labels", labels != (part["masked_lm_positions"] != 0))
    lengths = np.count_nonzero(inside, axis=1)
    faults.add("have no tokens", rows[lengths == 0])
    kept = lengths > 0
    inside, labels = inside & kept[:, None], labels & kept[:, None]
    return _Block(
        rows=rows[kept],
        lengths=lengths[kept],
        ids=part["input_ids"][inside],
        segments=part["segment_ids"][inside],
        counts=np.count_nonzero(labels, axis=1)[kept],
        positions=part["masked_lm_positions"][labels],
        labels=part["masked_lm_ids"][labels],
    )


def _varlength_block(part: dict[str, np.ndarray], rows: np.ndarray, faults: _Faults) -> _Block:
    """Concatenate rows. Rows whose datasets differ in length are counted and left out."""
    sizes = {
        key: np.fromiter(map(len, part[key]), np.int64, len(rows)) for key in VARLENGTH_DATASETS
    }
    lengths, counts = sizes["input_ids"], sizes["masked_lm_ids"]
    unequal = lengths != sizes["segment_ids"]
    disagree = counts != sizes["masked_lm_positions"]
    faults.add("have other numbers of tokens and segment_ids", rows[unequal])
    faults.add("have other masked positions than labels", rows[disagree])
    faults.add("have no tokens", rows[lengths == 0])
    kept = ~unequal & ~disagree & (lengths > 0)
    flat = {
        key: np.concatenate([np.empty(0, SCHEMA[key]), *part[key][kept]])
        for key in VARLENGTH_DATASETS
    }
    return _Block(
        rows=rows[kept],
        lengths=lengths[kept],
        ids=flat["input_ids"],
        segments=flat["segment_ids"],
        counts=counts[kept],
        positions=flat["masked_lm_positions"],
        labels=flat["masked_lm_ids"],
    )


def _check_block(
    block: _Block, ends: np.ndarray, task: Task, special_tokens: tuple[int, int], faults: _Faults
) -> None:
    """Count the faults of tokens, segments and predictions."""
    rows, ids, labels, positions = block.rows, block.ids, block.labels, block.positions
    mask_ends = np.cumsum(block.counts)

    def add(fault: str, bad: np.ndarray, run_ends: np.ndarray) -> None:
        faults.add(fault, rows[np.searchsorted(run_ends, np.flatnonzero(bad), "right")])

    if task.vocab_size is not None:
        for what, values, run_ends in (("token", ids, ends), ("label", labels, mask_ends)):
            fault = f"have a {what} outside the vocabulary of {BERT_CONFIG_NAME}"
            add(fault, (values < 0) | (values >= task.vocab_size), run_ends)
    if task.max_positions is not None:
        longer = block.lengths > task.max_positions
        faults.add(f"are longer than max_position_embeddings of {BERT_CONFIG_NAME}", rows[longer])
    cls, sep = special_tokens
    faults.add(f"do not begin with token {cls}, as most do", rows[ids[ends - block.lengths] != cls])
    faults.add(f"do not end with token {sep}, as most do", rows[ids[ends - 1] != sep])
    add("have a segment_id that is not 0 or 1", block.segments.view("u1") > 1, ends)
    special = (labels == 0) | (labels == cls) | (labels == sep)
    add("have a label that is padding, [CLS] or [SEP]", special, mask_ends)
    outside = (positions < 1) | (positions >= np.repeat(block.lengths, block.counts))
    add("have a masked position outside their words", outside, mask_ends)
    falls = np.diff(positions, prepend=np.int16(-1)) <= 0
    falls[(mask_ends - block.counts)[block.counts > 0]] = False  # the first of each sequence
    add("have masked positions that do not ascend", falls, mask_ends)


def _count_unmasked(block: _Block, ends: np.ndarray) -> int:
    """How many masked tokens stand in input_ids as they are; BERT leaves one in ten."""
    last = np.repeat(block.lengths - 1, block.counts)
    starts = np.repeat(ends - block.lengths, block.counts)
    inside = starts + np.clip(block.positions, 0, last)
    return int(np.count_nonzero(block.ids[inside] == block.labels))


def _random_bits(count: int, salt: int) -> np.ndarray:
    """(count,) pseudo-random uint64, the same on every machine (splitmix64)."""
    bits = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(salt << 32)
    bits *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))


def _low_bits(ids: np.ndarray) -> np.ndarray:
    """The low 16 bits of token ids, as indices."""
    return ids.view("u2") if ids.dtype == np.int16 else ids & 0xFFFF


TOKEN_BITS = _random_bits(2**16, 1)  # one for each 16-bit token id
# Odd numbers, because a product with an odd number loses no bit.
POSITION_BITS = _random_bits(2**16, 2) | np.uint64(1)
LABEL_FACTOR = np.uint64(0xD6E8FEB86659FD93)


def _hashes(block: _Block, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two hashes of each sequence, (N,) uint64.

    The first is of its tokens, masks and labels, the second of its tokens before masking.
    """
    starts = ends - block.lengths
    positions_of_tokens = np.arange(ends[-1]) - np.repeat(starts, block.lengths)
    tokens = TOKEN_BITS[_low_bits(block.ids)] * POSITION_BITS[positions_of_tokens & 0xFFFF]
    masked = np.add.reduceat(tokens, starts)
    # A wrong position must not point into another sequence.
    last = np.repeat(block.lengths - 1, block.counts)
    positions = np.clip(block.positions, 0, last)
    labels = TOKEN_BITS[_low_bits(block.labels)] * POSITION_BITS[positions & 0xFFFF]
    hidden = tokens[np.repeat(starts, block.counts) + positions]
    labels_sum, hidden_sum = (_sums(values, block.counts) for values in (labels, hidden))
    return masked + labels_sum * LABEL_FACTOR, masked + labels_sum - hidden_sum


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums of runs of `counts` values each, modulo 2^64; a run may be empty."""
    totals = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values)])
    ends = np.cumsum(counts)
    return totals[ends] - totals[ends - counts]
