"""Reading the weights of a checkpoint of any known kind, with the names of the apex layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bert_pretraining.checkpoint import hugging_face, names
from bert_pretraining.checkpoint.structure import NEXT_SENTENCE_HEAD, fit, tie_output_bias
from bert_pretraining.checkpoint.tensor_bundle import TensorBundle
from bert_pretraining.checkpoint.torch_file import read_torch_file
from bert_pretraining.errors import UserError
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.runtime.files import OTHER_CHECKPOINT, checkpoint_kind

WRAPPERS = ("model", "state_dict", "model_state_dict")  # keys that hold the weights
OPTIMIZER_STATE = "optimizer state"
POSITION_IDS = "bert.embeddings.position_ids"  # 0, 1, 2, ...; Hugging Face used to store them


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    weights: tensors with the names of the apex layout, memory-mapped if the format allows it.
    left_out: what is not read; the key says what it is, the value is its names in the file.
    optimizer, state: of a training checkpoint; both are None for weights alone.
    step: the number of updates, None where the checkpoint does not store it.
    """

    path: Path
    format: str
    weights: dict[str, Tensor]
    left_out: dict[str, tuple[str, ...]]
    step: int | None = None
    optimizer: dict | None = None
    state: dict | None = None

    @property
    def has_optimizer_state(self) -> bool:
        """Whether the checkpoint has the state of an optimizer, read or left out."""
        return bool(self.optimizer) or OPTIMIZER_STATE in self.left_out

    def summary(self) -> str:
        """One line: the format, the step, what was left out."""
        parts = [self.format]
        if self.step is not None:
            parts.append(f"step {self.step}")
        parts += [f"left out: {what} ({len(those)})" for what, those in self.left_out.items()]
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
    return readers[checkpoint_kind(path, fix)](path, fix)


def load_weights(model: BertForPreTraining, path: Path) -> Checkpoint:
    """Copy a checkpoint's weights into `model`, on any device.

    Padding rows of the vocabulary become 0 where the checkpoint has none. The next-sentence head
    is left out where the model has none. Nothing is copied unless everything fits. Returns the
    checkpoint, for its `summary()`.
    Raises UserError that lists every missing or unexpected tensor, and every wrong shape.
    """
    checkpoint = read_checkpoint(path)
    if "nsp" not in model.losses:
        checkpoint = _without_next_sentence_head(checkpoint)
    own = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    weights = fit(path, checkpoint.weights, shapes, model.config.vocab_size)
    with torch.no_grad():
        for name, value in weights.items():
            if name == names.DECODER:
                continue  # in the model it is the word embedding
            own[name][: len(value)].copy_(value)
            own[name][len(value) :] = 0.0
    return checkpoint


def _without_next_sentence_head(checkpoint: Checkpoint) -> Checkpoint:
    head = [name for name in checkpoint.weights if name.startswith(NEXT_SENTENCE_HEAD)]
    if not head:
        return checkpoint
    kept = {name: value for name, value in checkpoint.weights.items() if name not in head}
    left_out = {**checkpoint.left_out, "next-sentence head": tuple(head)}
    return replace(checkpoint, weights=kept, left_out=left_out)


def _read_torch(path: Path, fix: str) -> Checkpoint:
    content = read_torch_file(path)
    keys = content if isinstance(content, dict) else {}
    wrapper = next((key for key in WRAPPERS if isinstance(keys.get(key), dict)), None)
    found = keys[wrapper] if wrapper else keys
    if not found or not _are_named_tensors(found):
        raise UserError(
            f"{path}: holds no named tensors, bare or under a 'model' key",
            f"export the model's state_dict() alone, or {fix}",
        )
    weights, unusual, left_out = _renamed(path, found)
    what = f"'{wrapper}' key" if wrapper else "bare"
    optimizer, state = keys.get("optimizer"), keys.get("state")
    if not wrapper or not isinstance(optimizer, dict):
        optimizer = None
    if not wrapper or not isinstance(state, dict):
        state = None
    weights |= _wider_masters(weights, optimizer)
    return Checkpoint(
        path,
        f"PyTorch file ({', '.join([what, *sorted(unusual)])})",
        weights,
        left_out,
        _step(state or {}, keys if wrapper else {}),
        optimizer,
        state,
    )


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
        ours, words = names.from_pytorch(name)
        if ours == POSITION_IDS:
            left_out["position numbers"] = (name,)
            continue
        pairs.append((ours, value))
        unusual |= words
    weights = _without_doubles(path, pairs)
    tie_output_bias(path, weights)
    return weights, unusual, left_out


def _without_doubles(path: Path, pairs: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, value in pairs:
        if name in weights:
            raise UserError(
                f"{path}: holds {name} twice, under two names", "export one model alone"
            )
        weights[name] = value
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
            pairs.append((ours, value.mT if transposed and value.dim() == 2 else value))
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
