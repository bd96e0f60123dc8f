"""Counters of energy: those of NVIDIA's GPUs, and of others whose library has NVML's functions."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime import packages
from bert_pretraining.runtime.device_types import function_of
from bert_pretraining.runtime.power import CounterError, Found, MemoryErrors, State

# The module with NVML's functions, and the package that brings it. A vendor whose module has the
# same functions is served too, where it goes by this name.
MODULE, PACKAGE = "pynvml", "nvidia-ml-py"
# Bits of NVML's "clocks event reasons" (before driver 535: "clocks throttle reasons").
REASONS = {
    0x1: "idle",
    0x2: "clock_setting",
    0x4: "power_cap",
    0x8: "hardware_slowdown",
    0x10: "sync_boost",
    0x20: "software_heat",
    0x40: "hardware_heat",
    0x80: "power_brake",
    0x100: "display_setting",
}
# The reasons that slow a busy device down against its user's will. With power_cap it runs as fast
# as its limit of power lets it: that is usual in training.
SLOWDOWNS = ("hardware_slowdown", "software_heat", "hardware_heat", "power_brake")
POWER_CAP = "power_cap"
# NVML's types of memory errors, and its volatile counter of them.
CORRECTED, UNCORRECTED, SINCE_LOADED = 0, 1, 0


class Identity(NamedTuple):
    """What tells a rank's device from the others of its machine; None for what is not known.

    uuid: without its prefix. bus: the PCI address, as 00000000:3b:00.0. listed: its entry in
    CUDA_VISIBLE_DEVICES, a number or a UUID; without that variable, its number.
    """

    uuid: str | None
    bus: str | None
    listed: str


def identify(device: torch.device) -> Identity | None:
    """The identity of a device that NVML may know; None for others, such as the CPU."""
    if not devices.is_cuda(device):
        return None
    properties = function_of(device.type, "get_device_properties")(device)
    uuid = getattr(properties, "uuid", None)  # PyTorch 2.4 has neither this nor the PCI address
    bus = None
    place = [getattr(properties, f"pci_{of}_id", None) for of in ("domain", "bus", "device")]
    if None not in place:
        bus = "{:08x}:{:02x}:{:02x}.0".format(*place)
    index = device.index or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    entries = [entry.strip() for entry in visible.split(",") if entry.strip()]
    listed = entries[index] if index < len(entries) else str(index)
    return Identity(None if uuid is None else str(uuid), bus, listed)


class NvmlCounter:
    """A GPU: its counter of energy, or where it has none, its power at each reading times the time.

    Raises CounterError where neither can be read.
    """

    source, kind = "NVML", "GPU"

    def __init__(self, nvml: ModuleType, handle: Any, device: str) -> None:
        self.device = device
        self._nvml, self._handle = nvml, handle
        self._total, self._last_time = 0.0, None
        # Counters are as old as the driver's start. Before Volta there are none.
        self._first = self._optional("nvmlDeviceGetTotalEnergyConsumption")
        if self._first is None:
            self._required("nvmlDeviceGetPowerUsage")

    def joules(self, now: float) -> float:
        if self._first is not None:
            millijoules = self._required("nvmlDeviceGetTotalEnergyConsumption") - self._first
            return millijoules / 1e3
        milliwatts = self._required("nvmlDeviceGetPowerUsage")
        if self._last_time is not None:
            self._total += milliwatts / 1e3 * max(now - self._last_time, 0.0)
        self._last_time = now
        return self._total

    def state(self) -> State:
        nvml = self._nvml
        used = self._optional("nvmlDeviceGetUtilizationRates")
        bits = self._optional("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:
            bits = self._optional("nvmlDeviceGetCurrentClocksThrottleReasons")
        return State(
            self._optional("nvmlDeviceGetTemperature", getattr(nvml, "NVML_TEMPERATURE_GPU", 0)),
            self._optional("nvmlDeviceGetClockInfo", getattr(nvml, "NVML_CLOCK_SM", 1)),
            None if used is None else used.gpu,
            reasons_of(bits or 0),
        )

    def memory_errors(self) -> MemoryErrors:
        ecc = "nvmlDeviceGetTotalEccErrors"
        # (corrected, uncorrected, is pending, has failed); before Ampere whole pages are retired.
        rows = self._optional("nvmlDeviceGetRemappedRows")
        pending = (
            self._optional("nvmlDeviceGetRetiredPagesPendingStatus") if rows is None else rows[2]
        )
        return MemoryErrors(
            self._optional(ecc, CORRECTED, SINCE_LOADED),
            self._optional(ecc, UNCORRECTED, SINCE_LOADED),
            None if pending is None else bool(pending),
            None if rows is None else bool(rows[3]),
        )

    def _required(self, function: str) -> int:
        try:
            return getattr(self._nvml, function)(self._handle)
        except (self._nvml.NVMLError, AttributeError) as error:
            raise CounterError(f"NVML cannot read {self.device} ({error})") from error

    def _optional(self, function: str, *which: int) -> Any:
        """What a function says; None where the library or the device does not have it."""
        try:
            return getattr(self._nvml, function)(self._handle, *which)
        except (self._nvml.NVMLError, AttributeError):
            return None


def reasons_of(bits: int) -> tuple[str, ...]:
    """The words for NVML's reasons; an unknown one as its bit, such as 0x200."""
    each = (1 << place for place in range(bits.bit_length()))
    return tuple(REASONS.get(bit, f"0x{bit:x}") for bit in each if bits & bit)


def find_nvml(identities: Iterable[Identity]) -> Found:
    """The counters of these devices, each GPU once, however many ranks have a part of it."""
    identities = list(identities)
    if not identities:
        return Found()
    try:
        nvml = importlib.import_module(MODULE)
    except ImportError:
        return Found(
            reason=f"the module {MODULE} is not installed: {packages.how_to_install([PACKAGE])}"
        )
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Found(reason=f"NVML does not start ({error})")
    counters: dict[str, NvmlCounter] = {}
    reasons = []
    for identity in identities:
        handle = _handle(nvml, identity)
        if handle is None:
            reasons.append(f"NVML does not know the device {identity.uuid or identity.listed}")
            continue
        try:
            uuid = _text(nvml.nvmlDeviceGetUUID(handle))
            if uuid not in counters:
                name = f"GPU {nvml.nvmlDeviceGetIndex(handle)}"
                counters[uuid] = NvmlCounter(nvml, handle, name)
        except CounterError as error:
            reasons.append(str(error))
        except nvml.NVMLError as error:
            reasons.append(f"NVML cannot read the device {identity.listed} ({error})")
    return Found(list(counters.values()), "; ".join(dict.fromkeys(reasons)))


def _handle(nvml: ModuleType, identity: Identity) -> Any:
    """NVML's handle of the GPU that is the device, or that the device is a part of; else None."""
    ways = []
    if identity.uuid is not None:
        ways.append(lambda: _by_uuid(nvml, f"GPU-{identity.uuid}"))
        ways.append(lambda: _by_uuid(nvml, f"MIG-{identity.uuid}"))
    if identity.bus is not None:
        ways.append(lambda: nvml.nvmlDeviceGetHandleByPciBusId(identity.bus.encode()))
    if identity.listed.isdigit():
        # NVML counts by PCI address. So does CUDA between GPUs of one model.
        ways.append(lambda: nvml.nvmlDeviceGetHandleByIndex(int(identity.listed)))
    else:
        ways.append(lambda: _by_uuid(nvml, identity.listed))
        ways.append(lambda: _by_beginning(nvml, identity.listed))
    for way in ways:
        try:
            found = way()
        except (nvml.NVMLError, AttributeError):  # not found, or a function that is missing
            continue
        if found is not None:
            return found
    return None


def _by_uuid(nvml: ModuleType, uuid: str) -> Any:
    """The GPU with that UUID, or the one that the MIG instance with that UUID is a part of."""
    found = nvml.nvmlDeviceGetHandleByUUID(uuid.encode())
    if uuid.startswith("MIG"):
        return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(found)
    return found


def _by_beginning(nvml: ModuleType, beginning: str) -> Any:
    """The only GPU whose UUID begins so: CUDA_VISIBLE_DEVICES may hold as little."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    found = [each for each in handles if _text(nvml.nvmlDeviceGetUUID(each)).startswith(beginning)]
    return found[0] if len(found) == 1 else None


def _text(value: str | bytes) -> str:
    """Older modules give bytes."""
    return value.decode() if isinstance(value, bytes) else value
