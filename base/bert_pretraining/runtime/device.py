"""The devices that PyTorch knows: which there are, and what the package needs of each.

No module but this one and `device_types.py` names an accelerator, except for kernels that are
written for one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bert_pretraining.errors import UserError
from bert_pretraining.runtime.device_types import (
    DEVICE_TYPES,
    OTHER_NAMES,
    DeviceType,
    Graphs,
    function_of,
    import_package,
    import_packages,
    is_installed,
    module_of,
    served,
    usable,
)
from bert_pretraining.runtime.words import counted

_TAKEN_BY_GLOO = ("cpu", "cuda")  # the types of tensors that the backend gloo takes


# ---- which there are


class Chosen(NamedTuple):
    """A device, and what the user should know of the choice."""

    device: torch.device
    notices: tuple[str, ...] = ()


def seen() -> str | None:
    """The type of the accelerator that this PyTorch can use, such as "cuda"; None without one.

    Imports the extension packages that are installed.
    """
    if not usable("cuda"):
        import_packages()
    return next(iter(types()), None)


def types() -> list[str]:
    """All accelerator types that this PyTorch can use now, the preferred one first."""
    names = [*DEVICE_TYPES, torch._C._get_privateuse1_backend_name(), served() or ""]
    return [name for name in dict.fromkeys(names) if usable(name)]


def count(kind: str) -> int:
    """How many devices of a type this PyTorch can use; 0 where it cannot use the type."""
    return module_of(kind).device_count() if usable(kind) else 0


def resolve(asked: str) -> str:
    """The type of device that --device asks for: "cpu", or an accelerator that can be used.

    "auto" stands for CUDA, else another accelerator that is seen, else the CPU. The extension
    package that the type needs is imported. Raises UserError where there is no such device.
    """
    if asked == "cpu":
        return "cpu"
    if asked == "auto":
        return seen() or "cpu"
    if re.fullmatch(r"[a-z][a-z0-9_]*", asked):
        import_package(asked)
        if usable(asked):
            return asked
    found = ", ".join(types())
    fix = f"pass --device {' or '.join([*types(), 'cpu'])}"
    package = DEVICE_TYPES[asked].package if asked in DEVICE_TYPES else ""
    if package and module_of(asked) is None and not is_installed(package):
        raise UserError(
            f"--device {asked}: the package {package}, which brings that type, is not installed",
            f"install the {package} that fits torch {torch.__version__}, or {fix}",
        )
    sees = f"it sees {found}" if found else "it sees no accelerator"
    raise UserError(
        f"--device {asked}: this PyTorch sees no such device{did_you_mean(asked)}; {sees}", fix
    )


def did_you_mean(asked: str) -> str:
    """ "; did you mean cuda?" for "gpu" or "cuda:0"; "" for a type that PyTorch has, and others."""
    word = asked.lower().partition(":")[0]
    meant = OTHER_NAMES.get(word, word if word in (*DEVICE_TYPES, "cpu") else None)
    if word == "gpu":
        meant = next(iter(types()), meant)
    return f"; did you mean {meant}?" if meant not in (None, asked) else ""


def choose(asked: str, local_rank: int) -> Chosen:
    """This rank's device, as --device asks, made the present one of its type.

    local_rank: counts the ranks of this machine from 0; each has a device of its own.
    Raises UserError where there is no such device.
    """
    kind = resolve(asked)
    notices = import_packages() if asked == "auto" and kind != "cuda" else ()
    if kind == "cpu":
        return Chosen(torch.device("cpu"), notices)
    if local_rank >= count(kind):
        raise UserError(
            f"this machine has {counted(count(kind), 'device')} of type {kind}, but the "
            f"configuration wants a rank on device {local_rank}",
            f"pass --nproc_per_node {count(kind)}, or --device cpu",
        )
    if asked == "auto" and kind != "cuda":
        notices = (*notices, f"--device auto chose {kind}")
    select = function_of(kind, "set_device", "set_device_index")
    if select is not None:
        select(local_rank)
    return Chosen(torch.device(kind, local_rank), notices)


def name(device: torch.device) -> str:
    """The product's name; "CPU" for a CPU."""
    if device.type == "cpu":
        return "CPU"
    properties = _told(device, "get_device_properties")
    return _told(device, "get_device_name") or getattr(properties, "name", device.type)


def capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA's compute capability, such as (8, 0); None for a device that has none."""
    found = _told(device, "get_device_capability")
    return tuple(found) if isinstance(found, tuple) and len(found) == 2 else None


def versions(kind: str) -> dict[str, str]:
    """Name -> version of the libraries below PyTorch that the type uses."""
    if kind != "cuda":
        return {}
    found = {
        "cuda_version": str(torch.version.cuda),
        "cudnn_version": str(torch.backends.cudnn.version()),
    }
    if dist.is_nccl_available():
        found["nccl_version"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def built_with() -> str | None:
    """The libraries that PyTorch was built for, "CUDA 12.1" or "ROCm 6.1"; None for neither."""
    kinds = {"CUDA": torch.version.cuda, "ROCm": getattr(torch.version, "hip", None)}
    return next((f"{kind} {version}" for kind, version in kinds.items() if version), None)


# ---- memory


class Memory(NamedTuple):
    """Bytes of a device's memory: all, in use now, and the most in use since `reset_peak_memory`.

    None stands for what PyTorch does not tell.
    """

    total: int | None
    in_use: int | None
    peak: int | None


def memory(device: torch.device) -> Memory:
    """The device's memory at this moment."""
    return Memory(
        getattr(_told(device, "get_device_properties"), "total_memory", None),
        _told(device, "memory_allocated"),
        _told(device, "max_memory_allocated"),
    )


def reset_peak_memory(device: torch.device) -> None:
    """Forget the largest use of memory so far."""
    _told(device, "reset_peak_memory_stats")


def free_unused_memory(device: torch.device) -> None:
    """Give the device back what PyTorch keeps for later tensors, if it keeps any."""
    free = function_of(device.type, "empty_cache")
    if free is not None:
        runs(free)


# ---- what it can do


def is_cuda(device: torch.device) -> bool:
    """Whether it is a CUDA device to PyTorch, as those of NVIDIA, AMD and Iluvatar are."""
    return device.type == "cuda"


def shortcomings(device: torch.device) -> list[str]:
    """What the device lacks and the run does without, one line each."""
    if device.type == "cpu":
        return []
    lacks = {
        "no float64: long sums are computed in float32": wide(device) == torch.float32,
        "no streams: a step waits until its batch is copied": streams(device) is None,
        "no page-locked memory: the host waits for each copy": not can_pin(device),
    }
    return [f"{device.type} devices have {what}" for what, is_so in lacks.items() if is_so]


@functools.cache
def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device computes with a dtype: a small product and its gradient are tried."""
    try:
        x = torch.ones(2, 2, dtype=dtype, device=device, requires_grad=True)
        (x @ x).sum().backward()
        return x.grad.sum().item() == 16.0
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False


def emulates_bf16(device: torch.device) -> bool:
    """Whether a CUDA device computes in bf16 without having it, which is slow."""
    return is_cuda(device) and not torch.cuda.is_bf16_supported(including_emulation=False)


def runs(operation: Callable[[], object]) -> bool:
    """Whether an operation works; many are missing on some types of device."""
    try:
        operation()
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return True


def wide(device: torch.device) -> torch.dtype:
    """The dtype for sums that need many digits: float64, or float32 where it is missing."""
    if device.type == "cpu" or is_cuda(device) or supports(device, torch.float64):
        return torch.float64
    return torch.float32


@functools.cache
def can_pin(device: torch.device) -> bool:
    """Whether page-locked memory makes copies to the device asynchronous."""
    if device.type == "cpu":
        return False
    try:
        which = _pinned_for(device)
        return torch.empty(1).pin_memory(*which).is_pinned(*which)
    except (RuntimeError, TypeError):
        return False


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy in page-locked memory, for copies to the device; the tensor itself without such."""
    return tensor.pin_memory(*_pinned_for(device)) if can_pin(device) else tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU, on the device; where memory can be pinned, nothing is waited for."""
    return pinned(tensor, device).to(device, non_blocking=can_pin(device))


def streams(device: torch.device) -> ModuleType | None:
    """The module that has Stream, stream and current_stream, as torch.cuda does; else None."""
    module = module_of(device.type)
    needed = ("Stream", "Event", "stream", "current_stream")
    return module if all(hasattr(module, name) for name in needed) else None


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Work goes to a stream of its own, between what was given to the usual one before and after.

    Only for a device with streams.
    """
    module = streams(device)
    side = module.Stream(device)
    side.wait_stream(module.current_stream(device))
    with module.stream(side):
        yield
    module.current_stream(device).wait_stream(side)


def graphs(device: torch.device) -> Graphs | None:
    """How work is captured and replayed on the device; None where PyTorch cannot."""
    module = module_of(device.type)
    create = getattr(module, f"{device.type.upper()}Graph", None)
    capture = getattr(module, "graph", None)
    return Graphs(create, capture) if create and capture and streams(device) else None


def current_stream(device: torch.device) -> Any:
    """The stream to which the device's work goes now; None for a device without streams."""
    module = streams(device)
    return module.current_stream(device) if module else None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work that was given to it."""
    wait = None if device.type == "cpu" else function_of(device.type, "synchronize")
    if wait is not None:
        wait(*_which(device))


def synchronize_used() -> None:
    """Wait for the present device of each type that this process has used."""
    for kind in types():
        is_used = getattr(module_of(kind), "is_initialized", None)
        if is_used is None or is_used():
            synchronize(torch.device(kind))


# ---- random numbers


def generator_state(device: torch.device) -> Tensor | None:
    """The state of the device's random generator, on the CPU; None where it cannot be read."""
    read = function_of(device.type, "get_rng_state")
    return read(*_which(device)) if read else None


def set_generator_state(device: torch.device, state: Tensor) -> None:
    """Restore what `generator_state` returned."""
    function_of(device.type, "set_rng_state")(state, *_which(device))


@contextlib.contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """The random generators of the CPU and of the device have the same states after as before."""
    host, own = torch.get_rng_state(), generator_state(device)
    try:
        yield
    finally:
        torch.set_rng_state(host)
        if own is not None:
            set_generator_state(device, own)


# ---- collectives


def backend(kind: str) -> str | None:
    """The backend of collectives on a type of device, if this PyTorch has one; gloo on a CPU."""
    if kind == "cpu":
        return "gloo"
    known = DEVICE_TYPES.get(kind, DeviceType())
    for _ in range(2):
        for name in known.backends:
            if dist.is_backend_available(name):
                return name
        if not known.collectives or not is_installed(known.collectives):
            break
        importlib.import_module(known.collectives)
    tell = getattr(dist, "get_default_backend_for_device", None)  # PyTorch has it from 2.6 on
    try:
        default = tell(kind) if tell else None
    except ValueError:  # PyTorch knows none
        return None
    return default if default and dist.is_backend_available(default) else None


def takes(backend: str, kind: str) -> bool:
    """Whether a backend of collectives takes tensors of a type of device as they are."""
    return backend != "gloo" or kind in _TAKEN_BY_GLOO


# ---- helpers


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """The argument that says which device; torch.mps knows one device and takes none."""
    return () if device.type == "mps" else (device,)


def _told(device: torch.device, name: str) -> Any:
    """What a function of that name says of the device; None where the device does not tell."""
    tell = function_of(device.type, name)
    try:
        return tell(device) if tell else None
    except RuntimeError:  # torch.accelerator has functions that not every type of device serves
        return None


@functools.cache
def _pinned_for(device: torch.device) -> tuple[str, ...]:
    """The argument of pin_memory. Without one, PyTorch before 2.6 pins for CUDA; from then on it
    pins for the accelerator that there is, and warns of an argument."""
    return () if served() else (device.type,)
