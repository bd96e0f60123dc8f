"""Counters of energy that a test controls: a tree of RAPL, a module with NVML's functions."""

from __future__ import annotations

import types
from pathlib import Path

from bert_pretraining.runtime.power import CounterError, State

RANGE = 262_143_328_850  # microjoules, as on Intel's servers


def make_rapl(root: Path, zones: dict[str, str], microjoules: int = 0) -> Path:
    """A tree as Linux shows it, from {"0:1": "dram", ...}."""
    for place, name in zones.items():
        zone = root / f"intel-rapl:{place}"
        zone.mkdir(parents=True)
        (zone / "name").write_text(f"{name}\n")
        (zone / "max_energy_range_uj").write_text(f"{RANGE}\n")
        (zone / "energy_uj").write_text(f"{microjoules}\n")
    return root


class Steady:
    """A device that takes the same power all the time, from the first reading on."""

    def __init__(
        self, watts: float, device: str = "package-0", source: str = "RAPL", kind: str = "CPU"
    ) -> None:
        self.watts, self.device, self.source, self.kind = watts, device, source, kind
        self.now_state = State()
        self._since: float | None = None

    def joules(self, now: float) -> float:
        self._since = now if self._since is None else self._since
        return self.watts * (now - self._since)

    def state(self) -> State:
        return self.now_state


class Broken(Steady):
    """Fails at the reading with this number, from 1."""

    def __init__(self, at: int) -> None:
        super().__init__(1.0)
        self.at, self.readings = at, 0

    def joules(self, now: float) -> float:
        self.readings += 1
        if self.readings >= self.at:
            raise CounterError("cannot read package-0 (Input/output error)")
        return super().joules(now)


class NvmlError(Exception):
    """As pynvml's NVMLError: text by number."""

    TEXTS = types.MappingProxyType({2: "Invalid Argument", 3: "Not Supported", 6: "Not Found"})

    def __init__(self, value: int) -> None:
        super().__init__(self.TEXTS.get(value, "NVML Shared Library Not Found"))
        self.value = value


class Gpu:
    """A GPU as NVML sees it. lacks: functions that answer "Not Supported"."""

    def __init__(self, uuid: str, bus: str, mig: tuple[str, ...] = (), lacks: str = "") -> None:
        self.uuid, self.bus, self.mig, self.lacks = uuid, bus, mig, lacks.split()
        self.millijoules, self.milliwatts, self.reasons = 10**9, 0, 0
        self.ecc = [0, 0]  # corrected, uncorrected
        self.remapped = (0, 0, 0, 0)  # corrected, uncorrected, is pending, has failed
        self.pages_pending = 0


def nvml_module(gpus: list[Gpu], starts: bool = True) -> types.ModuleType:
    """The functions of `pynvml` that the package may call, over these GPUs in this order."""
    module = types.ModuleType("pynvml")
    module.NVMLError, module.NVML_TEMPERATURE_GPU, module.NVML_CLOCK_SM = NvmlError, 0, 1

    def function(body: object) -> None:
        setattr(module, body.__name__, body)

    def found(matches: list) -> object:
        if not matches:
            raise NvmlError(6)
        return matches[0]

    @function
    def nvmlInit() -> None:
        if not starts:
            raise NvmlError(12)

    @function
    def nvmlDeviceGetCount() -> int:
        return len(gpus)

    @function
    def nvmlDeviceGetHandleByIndex(index: int) -> Gpu:
        if index >= len(gpus):
            raise NvmlError(2)
        return gpus[index]

    @function
    def nvmlDeviceGetHandleByUUID(uuid: bytes) -> object:
        name = uuid.decode()
        of_mig = [(gpu, part) for gpu in gpus for part in gpu.mig if part == name]
        return found([gpu for gpu in gpus if gpu.uuid == name] or of_mig)

    @function
    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle: object) -> Gpu:
        return handle[0]

    @function
    def nvmlDeviceGetHandleByPciBusId(bus: bytes) -> Gpu:
        return found([gpu for gpu in gpus if gpu.bus == bus.decode()])

    @function
    def nvmlDeviceGetUUID(gpu: Gpu) -> str:
        return gpu.uuid

    @function
    def nvmlDeviceGetIndex(gpu: Gpu) -> int:
        return gpus.index(gpu)

    def told(name: str, answer: object) -> None:
        def tell(gpu: Gpu, *which: int) -> object:
            if name in gpu.lacks:
                raise NvmlError(3)
            return answer(gpu, *which)

        setattr(module, name, tell)

    told("nvmlDeviceGetTotalEnergyConsumption", lambda gpu: gpu.millijoules)
    told("nvmlDeviceGetPowerUsage", lambda gpu: gpu.milliwatts)
    told("nvmlDeviceGetTemperature", lambda gpu, _: 61)
    told("nvmlDeviceGetClockInfo", lambda gpu, _: 1755)
    told("nvmlDeviceGetUtilizationRates", lambda gpu: types.SimpleNamespace(gpu=97, memory=40))
    told("nvmlDeviceGetCurrentClocksEventReasons", lambda gpu: gpu.reasons)
    told("nvmlDeviceGetCurrentClocksThrottleReasons", lambda gpu: gpu.reasons)
    told("nvmlDeviceGetTotalEccErrors", lambda gpu, which, _: gpu.ecc[which])
    told("nvmlDeviceGetRemappedRows", lambda gpu: gpu.remapped)
    told("nvmlDeviceGetRetiredPagesPendingStatus", lambda gpu: gpu.pages_pending)
    return module
