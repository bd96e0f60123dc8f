"""The trackers by the names that `track` takes; a new one is added here, and to config/trackers.py.

No tracker's package is imported with this module.
"""

from __future__ import annotations

from bert_pretraining.logs.trackers.mlflow import MLflow
from bert_pretraining.logs.trackers.tensorboard import TensorBoard
from bert_pretraining.logs.trackers.tracker import Tracker
from bert_pretraining.logs.trackers.trackio import Trackio
from bert_pretraining.logs.trackers.wandb import WandB

CLASSES: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}
