"""The rate of matrix products: plausible, of a size that the device does soon."""

from __future__ import annotations

import pytest
import torch

from bert_pretraining.runtime import matrix_rate as rates

CPU = torch.device("cpu")


def test_a_rate_belongs_to_its_shape_and_changes_no_generator() -> None:
    before = torch.get_rng_state()
    rate, shape = rates.matrix_rate(CPU, torch.float32)
    assert shape in rates.SHAPES
    assert 1e8 < rate < 1e14
    assert torch.equal(torch.get_rng_state(), before)
    assert rates.matrix_rate(CPU, torch.float32, (3, 5, 7))[1] == (3, 5, 7)


@pytest.mark.parametrize(("soon", "index"), [(-1.0, 0), (1e9, 1)])
def test_a_slow_device_does_a_small_product(
    monkeypatch: pytest.MonkeyPatch, soon: float, index: int
) -> None:
    """The limit of time decides how far the shapes go up."""
    monkeypatch.setattr(rates, "SHAPES", ((2, 3, 4), (4, 6, 8)))
    monkeypatch.setattr(rates, "SOON", soon)
    monkeypatch.setattr(rates, "LEAST_SECONDS", 0.0)
    assert rates.matrix_rate(CPU, torch.float32)[1] == rates.SHAPES[index]
