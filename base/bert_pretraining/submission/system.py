"""A system description, MLPerf's systems/NAME.json, filled from this machine."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

from bert_pretraining import __version__

FIELDS = (
    "submitter division status system_name number_of_nodes host_processors_per_node "
    "host_processor_model_name host_processor_core_count host_processor_vcpu_count "
    "host_processor_frequency host_processor_caches host_processor_interconnect "
    "host_memory_capacity host_storage_type host_storage_capacity host_networking "
    "host_networking_topology host_memory_configuration accelerators_per_node "
    "accelerator_model_name accelerator_host_interconnect accelerator_frequency "
    "accelerator_on-chip_memories accelerator_memory_configuration "
    "accelerator_memory_capacity accelerator_interconnect accelerator_interconnect_topology "
    "cooling hw_notes framework other_software_stack operating_system sw_notes"
).split()
# The other fields may stay blank: in published descriptions they do.
NEEDED_FIELDS = (
    "submitter division status system_name number_of_nodes host_processors_per_node "
    "host_processor_model_name accelerators_per_node framework operating_system"
).split()
# submission_status in the logs -> status in the description, from ruleset 4.0.0 on.
STATUS_IN_DESCRIPTION = {
    "onprem": "Available on-premise",
    "cloud": "Available cloud",
    "preview": "Preview",
    "research": "Research, Development, or Internal (RDI)",
}

# How long to wait for a tool such as lscpu.
TOOL_SECONDS = 20
NVIDIA_QUERY = (
    "name,memory.total,clocks.max.sm,driver_version,pcie.link.gen.max,pcie.link.width.max"
)
PACKAGES = ("numpy", "h5py", "mlperf-logging")
NOT_THERE = "N/A"


def describe_machine() -> dict[str, object]:
    """All FIELDS of this machine; fields that no program can find out stay "".

    It runs in a process of its own, because a query of a GPU takes some of the GPU's memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_describe_machine).result()


def _describe_machine() -> dict[str, object]:
    import torch

    from bert_pretraining.runtime import device as devices

    description: dict[str, object] = dict.fromkeys(FIELDS, "")
    description["number_of_nodes"] = "1"
    description |= processors(_tool("lscpu", "-J"), os.sysconf("SC_NPROCESSORS_ONLN"))
    description["host_memory_capacity"] = memory(_read(Path("/proc/meminfo")))
    description |= storage(_tool("lsblk", "-d", "-b", "-J", "-o", "NAME,ROTA,TRAN,SIZE,TYPE"))
    description["host_networking"] = networking(Path("/sys/class"))
    kind = devices.seen()
    first = torch.device(kind, 0) if kind else None
    description |= accelerators(
        devices.count(kind) if kind else 0,
        first and (devices.name(first), devices.memory(first).total),
        _tool("nvidia-smi", f"--query-gpu={NVIDIA_QUERY}", "--format=csv,noheader"),
    )
    description["framework"] = f"PyTorch {torch.__version__}"
    description["other_software_stack"] = _software(devices.versions(kind) if kind else {})
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)', _read(Path("/etc/os-release")), re.M))
    description["operating_system"] = release.get("PRETTY_NAME", platform.system())
    return {field: description[field] for field in FIELDS}


def blanks(description: dict[str, object]) -> list[str]:
    """The blank fields, which only a person can fill in, without the two optional notes."""
    return [
        field
        for field in FIELDS
        if description.get(field) == "" and field not in ("hw_notes", "sw_notes")
    ]


def processors(lscpu: str, online: int) -> dict[str, str]:
    """The host's processors, from `lscpu -J`; without it only their model and number."""
    found = dict(_lscpu_fields(json.loads(lscpu)["lscpu"])) if lscpu else {}
    caches = [
        f"{name.removesuffix(' cache')} {size}"
        for name, size in found.items()
        if name.endswith(" cache")
    ]
    frequency = found.get("CPU max MHz", "")
    return {
        "host_processors_per_node": found.get("Socket(s)", "1"),
        "host_processor_model_name": found.get("Model name", platform.machine()),
        "host_processor_core_count": found.get("Core(s) per socket", ""),
        "host_processor_vcpu_count": found.get("CPU(s)", str(online)),
        "host_processor_frequency": f"{float(frequency):.0f} MHz (maximum)" if frequency else "",
        "host_processor_caches": ", ".join(caches),
        "host_processor_interconnect": NOT_THERE if found.get("Socket(s)") == "1" else "",
    }


def memory(meminfo: str) -> str:
    """Memory that the system sees, from /proc/meminfo."""
    total = re.search(r"^MemTotal:\s+(\d+) kB", meminfo, re.M)
    return f"{int(total[1]) / 2**20:.0f} GiB" if total else ""


def storage(lsblk: str) -> dict[str, str]:
    """Disks by kind and size, from `lsblk -d -b -J`. The kind of virtual disks is unknown."""
    disks = [
        disk
        for disk in (json.loads(lsblk)["blockdevices"] if lsblk else [])
        if disk["type"] == "disk" and int(disk["size"]) > 0 and not disk["name"].startswith("zram")
    ]
    kinds = {_disk_kind(disk) for disk in disks}
    sizes = Counter(
        f"{int(disk['size']) / 1e9:.0f} GB {_disk_kind(disk)}".strip() for disk in disks
    )
    return {
        "host_storage_type": ", ".join(sorted(kinds - {""})),
        "host_storage_capacity": " + ".join(f"{n}x {size}" for size, n in sorted(sizes.items())),
    }


def networking(classes: Path) -> str:
    """InfiniBand ports and network interfaces, if the system reports their speed."""
    rates = Counter(
        " ".join(_read(path).split()) for path in sorted(classes.glob("infiniband/*/ports/*/rate"))
    )
    speeds = Counter(
        int(text)
        for path in sorted(classes.glob("net/*/speed"))
        if (path.parent / "device").exists() and (text := _read(path).strip()).isdigit()
    )
    found = [f"{count}x InfiniBand {rate}" for rate, count in rates.items() if rate]
    found += [f"{count}x Ethernet {speed} Mb/s" for speed, count in speeds.items()]
    return ", ".join(found)


def accelerators(
    count: int, device: tuple[str, int | None] | None, nvidia_smi: str
) -> dict[str, str]:
    """The accelerators of one machine.

    Args:
        count: as PyTorch sees them.
        device: name and bytes of memory of the first, as PyTorch sees it; None for bytes that it
            does not tell.
        nvidia_smi: lines of NVIDIA_QUERY, "" where there is no such tool.
    """
    if not count or device is None:
        none = {field: NOT_THERE for field in FIELDS if field.startswith("accelerator_")}
        return {**none, "accelerators_per_node": "0"}
    found = {
        "accelerators_per_node": str(count),
        "accelerator_model_name": device[0],
        "accelerator_memory_capacity": f"{device[1] / 2**20:.0f} MiB" if device[1] else "",
    }
    if nvidia_smi.strip():
        values = [value.strip() for value in nvidia_smi.splitlines()[0].split(",")]
        name, capacity, clock, _, generation, width = values
        found |= {
            "accelerator_model_name": name,
            "accelerator_memory_capacity": capacity,
            "accelerator_frequency": f"{clock} (maximum)",
            "accelerator_host_interconnect": f"PCIe Gen{generation} x{width}",
        }
    if count == 1:
        found |= {
            "accelerator_interconnect": NOT_THERE,
            "accelerator_interconnect_topology": NOT_THERE,
        }
    return found


def _software(below_pytorch: dict[str, str]) -> dict[str, str]:
    """The versions of the other software: Python, kernel, packages, libraries of devices, driver.

    below_pytorch: the libraries of the devices that are there.
    """
    versions = {
        "python": platform.python_version(),
        "kernel_version": f"{platform.system()} {platform.release()}",
        "bert_pretraining": __version__,
    }
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    if below_pytorch:
        versions |= below_pytorch
        driver = _tool("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if driver:
            versions["nvidia_kernel_driver"] = driver.split()[0]
    return versions


def _lscpu_fields(entries: list[dict]) -> Iterator[tuple[str, str]]:
    for entry in entries:
        yield entry["field"].rstrip(":"), entry.get("data") or ""
        yield from _lscpu_fields(entry.get("children", []))


def _disk_kind(disk: dict) -> str:
    if disk["name"].startswith("nvme"):
        return "NVMe SSD"
    if disk["name"].startswith("vd"):
        return ""
    return "HDD" if disk["rota"] in (True, "1") else "SSD"


def _tool(*command: str) -> str:
    """A tool's output; "" if it is missing or fails, because the field can stay blank."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read(path: Path) -> str:
    """A file's text; "" if it is missing or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
