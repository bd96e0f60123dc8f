"""The memory of this process and of a device: the most in use, and errors where there was none."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch

from bert_pretraining.runtime import device as devices

# What errors of PyTorch, of the system and of vendors' libraries say.
_NO_MEMORY = re.compile("out of memory|OutOfMemory|(allocate|not enough) memory|ALLOC_FAILED")


def says_no_memory(text: str) -> bool:
    """Whether an error's text says that there was no memory, of a device or of the machine."""
    return bool(_NO_MEMORY.search(text))


def status_bytes(key: str) -> int:
    """A figure of /proc/self/status, such as VmRSS or VmHWM; OSError where there is none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes in use so far: of the device, or on a CPU of this process.

    None where the device does not tell.
    """
    if device.type != "cpu":
        return devices.memory(device).peak
    try:
        return status_bytes("VmHWM")
    except OSError:  # no Linux
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
