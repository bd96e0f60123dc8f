"""The command line of `checkpoint ...`: parse the flags, call checkpoint/, print lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bert_pretraining import config
from bert_pretraining.errors import UserError
from bert_pretraining.model.bert_config import BERT_CONFIG_NAME, BertConfig

if TYPE_CHECKING:
    from bert_pretraining.checkpoint.conversion import Model
    from bert_pretraining.checkpoint.formats import Checkpoint

EXIT_EQUAL, EXIT_DIFFERENT = 0, 1
FORMS = (
    "a PyTorch file, a Hugging Face directory, a .safetensors file, or a TensorFlow 1 "
    "checkpoint (model.ckpt-28252, which has .index and .data files)"
)
FIX = "name a checkpoint (see python -m bert_pretraining checkpoint inspect --help)"


def _parser(command: str, text: str) -> config.FlagParser:
    return config.FlagParser(
        prog=f"python -m bert_pretraining checkpoint {command}", allow_abbrev=False,
        description=text,
    )  # fmt: skip


def inspect(arguments: list[str]) -> None:
    """`checkpoint inspect FILE`: what is in it."""
    parser = _parser("inspect", f"What a checkpoint holds. FILE: {FORMS}.")
    parser.add_argument("file", type=Path, metavar="FILE", help="the checkpoint")
    parser.add_argument("--json", action="store_true", help="print it as JSON (default: as text)")
    values = parser.parse(arguments)

    from bert_pretraining.checkpoint import formats, inspection

    found = inspection.inspect(formats.read_checkpoint(values.file, FIX))
    print(json.dumps(found.to_json(), indent=2) if values.json else found.describe())


def diff(arguments: list[str]) -> int:
    """`checkpoint diff A B`: 0 for the same weights, 1 for others."""
    parser = _parser(
        "diff",
        "Whether two checkpoints hold the same weights: exit code 0 if they do, 1 if not, 2 if one "
        f"cannot be read. A, B: {FORMS}. Rows of 0 that pad the vocabulary, and the type "
        "of the numbers, make no difference.",
    )
    parser.add_argument("first", type=Path, metavar="A", help="a checkpoint")
    parser.add_argument("second", type=Path, metavar="B", help="another checkpoint")
    parser.add_argument("--training_state", action="store_true",
        help="compare the state of the optimizer and of the training too "
        "(default: the weights alone)")  # fmt: skip
    parser.add_argument("--json", action="store_true",
        help="print every difference as JSON (default: the first ones as text)")  # fmt: skip
    values = parser.parse(arguments)

    from bert_pretraining.checkpoint import comparison, formats

    found = comparison.compare(
        formats.read_checkpoint(values.first, FIX),
        formats.read_checkpoint(values.second, FIX),
        values.training_state,
    )
    print(json.dumps(found.to_json(), indent=2) if values.json else found.describe())
    return EXIT_EQUAL if found.equal else EXIT_DIFFERENT


def convert(arguments: list[str]) -> None:
    """`checkpoint convert SRC DST --to apex|hf|resume`."""
    parser = _parser(
        "convert",
        f"Write a checkpoint's weights in another layout. SRC: {FORMS}. "
        "apex: a start checkpoint, {'model': named tensors}. hf: a directory for Hugging Face's "
        "BertForPreTraining, config.json and model.safetensors. resume: a start checkpoint with "
        "the training state that SRC has, if any; the optimizer starts fresh.",
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="the checkpoint to read")
    add("destination", type=Path, metavar="DST", help="the file to write; for hf a directory")
    add("--to", required=True, choices=("apex", "hf", "resume"),
        help="the layout of DST (required)")  # fmt: skip
    add("--bert_config", "--bert_config_path", type=Path, metavar="FILE",
        help=f"the model's sizes, which only hf needs (default: {BERT_CONFIG_NAME} beside SRC, "
        "Hugging Face's config.json beside its weights, or that of SRC's run)")  # fmt: skip
    add("--trim_vocab", action="store_true",
        help="hf: leave out the rows that pad the vocabulary to a multiple of 8 "
        "(default: keep them)")  # fmt: skip
    add("--overwrite", action="store_true",
        help="replace DST if it exists (default: refuse)")  # fmt: skip
    values = parser.parse(arguments)
    if values.trim_vocab and values.to != "hf":
        raise UserError(
            "--trim_vocab is for --to hf, because the trainer's own layouts keep the padding",
            "leave it out, or pass --to hf",
        )
    _check_destination(values.destination, values.to, values.overwrite)

    from bert_pretraining.checkpoint import conversion, formats

    checkpoint = formats.read_checkpoint(values.source, FIX)
    model, notes = _model(checkpoint, values.bert_config)
    lines = conversion.convert(checkpoint, values.destination, values.to, model, values.trim_vocab)
    print("\n".join([*lines, *notes]))


def _check_destination(path: Path, target: str, overwrite: bool) -> None:
    """UserError where something at `path` must not be replaced, or cannot be."""
    if not path.exists():
        return
    if path.is_dir() != (target == "hf"):
        kind = "a directory" if path.is_dir() else "a file"
        raise UserError(f"{path} is {kind}, which --to {target} cannot replace", "name another DST")
    if not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already", "name another DST, or pass --overwrite")


def _model(checkpoint: Checkpoint, given: Path | None) -> tuple[Model, list[str]]:
    """The model of the bert_config.json given or found near it, and notes for the user."""
    from bert_pretraining.checkpoint import beside
    from bert_pretraining.checkpoint.conversion import Model
    from bert_pretraining.checkpoint.names import WORD_EMBEDDING
    from bert_pretraining.checkpoint.structure import Sizes, sizes_of

    path = given or beside.find_bert_config(checkpoint.path)
    if path is None:
        sizes = sizes_of(checkpoint.weights)
        if sizes is None:
            lacking = (
                "" if WORD_EMBEDDING in checkpoint.weights else f", {WORD_EMBEDDING} is not there"
            )
            raise UserError(
                f"{checkpoint.path}: its tensors do not show the model's sizes{lacking}",
                "pass --bert_config FILE ('python -m bert_pretraining checkpoint inspect "
                f"{checkpoint.path}' lists the tensors)",
            )
        return Model(sizes, None), []
    values = BertConfig.load(path)
    sizes = Sizes(
        values.num_hidden_layers,
        values.hidden_size,
        values.intermediate_size,
        values.vocab_size,
        values.max_position_embeddings,
        values.type_vocab_size,
    )
    notes = [f"Sizes from {path}"]
    if beside.differs_in_gelu(path, values):
        notes.append(f"Note: {beside.ERF_NOTE}")
    return Model(sizes, _hugging_face_config(values)), notes


def _hugging_face_config(values: BertConfig) -> dict:
    """The config.json of BertForPreTraining, without the size of the vocabulary."""
    return {
        "architectures": ["BertForPreTraining"],
        "model_type": "bert",
        "hidden_act": "gelu_pytorch_tanh",  # the formula that BERT is trained with here
        "layer_norm_eps": values.layer_norm_epsilon,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        **{
            name: getattr(values, name)
            for name in (
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "max_position_embeddings",
                "type_vocab_size",
                "hidden_dropout_prob",
                "attention_probs_dropout_prob",
                "initializer_range",
            )
        },
    }


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "inspect": inspect,
    "convert": convert,
    "diff": diff,
}
