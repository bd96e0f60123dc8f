"""LAMB, the learning-rate schedule and loss scaling."""

from bert_pretraining.optim.lamb import Lamb, LambSettings, has_weight_decay, scale_down
from bert_pretraining.optim.loss_scale import LossScale
from bert_pretraining.optim.providers import OPTIMIZERS, Choice, Sharing, choose, create_optimizer
from bert_pretraining.optim.schedule import Schedule
from bert_pretraining.optim.sharded_lamb import ShardedLamb

__all__ = [
    "OPTIMIZERS",
    "Choice",
    "Lamb",
    "LambSettings",
    "LossScale",
    "Schedule",
    "ShardedLamb",
    "Sharing",
    "choose",
    "create_optimizer",
    "has_weight_decay",
    "scale_down",
]
