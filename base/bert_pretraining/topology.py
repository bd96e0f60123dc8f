"""Which CPUs each rank of this machine gets. Pure, but for the two readers at the end."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Binding:
    """A rank's CPUs, and its number of threads."""

    cpus: tuple[int, ...]
    threads: int

    @property
    def cpu_list(self) -> str:
        """As numactl reads it: 0-3,8."""
        runs: list[list[int]] = []
        for cpu in self.cpus:
            if runs and cpu == runs[-1][1] + 1:
                runs[-1][1] = cpu
            else:
                runs.append([cpu, cpu])
        return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)

    def numactl(self) -> list[str]:
        """The command that the rank's own is put behind."""
        return ["numactl", f"--physcpubind={self.cpu_list}", "--localalloc"]


def split_cpus(allowed: list[int], num_ranks: int) -> list[Binding]:
    """Deal the allowed CPUs to the ranks of one machine.

    Ranks get neighbouring CPUs, as many each as there are (the first ones one more where
    they do not divide). Where there are more ranks than CPUs, CPUs are shared evenly.
    """
    cpus = sorted(allowed)
    if not cpus or num_ranks < 1:
        raise ValueError(f"{len(cpus)} CPUs for {num_ranks} ranks")
    if num_ranks >= len(cpus):
        return [Binding((cpus[rank * len(cpus) // num_ranks],), 1) for rank in range(num_ranks)]
    share, rest = divmod(len(cpus), num_ranks)
    bindings = []
    start = 0
    for rank in range(num_ranks):
        end = start + share + (rank < rest)
        bindings.append(Binding(tuple(cpus[start:end]), end - start))
        start = end
    return bindings


def allowed_cpus() -> list[int]:
    """The CPUs that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def numactl_fault(bindings: list[Binding]) -> str | None:
    """Why numactl cannot bind here, or None if it can. It is tried, not guessed."""
    if shutil.which("numactl") is None:
        return "numactl is not installed"
    cpus = tuple(sorted({cpu for binding in bindings for cpu in binding.cpus}))
    trial = subprocess.run(
        [*Binding(cpus, 1).numactl(), "true"], capture_output=True, text=True, check=False
    )
    if trial.returncode == 0:
        return None
    return "numactl: " + (trial.stderr.strip().splitlines() or ["refused"])[0]
