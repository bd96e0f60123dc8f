"""The model's fused operators, and the providers that implement them."""

from bert_pretraining.kernels.provider import OPERATORS, Target
from bert_pretraining.kernels.table import DTYPES, PROVIDERS, Kernels, select, unavailable

__all__ = ["DTYPES", "OPERATORS", "PROVIDERS", "Kernels", "Target", "select", "unavailable"]
