"""The operators a training step is made of, each with interchangeable providers."""

from bert_pretraining.kernels.provider import OPERATORS, Target
from bert_pretraining.kernels.table import DTYPES, PROVIDERS, Kernels, select, unavailable

__all__ = ["DTYPES", "OPERATORS", "PROVIDERS", "Kernels", "Target", "select", "unavailable"]
