"""Reading checkpoints of any known kind, and writing those of a run."""

from bert_pretraining.checkpoint.formats import (
    Checkpoint,
    copy_weights,
    load_weights,
    read_checkpoint,
    read_weights,
)
from bert_pretraining.checkpoint.run_order import newest_first
from bert_pretraining.checkpoint.save import (
    CheckpointWriter,
    checkpoint_path,
    save_checkpoint,
    write_weights,
)

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "checkpoint_path",
    "copy_weights",
    "load_weights",
    "newest_first",
    "read_checkpoint",
    "read_weights",
    "save_checkpoint",
    "write_weights",
]
