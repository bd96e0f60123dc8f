"""The JSON file of a benchmark: the machine, the versions, the commit, the figures."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from pathlib import Path

from bert_pretraining.errors import UserError
from bert_pretraining.logs.run_folder import versions
from bert_pretraining.runtime.files import write_whole

ROOT = Path(__file__).resolve().parents[3]


def is_pretended() -> bool:
    """Whether stub libraries stand for those of a GPU: kernels then compute nothing.

    No time of such a GPU means anything. See benchmarks/pretended.py.
    """
    return bool(os.environ.get("PRETENDED_GPU"))


def circumstances() -> dict[str, object]:
    """CPU model and number of CPUs, versions, commit: what the figures depend on."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
            break
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        commit = "unknown: git is not installed"
    return {
        **({"pretended_gpu": True} if is_pretended() else {}),
        "cpu": model,
        "machine": platform.machine(),
        "cpus_allowed": len(os.sched_getaffinity(0)),
        "commit": commit,
        "versions": versions(),
    }


def spread(values: list[float]) -> dict[str, float]:
    """n, minimum, median and maximum."""
    return {
        "n": len(values),
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
    }


def write(path: Path, figures: dict[str, object]) -> None:
    """Write `figures` and the circumstances as JSON."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({**circumstances(), **figures}, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})", "name another file") from error
