"""Files that belong to a checkpoint and lie near it: its model's sizes and its vocabulary.

A run's checkpoint lies in the run's folder, whose config.json names the data set that has them.
"""

from __future__ import annotations

import json
from pathlib import Path

from bert_pretraining.model.bert_config import BERT_CONFIG_NAME, BertConfig

VOCABULARY_NAME = "vocab.txt"
# The sizes in a Hugging Face directory; in a run's folder, the settings of the run.
OTHER_CONFIG = "config.json"
HUGGING_FACE_ENDINGS = (".safetensors", ".bin")
ERF_NOTE = (
    "its hidden_act 'gelu' means the erf form to Hugging Face; this package computes the tanh "
    "form, as BERT's authors do, which changes losses a little"
)


def find_bert_config(checkpoint: Path) -> Path | None:
    """The bert_config.json of a checkpoint's model, or Hugging Face's config.json; None without.

    It is looked for beside the checkpoint, then where the checkpoint's run had it.
    """
    folder, run = _folder(checkpoint), _run_settings(checkpoint)
    found = [folder / BERT_CONFIG_NAME]
    if _is_hugging_face(checkpoint):
        found.append(folder / OTHER_CONFIG)
    found += _paths(run, "bert_config_path")
    found += [data_dir / BERT_CONFIG_NAME for data_dir in _paths(run, "data_dir")]
    return next((path for path in found if path.is_file()), None)


def find_vocabulary(checkpoint: Path, bert_config: Path) -> Path | None:
    """The vocab.txt of a checkpoint: beside it, beside its sizes, or in its run's data set."""
    folders = [
        _folder(checkpoint),
        bert_config.parent,
        *_paths(_run_settings(checkpoint), "data_dir"),
    ]
    found = (folder / VOCABULARY_NAME for folder in folders)
    return next((path for path in found if path.is_file()), None)


def data_set_elsewhere(checkpoint: Path) -> str:
    """The end of an order to pass a file: where the run's data set would be found, if it is not."""
    lacking = [path for path in _paths(_run_settings(checkpoint), "data_dir") if not path.is_dir()]
    return f", or run this in the folder from which {lacking[0]} is found" if lacking else ""


def differs_in_gelu(bert_config: Path, values: BertConfig) -> bool:
    """Whether Hugging Face computes another GELU with these sizes; ERF_NOTE tells it."""
    return bert_config.name == OTHER_CONFIG and values.hidden_act == "gelu"


def _folder(checkpoint: Path) -> Path:
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def _is_hugging_face(checkpoint: Path) -> bool:
    return checkpoint.is_dir() or checkpoint.suffix in HUGGING_FACE_ENDINGS


def _run_settings(checkpoint: Path) -> dict[str, object]:
    """The settings of the run in whose folder the checkpoint lies; empty where there are none."""
    path = checkpoint.parent / OTHER_CONFIG
    if _is_hugging_face(checkpoint) or not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # no file of a run: it may belong to anything
    return values if isinstance(values, dict) else {}


def _paths(run: dict[str, object], setting: str) -> list[Path]:
    """The path that a setting of the run has, if it has one."""
    value = run.get(setting)
    return [Path(value)] if value and isinstance(value, str) else []
