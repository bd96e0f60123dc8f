"""Reading start checkpoints and writing a run's own."""

from bert_pretraining.checkpoint.formats import load_weights, read_weights
from bert_pretraining.checkpoint.save import checkpoint_path, save_checkpoint, write_weights

__all__ = ["checkpoint_path", "load_weights", "read_weights", "save_checkpoint", "write_weights"]
