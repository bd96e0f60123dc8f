"""The choice of a device and of its backend, and that one place knows the accelerators."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bert_pretraining.errors import UserError
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime import device_types, process_group
from bert_pretraining.topology import visible_devices
from helpers import ROOT

PACKAGE = ROOT / "base" / "bert_pretraining"
NAMES_AN_ACCELERATOR = re.compile(r"""torch\.cuda|["']cuda(:\d)?["']|\.cuda\b""")
# File -> why it may name CUDA.
ALLOWED = {
    "runtime/device_types.py": "the table of accelerators",
    "runtime/device.py": "what differs between them",
}

without_accelerator = pytest.mark.skipif(
    devices.seen() is not None, reason="PyTorch sees an accelerator here"
)


def test_one_place_names_accelerators() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = path.read_text().splitlines()
        named = [
            f"{n}: {line}" for n, line in enumerate(lines, 1) if NAMES_AN_ACCELERATOR.search(line)
        ]
        if named:
            found[str(path.relative_to(PACKAGE))] = named
    assert {name: lines for name, lines in found.items() if name not in ALLOWED} == {}
    assert set(ALLOWED) <= set(found), "delete a file from ALLOWED that needs it no more"


@pytest.mark.parametrize(
    ("line", "names_one"),
    [
        ("torch.cuda.synchronize()", True),
        ('if device.type == "cuda":', True),
        ("device = 'cuda:0'", True),
        ("tensor.cuda()", True),
        ('"""Replayed as a CUDA graph."""', False),
        ("use_cuda_graph: bool", False),
    ],
)
def test_the_rule_finds_what_breaks_it(line: str, names_one: bool) -> None:
    assert bool(NAMES_AN_ACCELERATOR.search(line)) is names_one


@without_accelerator
def test_auto_is_the_cpu_where_nothing_else_is_seen() -> None:
    assert devices.resolve("auto") == "cpu"
    assert devices.choose("auto", 3).device == torch.device("cpu")
    assert devices.types() == []
    assert devices.count("cuda") == devices.count("nothing") == devices.count("cpu") == 0


@without_accelerator
@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("cuda", "this PyTorch sees no such device; it sees no accelerator"),
        ("mps", "this PyTorch sees no such device; it sees no accelerator"),
        ("cdua", "this PyTorch sees no such device; it sees no accelerator"),
        ("cuda:0", "this PyTorch sees no such device; did you mean cuda?; it sees no"),
        ("gpu", "this PyTorch sees no such device; did you mean cuda?; it sees no accelerator"),
        ("GPU", "this PyTorch sees no such device; did you mean cuda?; it sees no accelerator"),
        ("rocm", "this PyTorch sees no such device; did you mean cuda?; it sees no accelerator"),
        ("CPU", "this PyTorch sees no such device; did you mean cpu?; it sees no accelerator"),
        ("distributed", "this PyTorch sees no such device"),
        ("", "this PyTorch sees no such device"),
        ("npu", "the package torch_npu, which brings that type, is not installed"),
        ("musa", "the package torch_musa, which brings that type, is not installed"),
        ("hpu", "the package habana_frameworks.torch, which brings that type, is not installed"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(asked: str, problem: str) -> None:
    with pytest.raises(UserError) as raised:
        devices.resolve(asked)
    assert raised.value.problem.startswith(f"--device {asked}: {problem}")
    assert "--device cpu" in raised.value.fix


def test_a_package_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch_mlu.py").write_text("raise OSError('libcnrt.so: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as raised:
        devices.resolve("mlu")
    assert raised.value.problem == (
        "--device mlu: the package torch_mlu cannot be imported (libcnrt.so: cannot open)"
    )
    assert f"that fits torch {torch.__version__}" in raised.value.fix
    # auto says so too, and goes on without it.
    device_types.import_packages.cache_clear()
    try:
        notices = device_types.import_packages()
        assert raised.value.problem in notices
    finally:
        device_types.import_packages.cache_clear()


@pytest.mark.parametrize(
    ("kind", "asked", "own", "expected", "says"),
    [
        ("cpu", "nccl", "gloo", "gloo", None),
        ("cpu", "hccl", "gloo", "gloo", None),
        ("cuda", "nccl", "nccl", "nccl", None),
        ("cuda", "gloo", "nccl", "gloo", None),
        ("npu", "nccl", "hccl", "hccl", "dist_backend hccl, which npu devices have"),
        ("npu", "gloo", "hccl", "gloo", "copies the tensors of devices of type npu"),
        ("mps", "nccl", "gloo", "gloo", "through main memory"),
        ("other", "nccl", None, "gloo", "through main memory"),
    ],
)
def test_the_backend_belongs_to_the_device(
    kind: str,
    asked: str,
    own: str | None,
    expected: str,
    says: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "backend", lambda _: own)
    backend, notice = process_group.choose_backend(kind, asked)
    assert backend == expected
    assert notice is None if says is None else says in notice


def test_a_backend_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UserError, match="--dist_backend xyz: this PyTorch has no such backend"):
        process_group.choose_backend("cuda", "xyz")


def test_the_cpu_has_what_every_device_has() -> None:
    cpu = torch.device("cpu")
    assert devices.name(cpu) == "CPU"
    assert devices.wide(cpu) == torch.float64
    assert devices.supports(cpu, torch.bfloat16)
    assert not devices.emulates_bf16(cpu)
    assert devices.memory(cpu) == (None, None, None)
    assert devices.capability(cpu) is devices.streams(cpu) is devices.graphs(cpu) is None
    assert not devices.can_pin(cpu)
    devices.synchronize(cpu)
    with devices.generators_kept(cpu):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize(
    ("environment", "value"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, ""),
        ({"ASCEND_RT_VISIBLE_DEVICES": "1,2"}, "1,2"),
        ({"MUSA_VISIBLE_DEVICES": "3", "CUDA_VISIBLE_DEVICES": "0"}, "0"),
    ],
)
def test_visible_devices(environment: dict[str, str], value: str | None) -> None:
    assert visible_devices(environment) == value
