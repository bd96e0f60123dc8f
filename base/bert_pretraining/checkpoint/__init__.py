"""Reading start checkpoints and writing a run's own."""

from bert_pretraining.checkpoint.formats import (
    Checkpoint,
    load_weights,
    read_checkpoint,
    read_weights,
)
from bert_pretraining.checkpoint.save import checkpoint_path, save_checkpoint, write_weights

__all__ = [
    "Checkpoint",
    "checkpoint_path",
    "load_weights",
    "read_checkpoint",
    "read_weights",
    "save_checkpoint",
    "write_weights",
]
