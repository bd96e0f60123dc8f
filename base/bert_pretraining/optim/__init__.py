"""Optimizers, the learning-rate schedule and loss scaling."""

from bert_pretraining.optim.loss_scale import LossScale
from bert_pretraining.optim.norms import scale_down
from bert_pretraining.optim.optimizer import Optimizer, OptimizerSettings, has_weight_decay
from bert_pretraining.optim.providers import (
    OPTIMIZERS,
    Choice,
    Sharing,
    choose,
    create_optimizer,
)
from bert_pretraining.optim.schedule import Schedule
from bert_pretraining.optim.sharded_lamb import ShardedLamb

__all__ = [
    "OPTIMIZERS",
    "Choice",
    "LossScale",
    "Optimizer",
    "OptimizerSettings",
    "Schedule",
    "ShardedLamb",
    "Sharing",
    "choose",
    "create_optimizer",
    "has_weight_decay",
    "scale_down",
]
