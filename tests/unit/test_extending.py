"""The examples of docs/extending.md are run as they are printed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bert_pretraining.data.flat_shard import flatten
from bert_pretraining.errors import Unavailable
from bert_pretraining.kernels import Target, reference
from bert_pretraining.kernels.provider import Implementation
from bert_pretraining.logs.sinks import EvaluationFigures
from bert_pretraining.optim import OptimizerSettings
from helpers import ROOT, padded_arrays

CPU = torch.device("cpu")


def example(heading: str) -> dict[str, object]:
    """What the first Python block under a heading defines."""
    page = (ROOT / "docs" / "extending.md").read_text()
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    names: dict[str, object] = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
    return names


def test_a_kernel_provider() -> None:
    provider = example("A kernel provider")["PROVIDER"]
    found = provider.find("bias_gelu", Target(CPU, torch.float32, 64))
    assert isinstance(found, Implementation)
    x, bias = torch.randn(3, 5), torch.randn(5)
    torch.testing.assert_close(found.function(x, bias), reference.bias_gelu(x, bias))
    refused = provider.unavailable(Target(CPU, torch.float64, 64))
    assert refused == Unavailable("acme has no float64")


def test_a_log_sink(tmp_path: Path) -> None:
    sink = example("A log sink")["CsvFile"](tmp_path)
    sink.start_evaluated(EvaluationFigures(0, 0, 4.1, 0.34, 100, 1.0))
    sink.evaluated(EvaluationFigures(7, 448, 2.0, 0.5, 100, 1.0))
    sink.said("not for this file")
    sink.close()
    lines = (tmp_path / "evaluations.csv").read_text().splitlines()
    assert lines == ["step,samples,mlm_accuracy", "0,0,0.34", "7,448,0.5"]


def test_an_optimizer() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    settings = OptimizerSettings(beta_1=0.5, max_gradient_norm=100.0)
    sgd = example("An optimizer")["Sgd"]([("a.weight", weight)], settings)
    for gradient in (torch.tensor([2.0, 4.0]), torch.tensor([1.0, 0.0])):
        weight.grad = gradient
        assert sgd.step(0.1)
    # m = g = (2, 4), then 0.5 m + g = (2, 2).
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0 - 0.2 - 0.2, -2.0 - 0.4 - 0.2]))
    assert list(sgd.state_dict()) == ["updates", "master", "momentum"]


def test_a_reader(tmp_path: Path) -> None:
    arrays = padded_arrays([9, 16, 3], 16, 101)
    path = tmp_path / "part_0.npz"
    np.savez(path, **arrays)
    reader = example("A reader of another data format")["NPZ"]
    assert (reader.inspect(path).num_sequences, reader.inspect(path).max_seq_length) == (3, 16)
    found, expected = reader.read(path, 101), flatten(arrays, 101, "test")
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, name), value)
