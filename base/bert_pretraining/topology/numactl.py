"""Whether numactl can bind on this machine, by trying it."""

from __future__ import annotations

import shutil
import subprocess

from bert_pretraining.topology.placement import Binding


def numactl_fault(bindings: list[Binding]) -> str | None:
    """Why numactl cannot bind the ranks like this; None if it can."""
    if shutil.which("numactl") is None:
        return "numactl is not installed"
    for prefix in dict.fromkeys(tuple(binding.numactl()) for binding in bindings):
        trial = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
        if trial.returncode:
            return "numactl: " + (trial.stderr.strip().splitlines() or ["refused"])[0]
    return None
