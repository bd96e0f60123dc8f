"""Python, the packages, and whether NVIDIA's apex is the one that is installed."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from dataclasses import replace

from bert_pretraining.doctor.report import NOTE, OK, PROBLEM, CheckResult
from bert_pretraining.errors import NotInstalled

# What training imports, and the oldest version that pyproject.toml allows (a test compares).
REQUIRED = {
    "torch": "2.11",
    "numpy": "2.2",
    "h5py": "3.12",
    "tokenizers": "0.21",
    "safetensors": "0.5",
    "tqdm": "4.66",
}
# Training does not need them.
OPTIONAL = {"mlperf-logging": "4.1.68"}
INSTALL = f"{sys.executable} -m pip install -r requirements.txt"


def results() -> Iterator[CheckResult]:
    """Python and each package."""
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        yield CheckResult("Python", OK, f"{version} ({sys.executable})")
    else:
        yield CheckResult(
            "Python", PROBLEM, version, "use Python 3.10 to 3.13; PYTHON=... names it"
        )
    for package, minimum in REQUIRED.items():
        yield _package(package, minimum)
    for package, minimum in OPTIONAL.items():
        found = _package(package, minimum)
        if found.status == PROBLEM:
            found = replace(found, status=NOTE, text=f"{found.text}; `submission` needs it")
        yield found
    yield _triton()
    yield _apex()


def _package(package: str, minimum: str) -> CheckResult:
    installed = installed_version(package)
    if installed is None:
        return CheckResult(package, PROBLEM, "not installed", INSTALL)
    if _release(installed) < _release(minimum):
        return CheckResult(package, PROBLEM, f"{installed} is older than {minimum}", INSTALL)
    return CheckResult(package, OK, installed)


def _triton() -> CheckResult:
    installed = installed_version("triton")
    if installed is None:
        return CheckResult(
            "triton", NOTE, "not installed: no Triton kernels, and no --compile on a GPU",
            f"{sys.executable} -m pip install triton, if there is a GPU",
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
        return CheckResult(
            "apex", OK, f"NVIDIA's, {installed_version('apex') or 'version unknown'}"
        )
    return CheckResult(
        "apex", NOTE, lacking, "pass --kernels torch or --kernels triton, which do not need it"
    )


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")) if found else ()
