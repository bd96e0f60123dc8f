"""Counters of energy: those of a machine's CPUs, which Linux shows as RAPL.

`power_nvml.py` has those of the accelerators. Readers take a root directory, so that a made tree
can stand for a machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

POWERCAP = "/sys/class/powercap"
# For tests: another directory in the place of POWERCAP.
POWERCAP_VARIABLE = "BERT_PRETRAINING_POWERCAP"


class CounterError(Exception):
    """A counter cannot be read; the message is one line that says which one and why."""


class State(NamedTuple):
    """What a device does at one moment; None for what it does not tell.

    temperature: degrees Celsius. clock: MHz. utilisation: percent of the time. reasons: why the
    clock is not higher, by the words of `power_nvml.REASONS`.
    """

    temperature: int | None = None
    clock: int | None = None
    utilisation: int | None = None
    reasons: tuple[str, ...] = ()


class MemoryErrors(NamedTuple):
    """What ECC has found in a device's memory; None for what it does not tell.

    corrected, uncorrected: errors since its driver was loaded. rows_pending: whether bad rows or
    pages of the memory wait for a reset of the device to be taken out of use. remap_failed: whether
    that failed, for want of spare rows.
    """

    corrected: int | None = None
    uncorrected: int | None = None
    rows_pending: bool | None = None
    remap_failed: bool | None = None


class Counter(Protocol):
    """Counts the energy of one device.

    source: who tells, such as "NVML". kind: what is counted, such as "GPU". device: its name, as
    the file of samples has it.
    """

    source: str
    kind: str
    device: str

    def joules(self, now: float) -> float:
        """The energy since this object was made. now: seconds. Raises CounterError."""
        ...

    def state(self) -> State: ...

    def memory_errors(self) -> MemoryErrors: ...


@dataclass(frozen=True)
class Found:
    """The counters that can be read, and in one line why others cannot; "" for no reason.

    absent: whether the machine shows none, so that nothing can be done about it.
    """

    counters: list[Counter] = field(default_factory=list)
    reason: str = ""
    absent: bool = False


def describe(kinds: Mapping[tuple[str, str], int]) -> str:
    """ "NVML of 8 GPUs, RAPL of 2 CPU packages" of {(source, kind): number}."""
    words: dict[str, list[str]] = {}
    for (source, kind), number in kinds.items():
        words.setdefault(source, []).append(f"{number} {kind}{'s' if number > 1 else ''}")
    return ", ".join(f"{source} of {' and '.join(what)}" for source, what in words.items())


def kinds_of(counters: Iterable[Counter]) -> dict[tuple[str, str], int]:
    """How many counters there are of each (source, kind)."""
    found: dict[tuple[str, str], int] = {}
    for counter in counters:
        key = (counter.source, counter.kind)
        found[key] = found.get(key, 0) + 1
    return found


# ---- RAPL


def powercap() -> Path:
    """Where Linux shows the counters of this machine's CPUs."""
    return Path(os.environ.get(POWERCAP_VARIABLE) or POWERCAP)


class RaplCounter:
    """One domain of RAPL: microjoules that begin at zero again after `max_energy_range_uj`.

    At 250 W the smallest range in use, 65 kJ, lasts four minutes; who reads more seldom misses
    turns. Raises CounterError where it cannot be read.
    """

    source = "RAPL"

    def __init__(self, zone: Path, kind: str, device: str) -> None:
        self.kind, self.device = kind, device
        self._file = zone / "energy_uj"
        self._range = _number(zone / "max_energy_range_uj")
        self._last, self._total = _number(self._file), 0

    def joules(self, now: float) -> float:
        value = _number(self._file)
        turned = self._range if value < self._last else 0
        self._total += value - self._last + turned
        self._last = value
        return self._total / 1e6

    def state(self) -> State:
        return State()

    def memory_errors(self) -> MemoryErrors:
        return MemoryErrors()


def find_rapl(root: Path) -> Found:
    """The counters of the CPUs: every package, and its memory where that is counted apart.

    A package includes its domains core and uncore, and psys includes the packages: these would
    count twice. AMD's CPUs have the same names, without memory.
    """
    zones = sorted(root.glob("intel-rapl:*"), key=_place)
    counters: list[Counter] = []
    names, package = {}, ""
    try:
        for zone in zones:
            names[zone] = name = (zone / "name").read_text(errors="replace").strip()
            if len(_place(zone)) == 1:
                package = name if name.startswith("package") else ""
                if package:
                    counters.append(RaplCounter(zone, "CPU package", package))
            elif package and name == "dram":
                counters.append(RaplCounter(zone, "memory domain", f"{package} dram"))
    except CounterError as error:
        return Found(reason=str(error))
    except OSError as error:
        return Found(
            reason=f"{error.filename} cannot be read ({error.strerror}); a container hides RAPL "
            "unless it is started with --security-opt systempaths=unconfined"
        )
    if counters:
        return Found(counters)
    seen = f"only {', '.join(names.values())}, no package-*" if names else "no intel-rapl:*"
    return Found(
        reason=f"{root} has {seen}, which would count a CPU's energy; most virtual machines have "
        "none",
        absent=True,
    )


def _place(zone: Path) -> list[int]:
    """[0, 1] of intel-rapl:0:1, the second domain of the first package."""
    return [int(part) for part in zone.name.split(":")[1:] if part.isdigit()]


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError as error:
        # Since Linux 5.10 only root may read it.
        raise CounterError(
            f"no permission to read {path}; until the next start of the machine this gives it: "
            f"sudo chmod a+r {path.parent.parent}/intel-rapl:*/energy_uj"
        ) from error
    except (OSError, ValueError) as error:
        raise CounterError(f"cannot read {path} ({getattr(error, 'strerror', error)})") from error
