"""The wrapper of apex's LAMB, tested with a fake apex, and its errors without apex."""

from __future__ import annotations

import sys
import types
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from bert_pretraining.errors import UserError
from bert_pretraining.optim import OptimizerSettings, choose
from bert_pretraining.optim.apex_lamb import ApexLamb
from lamb_cases import assert_same_bits, case, give, parameters_of, snapshot

GPU = torch.device("cuda")
SETTINGS = OptimizerSettings(0.8, 0.99, 1e-5, 0.02, max_gradient_norm=0.5)


class RecordingLamb(torch.optim.Optimizer):
    """Records its arguments. A step subtracts lr * gradient from weights and adds to state."""

    made: ClassVar[list[RecordingLamb]] = []

    def __init__(self, params: list, lr: float, **arguments: object) -> None:
        super().__init__(params, {"lr": lr, "step": 0, "weight_decay": arguments["weight_decay"]})
        self.lr, self.arguments = lr, arguments
        self.made.append(self)

    def step(self) -> None:
        for group in self.param_groups:
            group["step"] += 1
            for parameter in group["params"]:
                parameter.data -= group["lr"] * parameter.grad
                self.state[parameter]["exp_avg"] += parameter.grad


class RecordingMixedLamb(RecordingLamb):
    """The same with float32 masters, and with learning rate and step count on the device."""

    def __init__(self, params: list, lr: float, **arguments: object) -> None:
        super().__init__(params, lr, **arguments)
        self.param_groups_full_precision: list[dict] = []
        for group in self.param_groups:
            group["lr"] = torch.tensor(lr)
            group["step"] = torch.zeros(1, dtype=torch.int)

    def step(self, grad_scaler: object) -> None:
        found = grad_scaler._check_inf_per_device(self)[torch.device("cpu")]
        assert found.shape == (1,)
        self.scale = grad_scaler._get_scale_async()
        for group, full in zip(self.param_groups, self.param_groups_full_precision, strict=True):
            group["step"] += (found != 1).to(torch.int)
            if found:
                continue
            for parameter, master in zip(group["params"], full["params"], strict=True):
                change = group["lr"] * parameter.grad.float() / self.scale
                if master is None:
                    parameter.data -= change
                else:
                    master -= change
                    parameter.data.copy_(master)


def install(monkeypatch: pytest.MonkeyPatch, **classes: type) -> None:
    """Install a fake package `apex` with these classes in `apex.optimizers`."""
    RecordingLamb.made.clear()
    apex, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    apex.__path__ = []
    for name, value in classes.items():
        setattr(optimizers, name, value)
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def build(dtype: torch.dtype) -> tuple[ApexLamb, dict[str, Tensor], Tensor]:
    weights, gradients, _ = case(seed=1, scale=0.1, steps=1)
    parameters = parameters_of(weights, dtype)
    masters = {name: torch.tensor(value).float() for name, value in weights.items()}
    optimizer = ApexLamb(parameters.items(), SETTINGS, masters)
    give(parameters, gradients[0])
    return optimizer, parameters, masters


def groups_of(optimizer: ApexLamb) -> list[tuple[set[str], float]]:
    names = {parameter: name for name, parameter in zip(
        optimizer.names, optimizer.parameters, strict=True)}  # fmt: skip
    return [
        ({names[parameter] for parameter in group["params"]}, group["weight_decay"])
        for group in optimizer.optimizer.param_groups
    ]


def test_what_fused_lamb_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FusedLAMB=RecordingLamb)
    assert choose("apex", GPU).name == "apex"
    optimizer, parameters, _ = build(torch.float32)
    (made,) = RecordingLamb.made
    assert made is optimizer.optimizer
    assert made.arguments == {
        "bias_correction": True,
        "betas": (0.8, 0.99),
        "eps": 1e-5,
        "weight_decay": 0.02,
        "max_grad_norm": 0.5,
        "use_nvlamb": False,
    }
    decayed = {name for name in parameters if name.endswith("weight") and "LayerNorm" not in name}
    assert groups_of(optimizer) == [(decayed, 0.02), (set(parameters) - decayed, 0.0)]

    parameter = parameters["cls.predictions.bias"]
    before = parameter.item()
    gradient = parameter.grad.item()
    assert optimizer.step(0.5, 0.25)
    assert parameter.item() == pytest.approx(before - 0.5 * 0.25 * gradient)
    assert optimizer.updates == 1
    assert [group["step"] for group in made.param_groups] == [1, 1]
    state = optimizer.state_dict()
    assert state["first_moment"]["cls.predictions.bias"].item() == pytest.approx(0.25 * gradient)
    assert state["master"]["cls.predictions.bias"].item() == parameter.item()

    optimizer.load_state_dict({**state, "updates": 7})
    optimizer.zero_grad()
    assert optimizer.step(0.5)  # missing gradients are zeros
    assert [group["step"] for group in made.param_groups] == [8, 8]
    assert optimizer.updates == 8

    give(parameters, case(2, torch.inf, 1)[1][0])
    kept = snapshot(optimizer)
    assert not optimizer.step(0.5)
    assert_same_bits(kept, snapshot(optimizer))
    assert [group["step"] for group in made.param_groups] == [8, 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_precision_lamb_is_preferred(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    install(monkeypatch, FusedLAMB=RecordingLamb, FusedMixedPrecisionLamb=RecordingMixedLamb)
    optimizer, parameters, masters = build(dtype)
    (made,) = RecordingLamb.made
    assert isinstance(made, RecordingMixedLamb)
    assert made.arguments.get("reduced_precision_dtype") == (
        None if dtype == torch.float32 else dtype
    )
    exact = {name: value.clone() for name, value in masters.items()}
    gradients = {name: parameter.grad.float() for name, parameter in parameters.items()}
    assert optimizer.step(0.5, 0.25)
    assert made.scale.tolist() == [4.0]
    for name, parameter in parameters.items():
        expected = exact[name] - 0.5 * gradients[name] / 4.0
        torch.testing.assert_close(optimizer.state_dict()["master"][name], expected)
        assert torch.equal(parameter, optimizer.state_dict()["master"][name].to(dtype))
    next(iter(parameters.values())).grad[0] = torch.nan
    kept = snapshot(optimizer)
    assert not optimizer.step(torch.tensor(0.5), torch.tensor(0.25))
    assert_same_bits(kept, snapshot(optimizer))
    assert optimizer.updates == 1
    assert all(group["step"].tolist() == [1] for group in made.param_groups)


def test_16_bit_parameters_need_masters(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FusedLAMB=RecordingLamb)
    with pytest.raises(UserError, match="lacks FusedMixedPrecisionLamb"):
        build(torch.bfloat16)
    with pytest.raises(UserError, match="one dtype, float32 or 16 bit"):
        ApexLamb([("a.weight", nn.Parameter(torch.ones(2).double()))], SETTINGS)


def test_what_is_said_without_nvidias_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match="apex: the package 'apex' is not installed"):
        choose("apex", GPU)
    install(monkeypatch)
    with pytest.raises(UserError, match="has neither FusedMixedPrecisionLamb nor FusedLAMB"):
        choose("apex", GPU)
    monkeypatch.delitem(sys.modules, "apex.optimizers")
    with pytest.raises(UserError, match="the installed 'apex' is not NVIDIA's"):
        choose("apex", GPU)
    with pytest.raises(UserError, match="is not NVIDIA's"):
        build(torch.float32)
    install(monkeypatch, FusedLAMB=RecordingLamb)
    with pytest.raises(UserError, match="apex needs a GPU, not device cpu"):
        choose("apex", torch.device("cpu"))
    assert choose("auto", torch.device("cpu")).name == "flat"
