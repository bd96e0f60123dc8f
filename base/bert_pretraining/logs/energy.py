"""The energy of a run: who reads which counters, and the sums over all machines."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bert_pretraining.errors import UserError
from bert_pretraining.logs.energy_sampler import (
    PERIOD,
    EnergyMonitor,
    MachineEnergy,
    Sampler,
)
from bert_pretraining.logs.line_file import LineFile
from bert_pretraining.logs.mlperf_power import FEWEST_READINGS, MlperfPower
from bert_pretraining.logs.power_file import PowerFile
from bert_pretraining.logs.sinks import Energy
from bert_pretraining.runtime import agreement, power, power_nvml, process_group
from bert_pretraining.runtime.power import Found
from bert_pretraining.runtime.power_nvml import Identity
from bert_pretraining.runtime.words import counted

OFF, MLPERF = "off", "mlperf"  # of the setting `energy`
NO_COUNTERS = "not measured (this machine shows no power counters)"
MLPERF_PERIOD = 0.5  # seconds: MLPerf wants no gap of more than one


class Begun(NamedTuple):
    """What the first rank of a machine began, what it says of it, and why not all that was asked.

    told: "" where there is nothing to say, as on the other ranks. detail: what was looked for in
    vain, for who wants to know more.
    """

    monitor: EnergyMonitor | None = None
    told: str = ""
    fault: str = ""
    detail: str = ""


class RunEnergy:
    """The energy of a run over all its machines, as one rank sees it; see `measure`.

    Without arguments it is one that is not measured.
    """

    def __init__(
        self, say: Callable[[str], None] | None = None, begun: Begun | None = None
    ) -> None:
        begun = begun or Begun()
        self._say, self._monitor, self._told = say, begun.monitor, False
        self._without = begun.monitor is None and bool(begun.told)  # a machine without counters

    def mark(self, what: int) -> None:
        """Something happens in the run now, such as TRAINING_BEGAN. Waits for nothing."""
        if self._monitor is not None:
            self._monitor.mark(what)

    def check(self) -> None:
        """Say once where the sampling has ended."""
        if self._monitor is not None and self._monitor.failure and not self._told:
            self._told = True
            self._say(f"Energy is not measured any more: {self._monitor.failure}")

    def finish(self, sequences: int) -> Energy | None:
        """The sums over all machines, on rank 0; None where not every machine has counted.

        A collective; None on other ranks.

        sequences: trained meanwhile.
        """
        if self._say is None:
            return None
        own = MachineEnergy(socket.gethostname(), {}) if self._without else None
        if self._monitor is not None:
            own = self._monitor.finish()
        self.check()
        machines = process_group.gather_to_main(own)
        if machines is None:
            return None
        machines = [each for each in machines if each is not None]
        energy, reason = add_up(machines, sequences)
        if reason and not self._told:
            self._say(f"No energy of the run: {reason}")
        for each in machines:
            if each.readings is not None and each.readings < FEWEST_READINGS:
                self._say(
                    f"Notice: {each.host} took {counted(each.readings, 'power reading')}; MLPerf "
                    f"wants at least {FEWEST_READINGS} from run_start to run_stop: train longer"
                )
        return energy

    def close(self) -> None:
        if self._monitor is not None:
            self._monitor.close()


def add_up(machines: Sequence[MachineEnergy], sequences: int) -> tuple[Energy | None, str]:
    """The energy of all machines, or None and why; no reason where none has a counter."""
    counting = [each for each in machines if each.kinds]
    if not counting:
        return None, ""
    for each in machines:
        if each.failure:
            return None, f"on {each.host} {each.failure}"
        if not each.kinds:
            return None, f"{each.host} has no counter that can be read"
        if not each.run.joules:
            return None, f"the counters of {each.host} stood still, as those of virtual machines do"
    kinds: dict[tuple[str, str], int] = {}
    for each in machines:
        for kind, number in each.kinds.items():
            kinds[kind] = kinds.get(kind, 0) + number
    return (
        Energy(
            source=power.describe(kinds),
            run=sum(each.run.joules for each in machines),
            training=sum(each.training.joules for each in machines),
            sequences=sequences,
            training_seconds=max(each.training.seconds for each in machines),
        ),
        "",
    )


class Rank(NamedTuple):
    """What each rank tells the others before the energy is measured.

    is_first: of its machine. boot: names the machine's running system, the same in all its
    containers. device: its type. identity: None where NVML cannot know the device. folder: of the
    run, from rank 0.
    """

    rank: int
    host: str
    is_first: bool
    boot: str
    device: str
    identity: Identity | None
    folder: Path | None


def measure(
    setting: str,
    rank: int,
    device: torch.device,
    folder: Path | None,
    say: Callable[[str], None],
) -> RunEnergy:
    """Begin to measure on every machine, unless the setting is "off". A collective.

    The first rank of each machine reads the counters of the devices that its machine's ranks use,
    and of the CPUs. What is measured, or why nothing is, is said once, on rank 0.

    Raises:
        UserError: "mlperf" is asked for, and there is a machine without counters, or without those
            of its ranks' devices, or whose file cannot be written; the same on every rank.
    """
    if setting == OFF:
        return RunEnergy()
    own = Rank(
        rank,
        socket.gethostname(),
        process_group.is_first_of_its_machine(),
        _boot_id(),
        device.type,
        power_nvml.identify(device),
        folder,
    )
    ranks = process_group.gather(own)
    begun = Begun()
    if own.is_first:
        try:
            begun = _begin(setting, ranks, own)
        except Exception as error:  # of a vendor's library; the run needs no counters
            fault = f"{type(error).__name__}: {error}"
            begun = Begun(told=f"not measured: {fault}", fault=fault)
    if setting == MLPERF:
        problem = f"on {own.host} {begun.fault}" if begun.fault else None
        problem = agreement.first_said(problem, device)
        if problem is not None:
            if begun.monitor is not None:
                begun.monitor.close()
            raise UserError(
                f"--energy mlperf: {problem}", "mend that, or leave out --energy mlperf"
            )
    for name, own_text in (("Energy", begun.told), ("Power counters", begun.detail)):
        lines = agreement.distinct([own_text] if own_text else [], device)
        for text in lines:
            host = agreement.first_said(own.host if own_text == text else None, device)
            say(f"{name}{f' on {host}' if len(lines) > 1 else ''}: {text}")
    return RunEnergy(say, begun)


def _begin(setting: str, ranks: Sequence[Rank], own: Rank) -> Begun:
    """Find this machine's counters, and begin to read them."""
    here = [each for each in ranks if each.host == own.host]
    accelerators = power_nvml.find_nvml(
        dict.fromkeys(each.identity for each in here if each.identity is not None)
    )
    # Of the containers of one machine, the first counts the CPUs of all.
    counts_cpus = own == next(each for each in ranks if each.is_first and each.boot == own.boot)
    cpus = power.find_rapl(power.powercap()) if counts_cpus else Found()
    counters = [*accelerators.counters, *cpus.counters]
    missing = "; ".join(filter(None, [accelerators.reason, cpus.reason]))
    if not counters:
        fault = f"no energy counter can be read: {missing}" if missing else ""
        if cpus.absent and not accelerators.reason:
            return Begun(told=NO_COUNTERS, fault=fault, detail=missing)
        return Begun(told=f"not measured: {missing}" if missing else "", fault=fault)
    kinds = power.kinds_of(counters)
    told = power.describe(kinds) + (f"; not counted: {missing}" if missing else "")
    uncounted = ""
    if own.device != "cpu" and (accelerators.reason or not accelerators.counters):
        reason = accelerators.reason or "NVML does not know them"
        uncounted = f"the devices of type {own.device} are not counted: {reason}"
        if setting == MLPERF:  # a power log without them would look like one of the whole machine
            return Begun(told=told, fault=uncounted)
    file = mlperf = None
    try:
        file, mlperf = _files(setting, ranks, own)
    except OSError as error:
        fault = f"{error.filename} cannot be written ({error.strerror})"
        if setting == MLPERF:
            return Begun(told=told, fault=fault)
        told += f"; {fault}"
    period = PERIOD if mlperf is None else MLPERF_PERIOD
    sampler = Sampler(counters, period, file, mlperf)
    return Begun(EnergyMonitor(sampler, kinds, uncounted), told)


def _files(
    setting: str, ranks: Sequence[Rank], own: Rank
) -> tuple[PowerFile | None, MlperfPower | None]:
    """This machine's files in the run's folder; none where its disks do not have that folder.

    MLPerf's is asked for: the folder is then made.
    """
    folder = ranks[0].folder
    if folder is None:
        return None, None
    firsts = [each for each in ranks if each.is_first]
    node = firsts.index(own)
    mlperf = None
    if setting == MLPERF:
        (folder / "power").mkdir(parents=True, exist_ok=True)
        file = LineFile(folder / "power" / f"node_{node}.txt")
        mlperf = MlperfPower(file, f"node_{node}", MLPERF_PERIOD / 2)
    if not folder.is_dir():
        return None, None
    shared = [each.host for each in firsts].count(own.host) > 1  # a name of several machines
    name = f"power-{own.host}{f'-{node}' if shared else ''}.csv" if node else "power.csv"
    return PowerFile(LineFile(folder / name)), mlperf


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()
