"""What this machine has and what this process may use of it, as sysfs and /proc tell.

Every reader takes a root directory, so that a recorded tree can stand for a machine.
Sources: Documentation/ABI/stable/sysfs-devices-node, sysfs-devices-system-cpu,
sysfs-bus-pci and admin-guide/cgroup-v2 of the Linux kernel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.topology import cpu_list

# PCI vendors whose display controllers or accelerators are taken for devices to train on.
VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x1e3e": "Iluvatar"}
# VGA controller, 3D controller, other display controller, processing accelerator.
DEVICE_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")
NVIDIA_SMI_QUERY = "index,uuid,pci.bus_id,name,memory.total,compute_cap"


@dataclass(frozen=True)
class Core:
    """A physical core: its allowed hardware threads, and its NUMA node."""

    threads: tuple[int, ...]
    node: int


@dataclass(frozen=True)
class Node:
    """A NUMA node. `distances`: to each node, from the firmware; may be empty."""

    number: int
    has_memory: bool
    distances: dict[int, int]


@dataclass(frozen=True)
class Gpu:
    """A GPU. `node`: its NUMA node, None if the firmware does not report it."""

    name: str
    pci_address: str
    node: int | None
    uuid: str = ""
    memory_mib: int = 0
    capability: str = ""


@dataclass(frozen=True)
class Machine:
    """The hardware a process may use. `cpu_quota`: CPUs that its cgroup allows, if limited."""

    cores: tuple[Core, ...]
    nodes: tuple[Node, ...]
    gpus: tuple[Gpu, ...] = ()
    cpu_quota: float | None = None

    @property
    def num_memory_nodes(self) -> int:
        return sum(node.has_memory for node in self.nodes)


def read_machine(
    root: Path = Path("/"),
    nvidia_smi: str | None = None,
    visible_devices: str | None = None,
    allowed: set[int] | None = None,
) -> Machine:
    """The machine whose /proc and /sys lie below `root`.

    Args:
        nvidia_smi: what `query_nvidia_smi` returned, None where there is none.
        visible_devices: what `accelerators.visible_devices` returned.
        allowed: CPUs; None reads them from /proc/self/status.
    """
    system = root / "sys/devices/system"
    status = _text(root / "proc/self/status")
    if allowed is None:
        named = _allowed(status, "Cpus") or _list(system / "cpu/online")
        allowed = set(named or range(os.cpu_count() or 1))
    nodes, node_of = _nodes(system, _allowed(status, "Mems"))
    return Machine(
        cores=_cores(system, allowed, node_of),
        nodes=nodes,
        gpus=visible_gpus(_gpus(root, nvidia_smi), visible_devices),
        cpu_quota=_cpu_quota(root),
    )


def query_nvidia_smi() -> str | None:
    """nvidia-smi's list of GPUs as CSV; None if nvidia-smi is missing or fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        done = subprocess.run(
            [command, f"--query-gpu={NVIDIA_SMI_QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def visible_gpus(gpus: tuple[Gpu, ...], visible_devices: str | None) -> tuple[Gpu, ...]:
    """The GPUs that a variable such as CUDA_VISIBLE_DEVICES leaves, in its order.

    As CUDA reads it: indices or the beginnings of UUIDs, up to the first that is neither.
    """
    if visible_devices is None:
        return gpus
    chosen = []
    for word in visible_devices.split(","):
        word = word.strip()
        matches = [gpu for gpu in gpus if word and gpu.uuid.startswith(word)]
        if word.isdigit() and int(word) < len(gpus):
            matches = [gpus[int(word)]]
        if len(matches) != 1:
            break
        chosen += matches
    return tuple(chosen)


def _text(path: Path) -> str:
    """A file's content; empty if there is no such file (sysfs and /proc differ by kernel)."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _list(path: Path) -> tuple[int, ...]:
    return cpu_list.parse(_text(path))


def _allowed(status: str, what: str) -> tuple[int, ...]:
    """`Cpus` or `Mems` of /proc/self/status: what cpuset and affinity allow."""
    found = re.search(rf"^{what}_allowed_list:\s*(\S+)", status, re.MULTILINE)
    return cpu_list.parse(found[1]) if found else ()


def _numbered(directory: Path, prefix: str) -> list[int]:
    names = (path.name.removeprefix(prefix) for path in directory.glob(f"{prefix}[0-9]*"))
    return sorted(int(name) for name in names if name.isdigit())


def _nodes(system: Path, mems: tuple[int, ...]) -> tuple[tuple[Node, ...], dict[int, int]]:
    """(NUMA nodes, CPU -> node). A kernel without NUMA counts as one node with everything."""
    numbers = _numbered(system / "node", "node")
    node_of: dict[int, int] = {}
    nodes = []
    with_memory = _list(system / "node/has_memory") or tuple(numbers)
    for number in numbers:
        directory = system / f"node/node{number}"
        node_of.update(dict.fromkeys(_list(directory / "cpulist"), number))
        distances = [int(word) for word in _text(directory / "distance").split()]
        usable = number in with_memory and (not mems or number in mems)
        # The file lists the distances to the online nodes, in their order.
        by_node = dict(zip(numbers, distances, strict=False))
        nodes.append(Node(number, usable, by_node))
    return tuple(nodes) or (Node(0, True, {}),), node_of


def _cores(system: Path, allowed: set[int], node_of: dict[int, int]) -> tuple[Core, ...]:
    threads: dict[tuple[int, ...], list[int]] = {}
    for cpu in sorted(allowed):
        topology = system / f"cpu/cpu{cpu}/topology"
        # thread_siblings_list is the older name of core_cpus_list.
        siblings = _list(topology / "core_cpus_list") or _list(topology / "thread_siblings_list")
        threads.setdefault(siblings or (cpu,), []).append(cpu)
    cores = (Core(tuple(cpus), node_of.get(cpus[0], 0)) for cpus in threads.values())
    return tuple(sorted(cores, key=lambda core: (core.node, core.threads)))


def _gpus(root: Path, nvidia_smi: str | None) -> tuple[Gpu, ...]:
    devices = root / "sys/bus/pci/devices"
    if nvidia_smi is not None:
        return tuple(_gpu_of_line(line, devices) for line in nvidia_smi.splitlines() if "," in line)
    found = []
    for path in sorted(devices.glob("*")):
        vendor, kind = _text(path / "vendor"), _text(path / "class")
        # This leaves out the display adapters of management controllers: other vendors.
        if vendor in VENDORS and kind.startswith(DEVICE_CLASSES):
            found.append(Gpu(VENDORS[vendor], path.name, _pci_node(path)))
    return tuple(found)


def _gpu_of_line(line: str, devices: Path) -> Gpu:
    """A line of NVIDIA_SMI_QUERY. Fields that it does not know read [N/A]."""
    fields = [field.strip() for field in line.split(",")]
    _, uuid, bus, name, memory, capability = (fields + [""] * 6)[:6]
    # nvidia-smi writes the domain in 8 digits, sysfs in 4.
    address = re.sub(r"^0000(?=[0-9a-f]{4}:)", "", bus.lower())
    capability = capability if re.fullmatch(r"\d+\.\d+", capability) else ""
    mib = int(memory) if memory.isdigit() else 0
    return Gpu(name, address, _pci_node(devices / address), uuid, mib, capability)


def _pci_node(device: Path) -> int | None:
    text = _text(device / "numa_node")
    return int(text) if text.isdigit() else None  # -1: the firmware does not report it


def _cpu_quota(root: Path) -> float | None:
    """The smallest CPU limit of this process's cgroup and the cgroups above it, in CPUs."""
    quotas = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if controllers:
            if "cpu" not in controllers.split(","):
                continue
            mount = next((m for m in (mount / controllers, mount / "cpu") if m.is_dir()), mount)
        # In a container the path may be the host's; its own limits then lie at the mount.
        directory = mount / path.strip("/")
        while True:
            quotas += _quota_of(directory)
            if directory == mount or mount not in directory.parents:
                break
            directory = directory.parent
    return min(quotas, default=None)


def _quota_of(directory: Path) -> list[float]:
    words = _text(directory / "cpu.max").split()
    if not words:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")  # cgroup version 1
        words = [_text(directory / name) for name in names]
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
        return [int(words[0]) / int(words[1])]
    return []
