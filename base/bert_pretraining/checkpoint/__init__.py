"""Reading checkpoints of any known kind, and writing those of a run."""

from bert_pretraining.checkpoint.formats import (
    Checkpoint,
    load_weights,
    read_checkpoint,
    read_weights,
)
from bert_pretraining.checkpoint.save import (
    CheckpointWriter,
    checkpoint_path,
    newest_first,
    save_checkpoint,
    write_weights,
)

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "checkpoint_path",
    "load_weights",
    "newest_first",
    "read_checkpoint",
    "read_weights",
    "save_checkpoint",
    "write_weights",
]
