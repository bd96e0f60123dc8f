"""The operators a training step is made of, each with interchangeable providers."""

from bert_pretraining.kernels.table import OPERATORS, PROVIDERS, Kernels, select

__all__ = ["OPERATORS", "PROVIDERS", "Kernels", "select"]
