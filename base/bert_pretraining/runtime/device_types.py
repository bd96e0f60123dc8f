"""The accelerators by name: their modules in PyTorch, and the packages that bring these.

A type of device is a word such as cuda, npu or cpu; each type but cpu is an accelerator. A type's
functions are in the module `torch.<type>`, which an extension package such as torch_npu may bring.
What that module lacks is looked for in torch.accelerator, which PyTorch has from 2.6 on and which
serves one type. `device.py` is what the rest of the package uses.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, Protocol

import torch

from bert_pretraining.errors import UserError


@dataclass(frozen=True)
class DeviceType:
    """What PyTorch does not tell about a type of device.

    backends: of collectives, the preferred one first.
    package: is imported before the type is used, where it is installed.
    collectives: is imported before the backends are used, where it is installed.
    """

    backends: tuple[str, ...] = ()
    package: str = ""
    collectives: str = ""


# --device auto takes the first of these that is seen.
DEVICE_TYPES = {
    "cuda": DeviceType(("nccl",)),
    "npu": DeviceType(("hccl",), "torch_npu"),
    "musa": DeviceType(("mccl",), "torch_musa"),
    "mlu": DeviceType(("cncl",), "torch_mlu"),
    "hpu": DeviceType(("hccl",), "habana_frameworks.torch",
                       "habana_frameworks.torch.distributed.hccl"),
    "xpu": DeviceType(("xccl", "ccl"), "intel_extension_for_pytorch",
                       "oneccl_bindings_for_pytorch"),
    "mps": DeviceType(),
}  # fmt: skip


# Words that people pass to --device -> the type that they mean.
OTHER_NAMES = {
    **dict.fromkeys(("gpu", "nvidia", "rocm", "amd", "hip"), "cuda"),
    "ascend": "npu", "gaudi": "hpu", "intel": "xpu", "metal": "mps",
}  # fmt: skip


def module_of(kind: str) -> ModuleType | None:
    """`torch.<type>`; None for a type that this PyTorch does not know, and for the CPU."""
    try:
        known = torch.device(kind).type == kind != "cpu"
    except RuntimeError:
        known = False
    return getattr(torch, kind, None) if known else None


def served() -> str | None:
    """The type that torch.accelerator serves; None where there is none."""
    accelerator = getattr(torch, "accelerator", None)  # PyTorch has it from 2.6 on
    if accelerator is None or not accelerator.is_available():
        return None
    return accelerator.current_accelerator().type


def function_of(kind: str, name: str, general: str | None = None) -> Callable | None:
    """A function of `torch.<type>`, or what torch.accelerator has under that or another name."""
    found = getattr(module_of(kind), name, None)
    if found is None and served() == kind:
        found = getattr(torch.accelerator, general or name, None)
    return found


def usable(kind: str) -> bool:
    """Whether this PyTorch has at least one device of that accelerator type. Imports nothing."""
    module = module_of(kind)
    if module is None or not hasattr(module, "device_count"):
        return False
    if kind == "mps":  # torch.mps has no is_available before 2.6
        return torch.backends.mps.is_available()
    return module.is_available() and module.device_count() > 0


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package.split(".")[0]) is not None


def import_package(kind: str) -> None:
    """Import the extension package of a type, if it is installed. UserError if it is broken.

    Its name is torch_<type>, unless it is known to have another one.
    """
    known = DEVICE_TYPES.get(kind)
    package = f"torch_{kind}" if known is None else known.package
    if not package or usable(kind) or not is_installed(package):
        return
    try:
        importlib.import_module(package)
    except Exception as error:  # whatever a package raises whose driver or PyTorch does not fit
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--device {kind}: the package {package} cannot be imported ({reason})",
            f"install the {package} that fits torch {torch.__version__}, or pass --device cpu",
        ) from error


@functools.cache
def import_packages() -> tuple[str, ...]:
    """Import all extension packages that are installed; returns why some could not be."""
    faults = []
    for kind in DEVICE_TYPES:
        try:
            import_package(kind)
        except UserError as error:
            faults.append(error.problem)
    return tuple(faults)


class Graph(Protocol):
    """Captured work: `replay` does it again; `pool` names its memory, which others may share."""

    def replay(self) -> None: ...

    def pool(self) -> object: ...


class Graphs(NamedTuple):
    """How work is captured: `create()` gives an empty graph, and `capture(graph, pool=...)` is a
    context in which work is captured, not done."""

    create: Callable[[], Graph]
    capture: Callable[..., contextlib.AbstractContextManager[None]]
