"""Accelerators that this machine has, found without PyTorch: it may not see them.

A sign of one is a device file of its driver, a PCI device of its class, or the vendor's tool that
lists it. Readers take a root directory, so that a recorded tree can stand for a machine.
Sources: the PCI ID repository (vendors), the PCI Code and ID Assignment Specification (classes).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Below /dev: one file for each device. The drivers' control files have no number.
DEVICE_FILES = {
    "NVIDIA": "nvidia[0-9]*",
    "Iluvatar": "iluvatar[0-9]*",
    "Huawei Ascend": "davinci[0-9]*",
    "Moore Threads": "mthreads[0-9]*",
    "Cambricon": "cambricon_dev[0-9]*",
    "Habana": "hl[0-9]*",
}
NVIDIA, AMD, INTEL, HUAWEI = "0x10de", "0x1002", "0x8086", "0x19e5"
PCI_VENDORS = {
    NVIDIA: "NVIDIA",
    AMD: "AMD",
    INTEL: "Intel",
    HUAWEI: "Huawei Ascend",
    "0x1e3e": "Iluvatar",
    "0x1ed5": "Moore Threads",
    "0xcabc": "Cambricon",
    "0x1da3": "Habana",
    "0x9999": "MetaX",
    "0x1e36": "Enflame",
    "0x1d94": "Hygon",
    "0x1d22": "Kunlunxin",
}
# Adapters of virtual machines (Red Hat, QEMU, VMware, Microsoft, VirtualBox, Parallels, Amazon,
# Cirrus), and FPGA cards (Xilinx, Altera).
NO_ACCELERATORS = frozenset(
    "0x1af4 0x1b36 0x1234 0x15ad 0x1414 0x80ee 0x1ab8 0x1d0f 0x1013 0x10ee 0x1172".split()
)
# 3D controller, processing accelerator: nothing else has these classes.
COMPUTE_CLASSES = ("0x0302", "0x1200")
# VGA and other display controllers: also the console adapters of servers, Huawei's among them.
DISPLAY_CLASSES = ("0x0300", "0x0380")
WITHOUT_DISPLAY_ADAPTERS = frozenset({HUAWEI})
# AMD's graphics inside a CPU get at most this much memory from the firmware; cards have more.
MOST_INTEGRATED_MEMORY = 4 * 2**30 - 1
# Commands that list devices, and a line of theirs that names one.
TOOLS = {
    "nvidia-smi": ("NVIDIA", "-L", r"^GPU \d+:"),
    "ixsmi": ("Iluvatar", "-L", r"^GPU \d+:"),
    "npu-smi": ("Huawei Ascend", "info -l", r"^\s*NPU ID\s*:\s*\d"),
    "mthreads-gmi": ("Moore Threads", "-L", r"^GPU \d+:"),
    "cnmon": ("Cambricon", "info", r"^Card \d+"),
    "rocm-smi": ("AMD", "--showid", r"^GPU\[\d+\]"),
    "xpu-smi": ("Intel", "discovery", r"Device Name:"),
}
TOOL_TIMEOUT = 10.0  # seconds; a tool hangs where its driver does
# Variables by which users choose devices; each belongs to a vendor's libraries. No device in one
# hides all of them.
VISIBILITY_VARIABLES = (
    "CUDA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES ASCEND_RT_VISIBLE_DEVICES "
    "MUSA_VISIBLE_DEVICES MLU_VISIBLE_DEVICES HABANA_VISIBLE_DEVICES ZE_AFFINITY_MASK"
).split()


@dataclass(frozen=True)
class Accelerator:
    """A device that could train. sign: where it was found, as "/dev/iluvatar0"."""

    vendor: str
    sign: str


def find_accelerators(root: Path = Path("/")) -> tuple[Accelerator, ...]:
    """By device files and PCI devices; only where there are none, by the vendors' tools."""
    return read_accelerators(root) or ask_tools()


def read_accelerators(root: Path) -> tuple[Accelerator, ...]:
    """The accelerators of the machine whose /dev and /sys lie below `root`.

    A device that has a file in /dev and is on the PCI bus counts once.
    """
    by_file = [
        Accelerator(vendor, f"/dev/{path.name}")
        for vendor, pattern in DEVICE_FILES.items()
        for path in sorted((root / "dev").glob(pattern))
    ]
    vendors = {found.vendor for found in by_file}
    by_bus, has_amd_display = [], False
    for path in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor, kind = _text(path / "vendor"), _text(path / "class")
        has_amd_display |= vendor == AMD and kind.startswith(DISPLAY_CLASSES)
        name = PCI_VENDORS.get(vendor, f"PCI vendor {vendor}")
        if _is_accelerator(path, vendor, kind) and name not in vendors:
            by_bus.append(Accelerator(name, f"PCI device {path.name}"))
    found = [*by_file, *by_bus]
    # Where the PCI bus is hidden, AMD's driver still shows. It has files for graphics in a CPU too.
    compute = (root / "dev/kfd").exists() and any((root / "dev/dri").glob("renderD*"))
    if compute and not has_amd_display and "AMD" not in {each.vendor for each in found}:
        found.append(Accelerator("AMD", "/dev/kfd"))
    return tuple(found)


def _is_accelerator(path: Path, vendor: str, kind: str) -> bool:
    if vendor in NO_ACCELERATORS:
        return False
    if vendor == INTEL and path.name.startswith("0000:00:"):
        return False  # on the CPU's own bus: its graphics, or its small neural unit
    if kind.startswith(COMPUTE_CLASSES):
        return True
    if not kind.startswith(DISPLAY_CLASSES) or vendor not in PCI_VENDORS:
        return False
    memory = _text(path / "mem_info_vram_total")  # bytes; of AMD's driver
    if vendor == AMD and memory.isdigit() and int(memory) <= MOST_INTEGRATED_MEMORY:
        return False
    return vendor not in WITHOUT_DISPLAY_ADAPTERS


def ask_tools() -> tuple[Accelerator, ...]:
    """The accelerators that the vendors' tools on PATH list."""
    found = []
    for name, (vendor, arguments, line) in TOOLS.items():
        path = shutil.which(name)
        if path is None:
            continue
        try:
            done = subprocess.run(
                [path, *arguments.split()],
                capture_output=True, text=True, timeout=TOOL_TIMEOUT, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            continue  # it has listed nothing
        if done.returncode == 0:
            count = len(re.findall(line, done.stdout, re.MULTILINE))
            found += [Accelerator(vendor, f"{name} {arguments}")] * count
    return tuple(found)


def visible_devices(environment: Mapping[str, str]) -> str | None:
    """The value of the first variable by which the user chooses devices; None without one."""
    return next((environment[name] for name in VISIBILITY_VARIABLES if name in environment), None)


def hidden_by(environment: Mapping[str, str]) -> str | None:
    """The variable by which the user hides every device, as with CUDA_VISIBLE_DEVICES=""."""
    for name in VISIBILITY_VARIABLES:
        first = environment.get(name, "0").split(",")[0].strip()
        if first in ("", "none", "NoDevFiles") or first.startswith("-"):
            return name
    return None


def describe(accelerators: tuple[Accelerator, ...]) -> str:
    """ "8 Iluvatar accelerators (/dev/iluvatar0, ...)", for each vendor."""
    signs: dict[str, list[str]] = {}
    for found in accelerators:
        signs.setdefault(found.vendor, []).append(found.sign)
    parts = []
    for vendor, where in signs.items():
        more = ", ..." if len(set(where)) > 1 else ""
        plural = "s" if len(where) > 1 else ""
        parts.append(f"{len(where)} {vendor} accelerator{plural} ({where[0]}{more})")
    return " and ".join(parts)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
