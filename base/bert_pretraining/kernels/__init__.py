"""The operators a training step is made of, each with interchangeable providers."""

from bert_pretraining.kernels.table import DTYPES, OPERATORS, PROVIDERS, Kernels, select

__all__ = ["DTYPES", "OPERATORS", "PROVIDERS", "Kernels", "select"]
