"""Is the software complete, and does it fit together?

Python, the packages and apex are what `doctor` checks. Here are added what PyTorch was built for,
the libraries below it, and variables that slow down a run.

A fail: a package is missing or too old; PyTorch does not see this machine's accelerators; a
variable makes the device wait for each kernel. A note: what a run can do without.

Figures: `versions`, name -> version ("not installed" where it is missing): those of packages,
`built_with` (what PyTorch was built for), `driver`, `collectives` (the backend and its version),
`numactl`, and the libraries below PyTorch; `variables`, name -> value, of those that matter and
are set.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from bert_pretraining import topology
from bert_pretraining.doctor import software as packages_of_doctor
from bert_pretraining.doctor.report import NOTE as DOCTOR_NOTE
from bert_pretraining.doctor.report import PROBLEM, CheckResult
from bert_pretraining.launch import cpu_instead
from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.machine import first, told
from bert_pretraining.qualify.record import FAIL, NOTE, PASS, Finding
from bert_pretraining.qualify.stages import Tell
from bert_pretraining.runtime import packages
from bert_pretraining.runtime.words import counted

PACKAGES = ("torch", "triton", "apex", "numpy", "h5py", "tokenizers", "safetensors")
DRIVER_FILES = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")
MISSING = "not installed"
# Variable -> the values that slow a run down, what they do, and whether no figure is right then.
SLOWING = {
    "CUDA_LAUNCH_BLOCKING": (("1",), "the host waits for each kernel", True),
    "AMD_SERIALIZE_KERNEL": (("1", "2", "3"), "the host waits for each kernel", True),
    "HIP_LAUNCH_BLOCKING": (("1",), "the host waits for each kernel", True),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": (("1",), "the driver allocates each tensor", True),
    "NCCL_DEBUG": (("TRACE",), "NCCL prints each call", False),
    "TORCH_DISTRIBUTED_DEBUG": (("DETAIL",), "each collective is checked on all ranks", False),
    "TORCH_SHOW_CPP_STACKTRACES": (("1",), "each error is looked up", False),
    "NCCL_P2P_DISABLE": (("1",), "devices do not copy to each other directly", False),
    "NCCL_SHM_DISABLE": (("1",), "NCCL does not use shared memory", False),
}
THREADS = "OMP_NUM_THREADS"


def run(context: Context, tell: Tell) -> Finding:
    """Look at the packages, at PyTorch, and at the variables."""
    tell("software: packages, PyTorch, variables")
    results = [*packages_of_doctor.results(), *own_results(context, os.environ)]
    return judged(results, context.device, versions(context.device), _set_variables(os.environ))


def judged(
    results: list[CheckResult], device: str, found: Mapping[str, str], variables: Mapping[str, str]
) -> Finding:
    """The verdict. device: the type. found: the versions. variables: those set that matter."""
    figures: dict[str, object] = {"versions": dict(found), "variables": dict(variables)}
    problems = [one for one in results if one.status == PROBLEM]
    notes = [one for one in results if one.status == DOCTOR_NOTE]
    # Training needs neither; on a CPU there are no Triton kernels.
    ignored = [one for one in notes if one.what in packages_of_doctor.OPTIONAL]
    if device == "cpu":
        ignored += [one for one in notes if one.what == "triton"]
    kept = [one for one in notes if one not in ignored]
    lines = told([*problems, *kept])[1:] + told(ignored)  # the first is in the reason
    built = found["built_with"]
    summary = f"Python {found['python']}, torch {found['torch']} (built for {built})"
    if "driver" in found:
        summary += f", driver {found['driver']}"
    if problems:
        count = len(problems)
        reason = f"{count} fault{'s' if count > 1 else ''}; {first(problems)}"
        return Finding(FAIL, reason, figures, lines)
    if kept:
        return Finding(NOTE, f"{summary}; {first(kept)}", figures, lines)
    return Finding(PASS, summary, figures, lines)


def own_results(context: Context, environment: Mapping[str, str]) -> Iterator[CheckResult]:
    """What doctor does not look at."""
    yield from _device(context)
    for name, value in _set_variables(environment).items():
        if name in SLOWING:
            _, what, spoils = SLOWING[name]
            text = f"{name}={value} slows down a run: {what}"
            yield CheckResult(name, PROBLEM if spoils else DOCTOR_NOTE, text, f"unset {name}")
    threads = environment.get(THREADS, "")
    cores = len(os.sched_getaffinity(0))
    if threads.isdigit() and int(threads) * context.ranks > cores:
        text = (
            f"{THREADS}={threads} on {counted(context.ranks, 'rank')} is more than this machine's "
            f"{cores} CPUs: threads wait for each other"
        )
        fix = f"unset {THREADS}, so that a launch sets it, or pass {max(1, cores // context.ranks)}"
        yield CheckResult(THREADS, DOCTOR_NOTE, text, fix)


def _device(context: Context) -> Iterator[CheckResult]:
    """Whether PyTorch was built for what is in the machine, and can all that a run needs."""
    from bert_pretraining.runtime import device as devices

    if context.device == "cpu":
        hidden = topology.hidden_by(os.environ)
        found = () if context.config.device == "cpu" or hidden else topology.find_accelerators()
        if found:
            build = cpu_instead.build()
            fix = f"{cpu_instead.remedy(found, build)}; or pass --device cpu"
            yield CheckResult("PyTorch", PROBLEM, cpu_instead.unseen(found, build), fix)
        return
    if context.ranks > 1 and devices.backend(context.device) is None:
        yield CheckResult(
            "collectives", PROBLEM,
            f"{cpu_instead.build()} has no backend of collectives for {context.device} devices",
            "install the vendor's PyTorch, or its package of collectives",
        )  # fmt: skip


def versions(device: str) -> dict[str, str]:
    """Name -> version of all that matters. device: the type."""
    from bert_pretraining.runtime import device as devices

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        found[package] = packages.installed_version(package) or MISSING
    found["built_with"] = devices.built_with() or "CPUs"
    found.update(devices.versions(device))
    if device != "cpu":
        found["driver"] = driver()
    found["collectives"] = devices.backend(device) or "none"
    found["numactl"] = _numactl()
    return found


def driver(files: tuple[str, ...] = DRIVER_FILES) -> str:
    """The first line of the driver's own file; "unknown" where there is none."""
    for name in files:
        path = Path(name)
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[0]
    return "unknown"


def _numactl() -> str:
    """Old versions have no --version, and fail then."""
    if shutil.which("numactl") is None:
        return MISSING
    done = subprocess.run(
        ["numactl", "--version"], capture_output=True, text=True, timeout=10, check=False
    )
    return done.stdout.strip() if done.returncode == 0 and done.stdout else "installed"


def _set_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that slow a run down, and the number of threads."""
    found = {
        name: environment[name]
        for name, (values, _, _) in SLOWING.items()
        if environment.get(name, "").upper() in values
    }
    if THREADS in environment:
        found[THREADS] = environment[THREADS]
    return found
