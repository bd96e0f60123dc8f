"""`bert_config.json`: the model's sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from bert_pretraining.errors import UserError

VOCAB_MULTIPLE = 8  # the decoder's matrix product wants rows in multiples of 8


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
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @classmethod
    def load(cls, path: Path) -> BertConfig:
        """Read and check the file; UserError names the key at fault."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"cannot read {path} ({error.strerror}); pass --bert_config_path"
            ) from error
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from error
        known = {field.name: field for field in fields(cls)}
        # Other tools keep further keys in this file; they do not change the model.
        kept = {key: value for key, value in values.items() if key in known}
        for name in known:
            if name not in kept and name in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "max_position_embeddings",
            ):
                raise UserError(f"{path}: no key '{name}'; it is needed to build the model")
        for name, value in kept.items():
            expected = known[name].type
            good = isinstance(value, str) if expected == "str" else isinstance(value, int | float)
            if not good or isinstance(value, bool) or (expected == "int" and value != int(value)):
                raise UserError(f"{path}: key '{name}' must be {expected}, not {value!r}")
            if expected == "int" and value < 1:
                raise UserError(f"{path}: key '{name}' must be at least 1, not {value}")
        config = cls(**kept)
        if config.hidden_size % config.num_attention_heads:
            raise UserError(
                f"{path}: hidden_size {config.hidden_size} does not divide by "
                f"num_attention_heads {config.num_attention_heads}"
            )
        if config.hidden_act != "gelu":
            raise UserError(
                f"{path}: hidden_act '{config.hidden_act}' is not supported; only 'gelu' is"
            )
        return config
