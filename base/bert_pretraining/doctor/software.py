"""Python, the packages, and whether NVIDIA's apex is the one that is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

from bert_pretraining.doctor.report import NOTE, OK, PROBLEM, CheckResult
from bert_pretraining.errors import NotInstalled
from bert_pretraining.runtime import packages

OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 14)  # as in pyproject.toml (a test compares)
# Training does not need them.
OPTIONAL = {"mlperf-logging": "4.1.68"}


def results() -> Iterator[CheckResult]:
    """Python and each package. It imports none of them but apex."""
    version = ".".join(map(str, sys.version_info[:3]))
    if OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        yield CheckResult("Python", OK, f"{version} ({sys.executable})")
    else:
        oldest, newest = (".".join(map(str, each)) for each in (OLDEST_PYTHON, NEWEST_PYTHON))
        fix = f"use Python {oldest} to {newest}; PYTHON=... names it"
        yield CheckResult("Python", PROBLEM, version, fix)
    for package, oldest in packages.REQUIRED.items():
        yield _package(package, oldest)
    for package, oldest in OPTIONAL.items():
        found = _package(package, oldest)
        if found.status == PROBLEM:
            found = replace(found, status=NOTE, text=f"{found.text}; `submission` needs it")
        yield found
    yield _triton()
    yield _apex()


def _package(package: str, oldest: str) -> CheckResult:
    installed = packages.installed_version(package)
    fix = packages.how_to_install([package])
    if installed is None:
        return CheckResult(package, PROBLEM, "not installed", fix)
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
