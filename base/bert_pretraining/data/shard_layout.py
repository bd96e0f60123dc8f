"""Which datasets of an HDF5 file hold a shard, in this package's names or Hugging Face's.

`find_layout` looks at names, dtypes and shapes; `read_padded` reads the arrays of a fixed-length
shard in this package's names and shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from bert_pretraining.data.hdf5 import AGAIN, dataset
from bert_pretraining.errors import UserError
from bert_pretraining.runtime.file_kind import shown

# dataset -> dtype in a fixed-length shard
SCHEMA = {
    "input_ids": "i2",
    "input_mask": "i1",
    "segment_ids": "i1",
    "masked_lm_positions": "i2",
    "masked_lm_ids": "i2",
    "next_sentence_labels": "i1",
}
LABELS = "next_sentence_labels"
VARLENGTH_DATASETS = ("input_ids", "segment_ids", "masked_lm_positions", "masked_lm_ids")
PREDICTIONS = ("masked_lm_positions", "masked_lm_ids")
# Hugging Face's names. Its (N, S) labels say the answer of each token, -100 where nothing is asked.
HUGGING_FACE = {
    "input_mask": ("attention_mask",),
    "segment_ids": ("token_type_ids",),
    LABELS: ("next_sentence_label",),
}
TOKEN_LABELS = ("labels", "masked_lm_labels")
IGNORED = (-1, -100)  # PyTorch's and Hugging Face's labels of tokens that are not asked
MOST_LABELLED = 0.5  # of a sequence's tokens; BERT masks 15%


@dataclass(frozen=True)
class Layout:
    """Where a file keeps what.

    sources: this package's name -> the dataset's name in the file. token_labels: Hugging Face's
    dataset of labels, which takes the place of PREDICTIONS; None in other files.
    max_seq_length: None for a variable-length shard. notices: what was read in another form than
    this package's own, for people.
    """

    sources: dict[str, str]
    token_labels: str | None
    num_sequences: int
    max_seq_length: int | None
    notices: list[str] = field(default_factory=list)


def find_layout(file: h5py.File, path: Path) -> Layout:
    """The layout of an open file. Raises UserError that names the dataset at fault."""
    ids = dataset(file, "input_ids", path)
    varlength = h5py.check_vlen_dtype(ids.dtype) is not None
    needed = [key for key in SCHEMA if key != "input_mask" or not varlength]
    sources, token_labels = _sources(file, needed, path)
    found = {key: dataset(file, name, path) for key, name in sources.items()}
    if token_labels:
        found["labels"] = dataset(file, token_labels, path)
    notices = []
    if token_labels:
        named = [f"'{name}' as {key}" for key, name in sources.items() if name != key]
        notices.append(f"Hugging Face's names: reading {', '.join(named)}, '{token_labels}' as "
                       "the masked tokens")  # fmt: skip
    shapes = {}
    for key, data in found.items():
        name = sources.get(key, token_labels)
        in_rows = varlength and key != LABELS
        if (h5py.check_vlen_dtype(data.dtype) is not None) is not in_rows:
            form = ("rows of one length", "rows of their own length")
            raise UserError(
                f"{shown(path)}: '{name}' holds {form[not in_rows]}, 'input_ids' {form[varlength]}",
                AGAIN,
            )
        dimensions = 1 if varlength or key == LABELS else 2
        shapes[key] = _without_ones(data.shape, dimensions)
        if len(shapes[key]) != dimensions:
            expected = "(sequences,)" if dimensions == 1 else "(sequences, tokens)"
            raise UserError(
                f"{shown(path)}: '{name}' has shape {data.shape}, expected {expected}", AGAIN
            )
        if shapes[key] != data.shape:
            notices.append(
                f"'{name}' has {len(data.shape)} dimensions, read as {dimensions} without those of "
                "length 1"
            )
    _require_fit(shapes, path)
    length = None if varlength else shapes["input_ids"][1]
    return Layout(sources, token_labels, shapes["input_ids"][0], length, notices)


def _sources(file: h5py.File, needed: list[str], path: Path) -> tuple[dict[str, str], str | None]:
    """The name of each dataset in the file, and that of Hugging Face's labels."""
    if all(key in file for key in needed):
        return {key: key for key in needed}, None
    others = {
        key: next(name for name in names if name in file)
        for key, names in HUGGING_FACE.items()
        if key in needed and key not in file and any(name in file for name in names)
    }
    labels = next((name for name in TOKEN_LABELS if name in file), None)
    missing = [key for key in needed if key not in file and key not in others]
    if labels and missing and set(missing) <= set(PREDICTIONS):
        return {key: others.get(key, key) for key in needed if key not in PREDICTIONS}, labels
    if others and not missing:
        # Half of the names are this package's and half are not: what else differs is unknown.
        raise _half_renamed(path, others)
    first = next(key for key in needed if key not in file)
    hint = f", but '{others[first]}'" if first in others else ""
    if not hint and (others or labels) and first in HUGGING_FACE:
        hint = f" or '{HUGGING_FACE[first][0]}'"
    raise UserError(
        f"{shown(path)}: no dataset '{first}'{hint} (has: {', '.join(sorted(file)) or 'nothing'})",
        AGAIN,
    )


def _half_renamed(path: Path, others: dict[str, str]) -> UserError:
    """The error for a file with this package's predictions under Hugging Face's other names."""
    first = next(iter(others))
    rest = [f"'{name}' for '{key}'" for key, name in list(others.items())[1:]]
    also = f", and {', '.join(rest)}" if rest else ""
    pairs = str({name: key for key, name in others.items()})
    return UserError(
        f"{shown(path)}: no dataset '{first}', but '{others[first]}', Hugging Face's name for it"
        f"{also}",
        "rename them in every shard: python -c \"import h5py, sys; [h5py.File(path, 'r+')"
        f'.move(*pair) for path in sys.argv[1:] for pair in {pairs}.items()]" '
        f"{shown(path.parent)}/*{path.suffix}",
    )


def _without_ones(shape: tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    """The shape with dimensions of one element left out behind the first, while it has too many:
    (N, 1, S) -> (N, S)."""
    kept = list(shape)
    while len(kept) > dimensions and 1 in kept[1:]:
        kept.pop(kept.index(1, 1))
    return tuple(kept)


def _require_fit(shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raise UserError where the datasets have other numbers of rows or columns than they should."""
    for key, shape in shapes.items():
        like = "input_ids"
        if shape[0] == shapes[like][0]:
            if key == "masked_lm_positions":
                like = "masked_lm_ids"
            if len(shape) == 1 or key == "masked_lm_ids" or shape[1:] == shapes[like][1:]:
                continue
        raise UserError(
            f"{shown(path)}: '{key}' has shape {shape}, but '{like}' has {shapes[like]}", AGAIN
        )


def read_padded(file: h5py.File, layout: Layout, path: Path) -> dict[str, np.ndarray]:
    """The arrays of a fixed-length shard, named and shaped as in SCHEMA, of the file's dtypes.

    Predictions that are padded with -1 or -100 are padded with 0 here.
    """
    arrays = {}
    for key, name in layout.sources.items():
        values = file[name][()]
        dimensions = 1 if key == LABELS else 2
        arrays[key] = values.reshape(_without_ones(values.shape, dimensions))
        if values.dtype.kind == "b":
            arrays[key] = arrays[key].astype(np.int8)
    if layout.token_labels:
        labels = file[layout.token_labels][()]
        arrays.update(_predictions(labels.reshape(_without_ones(labels.shape, 2)), arrays, path))
    ids, positions = arrays["masked_lm_ids"], arrays["masked_lm_positions"]
    if ids.size and min(ids.min(), positions.min()) < 0:
        ignored = np.isin(ids, IGNORED)
        arrays["masked_lm_ids"] = np.where(ignored, 0, ids)
        unused = ignored | ((ids == 0) & np.isin(positions, IGNORED))
        arrays["masked_lm_positions"] = np.where(unused, 0, positions)
    return {key: arrays[key] for key in SCHEMA}


def _predictions(
    labels: np.ndarray, arrays: dict[str, np.ndarray], path: Path
) -> dict[str, np.ndarray]:
    """PREDICTIONS, (N, P) each, from labels of each token, (N, S)."""
    asked = (labels > 0) & (arrays["input_mask"] != 0)
    wrong = labels[(labels < 0) & ~np.isin(labels, IGNORED)]
    if wrong.size:
        raise UserError(
            f"{shown(path)}: labels has the value {wrong[0]}, which is neither a token nor -100",
            AGAIN,
        )
    tokens = np.count_nonzero(arrays["input_mask"])
    if asked.sum() > MOST_LABELLED * tokens:
        raise UserError(
            f"{shown(path)}: labels has an answer for {asked.sum()} of {tokens} tokens, expected "
            "about 15%, and -100 for the others",
            AGAIN,
        )
    counts = np.count_nonzero(asked, axis=1)
    shape = (len(labels), max(1, counts.max(initial=0)))
    kept = np.arange(shape[1]) < counts[:, None]
    ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    ids[kept], positions[kept] = labels[asked], np.nonzero(asked)[1]
    return {"masked_lm_positions": positions, "masked_lm_ids": ids}
