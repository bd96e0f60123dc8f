"""Python, the packages, and whether NVIDIA's apex is the one that is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bert_pretraining.doctor.report import NOTE, OK, PROBLEM, CheckResult
from bert_pretraining.errors import NotInstalled
from bert_pretraining.runtime import packages

OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 14)  # as in pyproject.toml (a test compares)
# Training does not need them.
OPTIONAL = {"mlperf-logging": "4.1.68"}
ROOT = Path(__file__).resolve().parents[3]  # of the checkout, where run_training.sh makes .venv
NOT_INSTALLED = "not installed"
SECONDS_TO_START = 20.0  # for a Python


def results(root: Path = ROOT) -> Iterator[CheckResult]:
    """Python and each package. It imports none of them but apex.

    root: the folder of run_training.sh.
    """
    required = [_package(package, oldest) for package, oldest in packages.REQUIRED.items()]
    missing = [each.what for each in required if each.text == NOT_INSTALLED]
    other = prepared_python(root) if missing else None
    if other is None:
        yield _python()
    else:
        yield CheckResult(
            "Python", PROBLEM, f"{sys.executable} is not the Python that run_training.sh uses",
            f"run 'PYTHONPATH={_shown(root / 'base')} {_shown(other)} -m bert_pretraining doctor'",
        )  # fmt: skip
    for each in required:
        if each.what not in missing:
            yield each
        elif other is not None:
            yield replace(each, status=NOTE, fix="")
        else:  # one remedy for all of them, below the last one
            fix = packages.how_to_install(missing) if each.what == missing[-1] else ""
            yield replace(each, fix=fix)
    for package, oldest in OPTIONAL.items():
        found = _package(package, oldest)
        if found.status == PROBLEM:
            found = replace(found, status=NOTE, text=f"{found.text}; `submission` needs it")
            found = found if other is None else replace(found, fix="")
        yield found
    yield _triton() if other is None else replace(_triton(), fix="")
    yield _apex()


def prepared_python(root: Path) -> Path | None:
    """The Python of .venv, where it has all required packages and is not this one; else None.

    None also where the user has named another Python by the variable PYTHON.
    """
    python = root / ".venv" / "bin" / "python"
    if os.environ.get("PYTHON") or Path(sys.executable).parent.resolve() == python.parent.resolve():
        return None
    modules = [name for name in packages.REQUIRED if name != "tomli"]  # its Python may have tomllib
    look = f"from importlib.util import find_spec; assert all(map(find_spec, {modules}))"
    try:
        done = subprocess.run([python, "-c", look], capture_output=True, timeout=SECONDS_TO_START)
    except (OSError, subprocess.TimeoutExpired):  # it is not there, or does not start
        return None
    return python if done.returncode == 0 else None


def _shown(path: Path) -> Path:
    """From the folder where the user stands, if it is below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _python() -> CheckResult:
    version = ".".join(map(str, sys.version_info[:3]))
    if OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        return CheckResult("Python", OK, f"{version} ({sys.executable})")
    oldest, newest = (".".join(map(str, each)) for each in (OLDEST_PYTHON, NEWEST_PYTHON))
    fix = f"use Python {oldest} to {newest}; PYTHON=... names it"
    return CheckResult("Python", PROBLEM, version, fix)


def _package(package: str, oldest: str) -> CheckResult:
    installed = packages.installed_version(package)
    fix = packages.how_to_install([package])
    if installed is None:
        return CheckResult(package, PROBLEM, NOT_INSTALLED, fix)
    folder = packages.folder_of(package) if package == "torch" else None
    place = f" of {folder}" if folder else ""
    if packages.is_older(installed, oldest):
        if package != "torch":
            fix = fix.replace("install", "install --upgrade", 1)
        return CheckResult(package, PROBLEM, f"{installed}{place} is older than {oldest}", fix)
    return CheckResult(package, OK, f"{installed}{place}")


def _triton() -> CheckResult:
    installed = packages.installed_version("triton")
    if installed is None:
        return CheckResult(
            "triton", NOTE, "not installed: no Triton kernels, and no --compile on a GPU",
            f"with a GPU: {packages.how_to_install(['triton'])}; a vendor's device needs the "
            "vendor's triton",
        )  # fmt: skip
    return CheckResult("triton", OK, installed)


def _apex() -> CheckResult:
    """NVIDIA's apex is optional, but another project named apex breaks its import."""
    try:
        from bert_pretraining.kernels import apex_provider
    except ImportError as error:
        return CheckResult("apex", NOTE, f"could not be checked ({error})")
    fault = apex_provider.installation_fault()
    if isinstance(fault, NotInstalled):
        return CheckResult("apex", OK, "not installed; nothing needs it")
    if fault is not None:
        return CheckResult("apex", NOTE, fault.reason, fault.fix)
    faults = {str(apex_provider.missing(operator) or "") for operator in apex_provider.NEEDS}
    lacking = "; ".join(sorted(faults - {""}))
    if not lacking:
        return CheckResult("apex", OK, f"NVIDIA's, {packages.installed_version('apex')}")
    return CheckResult(
        "apex", NOTE, lacking, "pass --kernels torch or --kernels triton, which do not need it"
    )
