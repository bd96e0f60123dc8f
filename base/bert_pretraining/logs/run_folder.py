"""A run's folder: `run-<UTC time>/` with what the run was, beside what it logged."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from pathlib import Path

from bert_pretraining import __version__
from bert_pretraining.config import Config
from bert_pretraining.errors import UserError
from bert_pretraining.runtime import packages
from bert_pretraining.runtime.files import write_whole

PACKAGES = ("torch", "numpy", "h5py", "mlperf-logging", "tokenizers", "tqdm")


def make_run_folder(output_dir: Path, config: Config) -> Path:
    """A new folder in `output_dir`, with `config.json` and `versions.json`.

    Raises:
        UserError: it cannot be written to.
    """
    try:
        folder = _new_folder(output_dir)
        _write_json(folder / "config.json", dataclasses.asdict(config))
        _write_json(folder / "versions.json", versions())
    except OSError as error:
        raise UserError(
            f"cannot write to output_dir {output_dir} ({error.strerror})", "pass --output_dir"
        ) from error
    return folder


def versions() -> dict[str, str]:
    """Versions of this package, Python, the machine and the packages that matter."""
    found = {
        "bert_pretraining": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus_allowed": str(len(os.sched_getaffinity(0))),
    }
    for package in PACKAGES:
        found[package] = packages.installed_version(package) or "not installed"
    return found


def _new_folder(output_dir: Path) -> Path:
    """Create and return a folder that did not exist before."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    output_dir.mkdir(parents=True, exist_ok=True)
    for attempt in range(1000):
        folder = output_dir / (f"run-{stamp}" + (f"-{attempt}" if attempt else ""))
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise UserError(f"{output_dir} holds 1000 runs of this second", "pass another --output_dir")


def _write_json(path: Path, content: dict) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")
