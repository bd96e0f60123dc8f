"""PyTorch's dropout in two providers under torch.compile, on a device that is no CPU."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from bert_pretraining.kernels import reference, torch_provider

META = torch.device("meta")


class TwoOperators(nn.Module):
    """The operators that drop, with dropout as an attribute, as the model has it."""

    def __init__(self, provider: ModuleType, dropout: float) -> None:
        super().__init__()
        self.provider = provider
        self.dropout = dropout

    def forward(self, x: Tensor, ids: Tensor, table: Tensor, vector: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        hidden = self.provider.embedding_layer_norm_dropout(
            ids, ids, ids, table, table, table, vector, vector, 1e-12, dropout
        )
        return self.provider.bias_dropout_residual_layer_norm(
            x, vector, hidden, vector, vector, 1e-12, dropout
        )


@pytest.mark.parametrize("provider", [torch_provider, reference], ids=["torch", "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_random_batches_compile_into_one_graph(training: bool, provider: ModuleType) -> None:
    """With dynamic shapes, a second model's dropout is a symbol to torch.compile."""
    torch._dynamo.reset()
    for dropout in (0.1, 0.2):
        model = TwoOperators(provider, dropout).train(training)
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
        for tokens in (5, 7):
            x = torch.empty(tokens, 12, device=META)
            ids = torch.empty(tokens, dtype=torch.int64, device=META)
            table, vector = torch.empty(50, 12, device=META), torch.empty(12, device=META)
            assert compiled(x, ids, table, vector).shape == (tokens, 12)
