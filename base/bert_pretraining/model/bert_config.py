"""`bert_config.json`: the model's sizes."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from bert_pretraining.errors import UserError
from bert_pretraining.runtime.file_kind import read_json

BERT_CONFIG_NAME = "bert_config.json"
FIX = "correct it (docs/data.md shows one), or take the file of the start checkpoint's model"
WRITE = "write one (docs/data.md shows one), or give the run another: --bert_config_path FILE"
GELU_NAMES = ("gelu", "gelu_new", "gelu_pytorch_tanh")  # all mean the tanh approximation
VOCAB_MULTIPLE = 8  # matrix products are faster with rows in multiples of 8


@dataclass(frozen=True)
class BertConfig:
    """The fields of `bert_config.json`, named as in the file."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    layer_norm_epsilon: float = 1e-12

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the word embedding: 30522 -> 30528."""
        return padded_rows(self.vocab_size)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def load(cls, path: Path) -> BertConfig:
        """Read and check the file. A UserError names the wrong key, or all that are missing."""
        values = read_json(path, "a bert_config.json", FIX, absent=WRITE)
        if not isinstance(values, dict):
            raise UserError(f"{path}: must hold a JSON object, not {type(values).__name__}", FIX)
        if "layer_norm_eps" in values:  # Hugging Face's config.json
            values.setdefault("layer_norm_epsilon", values["layer_norm_eps"])
        # The file may have keys of other tools, which do not change the model.
        kept, missing = {}, []
        for field in fields(cls):
            if field.name in values:
                kept[field.name] = _checked(field.name, str(field.type), values[field.name], path)
            elif field.default is MISSING:
                missing.append(field.name)
        if missing:
            keys = "key" if len(missing) == 1 else "keys"
            names = ", ".join(f"'{name}'" for name in missing)
            raise UserError(f"{path}: no {keys} {names}, which the model needs", FIX)
        config = cls(**kept)
        if config.hidden_size % config.num_attention_heads:
            raise UserError(
                f"{path}: hidden_size {config.hidden_size} is not divisible by "
                f"num_attention_heads {config.num_attention_heads}",
                FIX,
            )
        if config.hidden_act not in GELU_NAMES:
            raise UserError(
                f"{path}: hidden_act '{config.hidden_act}' is not supported, only 'gelu' is",
                "use a model that has it",
            )
        return config


def padded_rows(vocab_size: int) -> int:
    """`vocab_size`, rounded up to a multiple of 8."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _checked(name: str, kind: str, value: object, path: Path) -> object:
    """The value, if its type and range are right; an integer may be written as 64.0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "str":
        good = isinstance(value, str)
    elif kind == "int":
        good = number and math.isfinite(value) and value == int(value) and value >= 1
    else:
        good = number and 0.0 <= value < 1.0
    if not good:
        wanted = {"str": "a string", "int": "a positive integer", "float": "from 0 to below 1"}
        raise UserError(f"{path}: key '{name}' must be {wanted[kind]}, not {value!r}", FIX)
    return int(value) if kind == "int" else value
