"""How a process computes: deterministic operators, and TF32."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from bert_pretraining.errors import UserError
from bert_pretraining.runtime import arithmetic
from bert_pretraining.runtime import device as devices

GPU = torch.device("cuda", 0)  # only named: nothing runs on it
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def states_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These states are the whole process's, and so are the variables."""
    for name in (WORKSPACE, "NCCL_NVLS_ENABLE"):
        monkeypatch.setenv(name, "")  # so that it is restored, whatever the test does
        monkeypatch.delenv(name)
    products = torch.get_float32_matmul_precision()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills
    torch.set_float32_matmul_precision(products)


@pytest.mark.parametrize("kind", ["auto", "cuda", "npu"])
def test_deterministic_operators(kind: str) -> None:
    assert not arithmetic.are_operators_deterministic()
    arithmetic.use_deterministic_operators(kind)
    assert arithmetic.are_operators_deterministic()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # flash would only warn
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert (os.environ[WORKSPACE], os.environ["NCCL_NVLS_ENABLE"]) == (":4096:8", "0")


def test_a_cpu_needs_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    arithmetic.use_deterministic_operators("cpu")
    assert WORKSPACE not in os.environ
    monkeypatch.setenv(WORKSPACE, ":0:0")
    arithmetic.use_deterministic_operators("cpu")


def test_what_the_user_has_set_stays_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    arithmetic.use_deterministic_operators("cuda")
    assert (os.environ[WORKSPACE], os.environ["NCCL_NVLS_ENABLE"]) == (":16:8", "1")
    torch.use_deterministic_algorithms(False)
    monkeypatch.setenv(WORKSPACE, ":4096:2:16:8")
    refused = r"CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8, .*; set it to :4096:8, or leave it unset"
    with pytest.raises(UserError, match=refused):
        arithmetic.use_deterministic_operators("cuda")
    assert not arithmetic.are_operators_deterministic()


@pytest.mark.parametrize(
    ("capability", "allowed", "in_tf32"),
    [((9, 0), True, True), ((8, 0), True, True), ((9, 0), False, False), ((7, 0), True, False),
     (None, True, False)],
)  # fmt: skip
def test_tf32_where_the_device_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple | None, allowed: bool, in_tf32: bool
) -> None:
    monkeypatch.setattr(devices, "capability", lambda _: capability)
    arithmetic.set_tf32(GPU, allowed)
    assert arithmetic.multiplies_in_tf32(GPU) is in_tf32
    assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert arithmetic.rounding(GPU, torch.float32) == (2.0**-10 if in_tf32 else 2.0**-23)
    assert arithmetic.rounding(GPU, torch.bfloat16) == 2.0**-7


def test_a_cpu_stays_exact() -> None:
    arithmetic.set_tf32(torch.device("cpu"), True)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not arithmetic.multiplies_in_tf32(torch.device("cpu"))
