"""The device type `testdev` of tests, as an extension package such as torch_npu brings its own.

Importing it makes `torch.device("testdev")` and `torch.testdev` work. The compiled part lies beside
it; `tests/testdev_build.py` makes it. Streams, pinned memory, graphs and collectives are missing on
purpose: the package has to do without them.
"""

from __future__ import annotations

import types
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = "libtestdev.so"
_OPS = torch.ops.testdev
# torch.accelerator has these for every type of device; so a type's own module may lack them.
_GENERAL = ("set_device", "synchronize")


def _index(device: object = None) -> int:
    if device is None:
        return _OPS.current_device()
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return _OPS.current_device() if index is None else index


def _seed_all(seed: int) -> None:
    for index in range(_OPS.device_count()):
        _OPS.manual_seed(seed, index)


class _Properties:
    name = "Test device"
    total_memory = 2**30


def _module() -> types.ModuleType:
    module = types.ModuleType("torch.testdev")
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "device_count": lambda: _OPS.device_count(),
        "current_device": lambda: _OPS.current_device(),
        "set_device": lambda device: _OPS.set_device(_index(device)),
        "get_device_name": lambda device=None: _Properties.name,
        "get_device_properties": lambda device=None: _Properties(),
        "synchronize": lambda device=None: None,
        "manual_seed": lambda seed: _OPS.manual_seed(seed, _OPS.current_device()),
        "manual_seed_all": _seed_all,
        "get_rng_state": lambda device=None: _OPS.get_rng_state(_index(device)),
        "set_rng_state": _set_rng_state,
        "memory_allocated": lambda device=None: _OPS.memory(_index(device))[0],
        "max_memory_allocated": lambda device=None: _OPS.memory(_index(device))[1],
        "reset_peak_memory_stats": lambda device=None: _OPS.reset_peak(_index(device)),
    }
    for name, function in functions.items():
        if not (name in _GENERAL and hasattr(torch, "accelerator")):
            setattr(module, name, function)
    return module


def _set_rng_state(state: Tensor, device: object = None) -> None:
    _OPS.set_rng_state(state, _index(device))


torch.ops.load_library(str(Path(__file__).with_name(LIBRARY)))
torch.utils.rename_privateuse1_backend("testdev")
torch._register_device_module("testdev", _module())
torch.utils.generate_methods_for_privateuse1_backend()
