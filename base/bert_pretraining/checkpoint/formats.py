"""Reading the weights of a checkpoint of any known kind, with the names of the apex layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bert_pretraining.checkpoint import hugging_face, names
from bert_pretraining.checkpoint.fitting import fit
from bert_pretraining.checkpoint.structure import NEXT_SENTENCE_HEAD, tie_output_bias
from bert_pretraining.checkpoint.tensor_bundle import TensorBundle
from bert_pretraining.checkpoint.torch_file import read_torch_file
from bert_pretraining.errors import UserError
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.runtime.files import OTHER_CHECKPOINT, checkpoint_kind, weight_file_kind

# Keys that hold the weights, or a dictionary with such a key.
WEIGHT_KEYS = (
    "model", "state_dict", "model_state_dict", "module", "net", "network", "model_state", "weights",
    "params", "model_weights", "app", "checkpoint",
)  # fmt: skip
OPTIMIZER_STATE = "optimizer state"
OTHER_HEADS = "tensors that the model lacks"
SHOWN = 6  # names in a line
DEEPEST = 5  # dictionaries within each other, around the weights


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    weights: tensors with the names of the apex layout, memory-mapped if the format allows it.
    left_out: what is not read; the key says what it is, the value is its names in the file.
    optimizer, state: of a training checkpoint; both are None for weights alone.
    step: the number of updates, None where the checkpoint does not store it.
    anew: what the model has beyond the checkpoint, where `load_weights` was allowed to leave it at
    random numbers.
    """

    path: Path
    format: str
    weights: dict[str, Tensor]
    left_out: dict[str, tuple[str, ...]]
    step: int | None = None
    optimizer: dict | None = None
    state: dict | None = None
    anew: tuple[str, ...] = ()

    @property
    def has_optimizer_state(self) -> bool:
        """Whether the checkpoint has the state of an optimizer, read or left out."""
        return bool(self.optimizer) or OPTIMIZER_STATE in self.left_out

    def summary(self) -> str:
        """One line: the format, the step, what was left out."""
        parts = [self.format]
        if self.step is not None:
            parts.append(f"step {self.step}")
        for what, those in self.left_out.items():
            named = f": {', '.join(those[:SHOWN])}" if what == OTHER_HEADS else ""
            more = ", ..." if named and those[SHOWN:] else ""
            parts.append(f"left out: {what} ({len(those)}{named}{more})")
        if self.anew:
            parts.append(f"not in it, so random: {', '.join(self.anew)}")
        return "; ".join(parts)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of any checkpoint that `read_checkpoint` reads, with the apex names."""
    return read_checkpoint(path).weights


def read_checkpoint(path: Path, fix: str = OTHER_CHECKPOINT) -> Checkpoint:
    """Read a PyTorch file, a Hugging Face directory or a TensorFlow 1 checkpoint.

    `fix` tells the user what to pass instead, where `path` holds no checkpoint.
    Raises UserError of one line for a missing, damaged, unsafe or foreign file.
    """
    readers = {
        "torch": _read_torch,
        "safetensors": _read_safetensors,
        "hugging_face": _read_hugging_face,
        "tensorflow": _read_tensorflow,
    }
    kind = checkpoint_kind(path, fix)
    if kind in ("torch", "safetensors"):
        kind = weight_file_kind(path)
    return readers[kind](path, fix)


def load_weights(
    model: BertForPreTraining, path: Path, missing: Literal["refuse", "random"] = "refuse"
) -> Checkpoint:
    """Read a checkpoint and copy its weights; errors as of `read_checkpoint`, `copy_weights`."""
    return copy_weights(model, read_checkpoint(path), missing)


def copy_weights(
    model: BertForPreTraining,
    checkpoint: Checkpoint,
    missing: Literal["refuse", "random"] = "refuse",
) -> Checkpoint:
    """Copy a checkpoint's weights into `model`, on any device.

    Padding rows of the vocabulary become 0 where the checkpoint has none. The next-sentence head
    is left out where the model has none. With `missing` "random", tensors of the heads that the
    checkpoint lacks keep the model's random numbers, and heads of other tasks are left out.
    Nothing is copied unless everything fits. Returns the checkpoint, for its `summary()`.
    Raises UserError that lists every missing or unexpected tensor, and every wrong shape; also
    for NaN and infinities.
    """
    if "nsp" not in model.losses:
        checkpoint = _without_next_sentence_head(checkpoint)
    own = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    fitting = fit(
        checkpoint.path,
        checkpoint.weights,
        shapes,
        model.config.vocab_size,
        heads_anew=missing == "random",
    )
    with torch.no_grad():
        for name, value in fitting.weights.items():
            if name == names.DECODER:
                continue  # in the model it is the word embedding
            own[name][: len(value)].copy_(value)
            own[name][len(value) :] = 0.0
    left_out = checkpoint.left_out
    if fitting.ignored:
        left_out = {**left_out, OTHER_HEADS: fitting.ignored}
    return replace(checkpoint, left_out=left_out, anew=fitting.anew)


def _without_next_sentence_head(checkpoint: Checkpoint) -> Checkpoint:
    head = [name for name in checkpoint.weights if name.startswith(NEXT_SENTENCE_HEAD)]
    if not head:
        return checkpoint
    kept = {name: value for name, value in checkpoint.weights.items() if name not in head}
    left_out = {**checkpoint.left_out, "next-sentence head": tuple(head)}
    return replace(checkpoint, weights=kept, left_out=left_out)


def _read_torch(path: Path, fix: str) -> Checkpoint:
    content = read_torch_file(path)
    keys, holder, found = _find_weights(content)
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors or not _are_named_tensors(tensors):
        raise UserError(
            f"{path}: holds no named tensors, bare or under a 'model' key{_what_is_there(content)}",
            f"export the model's state_dict() alone, or {fix}",
        )
    weights, unusual, left_out = _renamed(path, tensors)
    others = tuple(str(name) for name in found if name not in tensors)
    if others:
        left_out["entries that are no tensors"] = others
    what = f"'{holder}' key" if holder else "bare"
    optimizer, state = keys.get("optimizer"), keys.get("state")
    if not isinstance(optimizer, dict):
        optimizer = None
    if not isinstance(state, dict):
        state = None
    weights |= _wider_masters(weights, optimizer)
    return Checkpoint(
        path,
        f"PyTorch file ({', '.join([what, *sorted(unusual)])})",
        weights,
        left_out,
        _step(state or {}, keys),
        optimizer,
        state,
    )


def _find_weights(content: object) -> tuple[Mapping, str, Mapping]:
    """Where the weights are in what a file holds.

    Returns the dictionary beside them (empty where they are bare), the key or keys that lead to
    them ("" where they are bare), and the dictionary with the weights.
    """
    beside: dict = {}
    found = content if isinstance(content, Mapping) else {}
    path: list[str] = []
    for _ in range(DEEPEST):
        inner = {key: value for key, value in found.items() if isinstance(value, Mapping)}
        key = next((key for key in WEIGHT_KEYS if _holds_tensors(inner.get(key))), None)
        if key is None:
            # Any other name, where it is the only one that can be meant.
            likely = [key for key, value in inner.items() if _has_names_of_bert(value)]
            key = likely[0] if len(likely) == 1 else None
        if key is None:
            break
        beside |= found
        found = inner[key]
        path.append(str(key))
    return beside, ".".join(path), found


def _holds_tensors(content: object, depth: int = DEEPEST) -> bool:
    """Whether there is a tensor in these nested dictionaries."""
    if not isinstance(content, Mapping) or not depth:
        return False
    return any(
        isinstance(value, Tensor) or _holds_tensors(value, depth - 1) for value in content.values()
    )


def _has_names_of_bert(content: Mapping) -> bool:
    return any(
        isinstance(value, Tensor)
        and isinstance(name, str)
        and names.from_pytorch(name)[0].startswith(("bert.", "cls."))
        for name, value in content.items()
    )


def _what_is_there(content: object) -> str:
    """For an error: the kind of an object that holds no weights, and its keys."""
    if not isinstance(content, Mapping):
        return f", but a {type(content).__name__}"
    keys = ", ".join(repr(key) for key in list(content)[:SHOWN])
    return f"; its keys are {keys}" if keys else ", but an empty dictionary"


def _wider_masters(weights: Mapping[str, Tensor], optimizer: dict | None) -> dict[str, Tensor]:
    """The master weights of our optimizer, where the model holds them in fewer bits."""
    masters = (optimizer or {}).get("master")
    if not isinstance(masters, dict) or not _are_named_tensors(masters):
        return {}
    wider = {
        name: master
        for name, master in masters.items()
        if name in weights
        and master.shape == weights[name].shape
        and master.element_size() > weights[name].element_size()
    }
    if names.WORD_EMBEDDING in wider and names.DECODER in weights:
        wider[names.DECODER] = wider[names.WORD_EMBEDDING]
    return wider


def _step(*contents: Mapping[str, object]) -> int | None:
    for content in contents:
        for key in ("global_steps", "global_step", "step"):
            value = content.get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _read_safetensors(path: Path, fix: str) -> Checkpoint:
    weights, unusual, left_out = _renamed(path, hugging_face.read_weight_file(path))
    described = ", ".join(["safetensors file", *sorted(unusual)])
    return Checkpoint(path, described, weights, left_out)


def _read_hugging_face(path: Path, fix: str) -> Checkpoint:
    name, found = hugging_face.read_directory(path)
    if not _are_named_tensors(found):
        raise UserError(f"{path / name}: holds more than named tensors", fix)
    weights, unusual, left_out = _renamed(path, found)
    described = ", ".join([name, *sorted(unusual)])
    return Checkpoint(path, f"Hugging Face directory ({described})", weights, left_out)


def _are_named_tensors(found: Mapping) -> bool:
    return all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
        for name, value in found.items()
    )


def _renamed(
    path: Path, found: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], set[str], dict[str, tuple[str, ...]]]:
    """The weights with the apex names, what was unusual about the names, and what is left out."""
    pairs = []
    unusual: set[str] = set()
    left_out: dict[str, tuple[str, ...]] = {}
    for name, value in found.items():
        kind = names.NO_WEIGHTS.get(name.rpartition(".")[2])
        if kind:
            left_out[kind] = (*left_out.get(kind, ()), name)
            continue
        ours, words = names.from_pytorch(name)
        pairs.append((ours, name, value))
        unusual |= words
    weights = _without_doubles(path, pairs)
    tie_output_bias(path, weights)
    return weights, unusual, left_out


def _without_doubles(path: Path, named: Iterable[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by our name. named: our name, the file's name and the tensor of each."""
    weights: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for name, theirs, value in named:
        if name in weights:
            raise UserError(
                f"{path}: holds {name} twice, under two names: {sources[name]} and {theirs}",
                "export one model alone",
            )
        weights[name], sources[name] = value, theirs
    return weights


def _read_tensorflow(path: Path, fix: str) -> Checkpoint:
    bundle = TensorBundle(path.with_suffix("") if path.suffix == ".index" else path)
    variables = set(bundle.entries)
    if names.TENSORFLOW_2_GRAPH in variables:
        raise UserError(
            f"{bundle.index}: a checkpoint of TensorFlow 2's objects, which names no weights",
            f"save the model with tf.compat.v1.train.Saver, or {fix}",
        )
    pairs, slots, left_out = [], [], {}
    for name in bundle.entries:
        if names.tensorflow_slot_of(name, variables):
            slots.append(name)
        elif name in names.TENSORFLOW_COUNTERS:
            left_out.setdefault(names.TENSORFLOW_COUNTERS[name], []).append(name)
        else:
            ours, transposed = names.from_tensorflow(name)
            value = bundle.tensor(name)
            matrix = transposed and value.dim() == 2
            pairs.append((ours, name, value.mT if matrix else value))
    if slots:
        left_out.setdefault(OPTIMIZER_STATE, []).extend(slots)
    step = bundle.tensor("global_step") if "global_step" in variables else None
    left_out.pop("step counter", None)
    return Checkpoint(
        path,
        "TensorFlow 1 checkpoint",
        _without_doubles(path, pairs),
        {what: tuple(those) for what, those in left_out.items()},
        int(step) if step is not None and step.numel() == 1 else None,
    )
