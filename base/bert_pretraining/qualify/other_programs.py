"""What other programs use of the CPUs: they make figures of speed worse, and stages late."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bert_pretraining.runtime import process_stat
from bert_pretraining.runtime.process_stat import CHILDREN_SYSTEM, PARENT, USER

BUSY = 0.1  # of a CPU a rank, used by other programs
SLOWED = 0.25  # of the CPUs, used by other programs: from here on a stage may be late for it
RECENT = 0.25  # of a stage's time, before its end: what is late and has found nothing in it, hangs


class CpuTime:
    """The seconds that this process, and all programs, use of the CPUs that this one keeps to."""

    def __init__(self) -> None:
        self._started, self._own, self._all = time.perf_counter(), _own_seconds(), busy_seconds()

    def passed(self) -> dict[str, object]:
        """Since this object was made; "cpus" is empty where the system does not tell."""
        now, cpus = busy_seconds(), sorted(os.sched_getaffinity(0))
        used = {str(cpu): now[cpu] - self._all[cpu] for cpu in cpus if cpu in now}
        own, seconds = _own_seconds() - self._own, time.perf_counter() - self._started
        return {"cpus": used, "own": own, "seconds": seconds}


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def busy_seconds() -> dict[int, float]:
    """CPU -> the seconds in which it did anything since the start of the machine."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:  # no Linux
        return {}
    tick, found = os.sysconf("SC_CLK_TCK"), {}
    for name, *numbers in (line.split() for line in lines if line.startswith("cpu")):
        if name != "cpu":
            user, nice, system, _idle, _wait, *interrupts = map(int, numbers[:8])
            found[int(name[3:])] = (user + nice + system + sum(interrupts)) / tick
    return found


def others_used(passed: Sequence[Mapping]) -> float | None:
    """How many CPUs other programs used, as a mean, of those that the ranks keep to.

    passed: what `CpuTime.passed` returned on each rank. None where the system does not tell.
    """
    cpus = {cpu: used for one in passed for cpu, used in one["cpus"].items()}
    if not cpus:
        return None
    own = sum(one["own"] for one in passed)
    seconds = max(one["seconds"] for one in passed)
    return max(sum(cpus.values()) - own, 0.0) / seconds


def busy_words(used: float | None, ranks: int) -> str:
    """What the user should know of other programs; "" where they used little, or none can tell."""
    if used is None or used < BUSY * ranks:
        return ""
    return (
        f"other programs used {used:.1f} of the CPUs that the ranks keep to: end them, and qualify "
        "again"
    )


class StageTime:
    """The CPU time of a stage, seen from the process that started it, and of all programs."""

    def __init__(self) -> None:
        self._started, self._all = time.monotonic(), busy_seconds()
        self._ended = _ended_children()

    def others_used(self, process: int) -> float | None:
        """How many CPUs programs other than the stage used, as a mean; None if not known.

        process: of the stage, the only child of this process since this object was made. Those
        that it has waited for, and those of its descendants that live, count as its own.
        """
        now, cpus = busy_seconds(), os.sched_getaffinity(0)
        if not now:
            return None
        used = sum(now[cpu] - self._all[cpu] for cpu in cpus if cpu in now)
        own = _ended_children() - self._ended + _tree_seconds(process)
        return max(used - own, 0.0) / (time.monotonic() - self._started)


def slowed(seconds: float, age: float, used: float | None, cpus: int) -> bool:
    """Whether a stage that is late was only slow, and does not hang.

    seconds: it took. age: seconds since it last found something. used: CPUs that other programs
    used, of so many `cpus`.
    """
    # A server whose clock is ahead gives files a time to come; that is no sign of life.
    return used is not None and used >= SLOWED * cpus and abs(age) <= RECENT * seconds


def _ended_children() -> float:
    """CPU seconds of the children that this process has waited for, and of theirs."""
    times = os.times()
    return times.children_user + times.children_system


def _tree_seconds(process: int) -> float:
    """CPU seconds of a process and of its descendants that live or that they have waited for."""
    parents, ticks = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        if not (found := process_stat.fields(pid)):  # it has ended meanwhile
            continue
        parents[pid] = int(found[PARENT])
        ticks[pid] = sum(map(int, found[USER : CHILDREN_SYSTEM + 1]))
    tree, added = set(), {process} & set(parents)
    while added:
        tree |= added
        added = {one for one, parent in parents.items() if parent in added}
    return sum(ticks[one] for one in tree) / os.sysconf("SC_CLK_TCK")
