"""Verdicts of proofs on the disk, so that a kernel is proven once for each device and version.

Each verdict is a small file of its own in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache).
A file that cannot be read, or is not what it should be, counts as absent. Where nothing can be
written, every run proves anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import torch

from bert_pretraining.kernels.proof_problem import Sizes
from bert_pretraining.kernels.proof_process import Verdict
from bert_pretraining.kernels.provider import Target
from bert_pretraining.runtime import arithmetic
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.files import write_shared


def folder() -> Path | None:
    """Where the verdicts lie; None without a home directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:
        return None
    return cache / "bert_pretraining" / "kernel_proofs"


def load(provider: str, operator: str, target: Target, sizes: Sizes) -> Verdict | None:
    """The verdict of an earlier proof under the same circumstances, or None."""
    key = _key(provider, operator, target, sizes)
    path = _path(key)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != key:
            return None
        verdict = Verdict(**content["verdict"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    texts = isinstance(verdict.fault, str) and isinstance(verdict.unavailable, str)
    seconds = verdict.seconds is None or isinstance(verdict.seconds, float)
    return verdict if texts and seconds else None


def store(provider: str, operator: str, target: Target, sizes: Sizes, verdict: Verdict) -> None:
    """Keep a verdict, if something can be written; but not what may be another one next time."""
    key = _key(provider, operator, target, sizes)
    path = _path(key)
    if path is None or verdict.unavailable or verdict.may_pass:
        return
    content = json.dumps({"key": key, "verdict": dataclasses.asdict(verdict)}, indent=1)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shared(path, content)  # machines may share the folder


def _path(key: dict) -> Path | None:
    where = folder()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return None if where is None else where / f"{key['provider']}-{key['operator']}-{digest}.json"


def _key(provider: str, operator: str, target: Target, sizes: Sizes) -> dict:
    """Everything on which a verdict depends, as plain JSON values."""
    circumstances = {
        "provider": provider,
        "operator": operator,
        "device": devices.name(target.device),
        "processor": platform.processor() if target.device.type == "cpu" else "",
        "dtype": str(target.dtype),
        "sizes": dataclasses.asdict(sizes),
        "torch": torch.__version__,
        "triton_interpreter": os.environ.get("TRITON_INTERPRET", ""),
        "threads": torch.get_num_threads(),
        "deterministic": arithmetic.are_operators_deterministic(),
        "rounding": arithmetic.rounding(target.device, target.dtype),
        **_installed(),
    }
    return json.loads(json.dumps(circumstances))


@functools.cache
def _installed() -> dict[str, object]:
    """Drivers, kernels' sources, and all installed packages: Triton, apex and vendors' own."""
    packages = sorted(
        f"{found.metadata['Name']} {found.version}" for found in importlib.metadata.distributions()
    )
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(path.read_bytes())
    drivers = {"kernel": platform.release()}
    for path in sorted(Path("/sys/module").glob("*/version")):
        with contextlib.suppress(OSError):
            # O: not of Linux's own source, as vendors' drivers are.
            if "O" in path.with_name("taint").read_text():
                drivers[path.parent.name] = path.read_text().strip()
    return {
        "drivers": drivers,
        "packages": hashlib.sha256("\n".join(packages).encode()).hexdigest()[:16],
        "kernels": sources.hexdigest()[:16],
    }
