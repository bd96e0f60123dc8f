"""Which provider runs which operator, why, and the error if one is missing."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
import torch

from bert_pretraining.config import FIELDS
from bert_pretraining.errors import UserError
from bert_pretraining.kernels import (
    OPERATORS,
    PROVIDERS,
    Target,
    select,
    torch_provider,
)
from bert_pretraining.kernels.reference import attention as reference_attention
from bert_pretraining.kernels.table import Candidates, candidates

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("provider", ["auto", "reference", "torch"])
def test_every_operator_has_a_provider_and_the_choice_is_told(provider: str) -> None:
    kernels = select(provider, CPU, torch.float32)
    assert set(kernels.choice) == set(OPERATORS)
    for operator in OPERATORS:
        assert callable(getattr(kernels, operator))
        assert f"{operator}=" in kernels.describe()


def test_every_operator_has_a_flag() -> None:
    flags = {name.removeprefix("kernels_") for name in FIELDS if name.startswith("kernels_")}
    assert flags == set(OPERATORS)
    for name in ("kernels", *(f"kernels_{operator}" for operator in OPERATORS)):
        assert FIELDS[name].metadata["choices"] == ("auto", *PROVIDERS)


def test_candidates_for_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs on the device to find them: this machine may have none."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for device, operator, names in (
        (CUDA, "attention", ("torch", "triton")),
        (CUDA, "bias_gelu", ("triton", "torch")),
        (CPU, "bias_gelu", ("torch",)),
    ):
        target = Target(device, torch.float16, 64)
        assert candidates(operator, "auto", target) == Candidates(names)
        assert candidates(operator, "torch", target) == Candidates(("torch",), "--kernels torch")
        named = candidates(operator, "auto", target, {operator: "reference"})
        assert named == Candidates(("reference",), f"--kernels.{operator} reference")
    with pytest.raises(UserError, match="--kernels cuda: no such provider"):
        candidates("attention", "cuda", target)


def test_one_operator_of_another_provider() -> None:
    kernels = select("torch", CPU, torch.float32, per_operator={"bias_gelu": "reference"})
    assert kernels.choice["bias_gelu"] == "reference"
    assert kernels.choice["masked_cross_entropy"] == "torch"


def test_unknown_provider() -> None:
    with pytest.raises(UserError, match="--kernels cuda: no such provider"):
        select("cuda", CPU, torch.float32)
    with pytest.raises(UserError, match=r"--kernels.attention cuda: no such provider"):
        select("auto", CPU, torch.float32, per_operator={"attention": "cuda"})


def fake_modules(monkeypatch: pytest.MonkeyPatch, **contents: dict) -> None:
    """Replace real modules by fake ones. contents: dotted name, with __ for a dot -> attributes."""
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    for name, attributes in contents.items():
        module = types.ModuleType(name.replace("__", "."))
        module.__dict__.update(attributes)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_apex_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match="--kernels apex: NVIDIA apex is not installed; choose"):
        select("apex", CPU, torch.float32)


def test_the_other_apex_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_modules(monkeypatch, apex={"interfaces": None})
    with pytest.raises(UserError, match=r"another project .PyPI's web toolkit., not NVIDIA's"):
        select("apex", CUDA, torch.float16)


def test_an_apex_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch_provider, "attention_for", lambda *_: (torch_provider.flash_attention, "flash")
    )
    fake_modules(
        monkeypatch,
        apex={"normalization": None},
        apex__normalization={},
        apex__normalization__fused_layer_norm={},
    )
    with pytest.raises(UserError, match=r"has no apex.normalization.fused_layer_norm.fused_layer"):
        select("apex", CUDA, torch.float16)


def test_apex_where_it_has_kernels_and_torch_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    class CrossEntropy(torch.autograd.Function):
        """apex's interface: one loss per row, 0 for the padding label."""

        @staticmethod
        def forward(ctx, logits, labels, smoothing, padding, half_to_float):
            assert (smoothing, half_to_float) == (0.0, False)  # float32 logits here
            assert labels.min() >= 0
            losses = torch.nn.functional.cross_entropy(
                logits.float(), labels.clamp(min=0), reduction="none"
            )
            return losses.masked_fill(labels == padding, 0.0)

    def layer_norm(x, weight, bias, shape, epsilon):
        return torch.nn.functional.layer_norm(x, shape, weight, bias, epsilon)

    fake_modules(
        monkeypatch,
        apex={"normalization": None},
        apex__normalization={},
        apex__normalization__fused_layer_norm={"fused_layer_norm_affine": layer_norm},
        apex__contrib={},
        apex__contrib__xentropy={"SoftmaxCrossEntropyLoss": CrossEntropy},
    )
    monkeypatch.setattr(
        torch_provider, "attention_for", lambda *_: (torch_provider.flash_attention, "flash")
    )
    kernels = select("apex", CUDA, torch.float16)
    assert kernels.choice["masked_cross_entropy"] == "apex"
    assert kernels.choice["attention"] == "torch (flash) (apex has no such kernel)"
    plain = select("reference", CPU, torch.float32)
    x, norm = torch.randn(5, 8), torch.ones(8)
    arguments = (x, norm, x, norm, norm, 1e-12, 0.0)
    torch.testing.assert_close(
        kernels.bias_dropout_residual_layer_norm(*arguments),
        plain.bias_dropout_residual_layer_norm(*arguments),
    )
    ids, tables = torch.arange(3), [torch.randn(4, 8) for _ in range(3)]
    arguments = (ids, ids, ids, *tables, norm, norm, 1e-12, 0.0)
    torch.testing.assert_close(
        kernels.embedding_layer_norm_dropout(*arguments),
        plain.embedding_layer_norm_dropout(*arguments),
    )
    labels = torch.tensor([1, -1, 7, 0, 3])
    for ours, theirs in zip(
        kernels.masked_cross_entropy(x, labels), plain.masked_cross_entropy(x, labels), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(UserError, match=r"--kernels.attention apex: has no such kernel; choose"):
        select("auto", CUDA, torch.float16, per_operator={"attention": "apex"})


def test_triton_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "2.0.0+vendor")
    with pytest.raises(UserError, match=r"--kernels triton: triton 2\.0\.0\+vendor is older than"):
        select("triton", CUDA, torch.float16)
    monkeypatch.setattr(triton, "__version__", "2.1.0+vendor")
    assert select("triton", CUDA, torch.float16).choice["attention"] == "triton"


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--kernels triton: triton is not installed"):
        select("triton", CUDA, torch.float16)
    monkeypatch.setattr(
        torch_provider, "attention_for", lambda *_: (torch_provider.padded_attention, "padded")
    )
    kernels = select("auto", CUDA, torch.float16)
    assert kernels.choice["bias_gelu"] == "torch (triton is not installed (pip install triton))"
    assert kernels.choice["attention"].startswith("torch (padded) (triton is not installed")


def test_an_attention_that_is_refused_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU without flash attention."""

    def refuse(*_: object) -> None:
        raise RuntimeError("no kernel for this device")

    meta = torch.device("meta")

    def padded(qkv: torch.Tensor, *_: object) -> torch.Tensor:
        return qkv[:, 2]

    def try_there(attention: Callable, *_: object) -> None:
        attention(torch.ones(16, 3, 2, 64, device=meta))  # its results cannot be compared

    monkeypatch.setattr(torch_provider, "try_attention", try_there)
    monkeypatch.setattr(torch_provider, "flash_attention", refuse)
    monkeypatch.setattr(torch_provider, "efficient_attention", refuse)
    monkeypatch.setattr(torch_provider, "padded_attention", padded)
    attention, why = torch_provider.attention_for(meta, torch.float16, 64)
    assert attention is padded
    assert why.startswith("padded; flash refused: no kernel for this device; memory-efficient")
    monkeypatch.setattr(torch_provider, "padded_attention", refuse)
    with pytest.raises(UserError, match="no attention runs on meta"):
        torch_provider.attention_for(meta, torch.float16, 64)


@pytest.mark.parametrize("fault", ["output", "gradient", "nan", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_is_grossly_wrong_is_refused(fault: str, dtype: torch.dtype) -> None:
    """So that the next variant is tried: flash may run on a device, and be wrong there."""

    def attention(qkv: torch.Tensor, *others: object) -> torch.Tensor:
        if fault == "gradient":
            # The values are right, and half of each value's gradient is missing.
            kept = (qkv[:, 2] + qkv[:, 2].detach()) / 2
            qkv = torch.stack([qkv[:, 0], qkv[:, 1], kept], dim=1)
        context = reference_attention(qkv, *others)
        factor = {"output": 0.5, "nan": float("nan")}.get(fault, 1.0)
        return context * factor

    if fault:
        with pytest.raises(RuntimeError, match="its results are wrong"):
            torch_provider.try_attention(attention, torch.device("cpu"), dtype, 16)
    else:
        torch_provider.try_attention(attention, torch.device("cpu"), dtype, 16)
