"""`python3 setup.py install`: with setuptools 65 as with the newest, and it fetches nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from helpers import ROOT

PARTS = "base configs pyproject.toml setup.py README.md LICENSE".split()
without_setuptools = pytest.mark.skipif(
    find_spec("setuptools") is None, reason="this Python has no setuptools"
)


@pytest.fixture
def installed(tmp_path: Path) -> tuple[Path, str]:
    """The checkout's copy from which the package was installed, and what was printed."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, checkout / name)
    for folder in (checkout / "base").glob("*.egg-info"):
        shutil.rmtree(folder)
    words = ["setup.py", "install", "--prefix", str(tmp_path / "prefix")]
    done = subprocess.run(
        [sys.executable, *words], cwd=checkout, capture_output=True, text=True, timeout=300,
        check=False, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return checkout, done.stdout + done.stderr


@without_setuptools
def test_setup_installs_this_package_only(installed: tuple[Path, str], tmp_path: Path) -> None:
    _, printed = installed
    assert not re.search("Searching for|easy_install|Processing dependencies", printed)
    (packages,) = (tmp_path / "prefix").glob("lib*/python3*/*-packages")
    names = sorted(path.name for path in packages.iterdir())
    assert names[0] == "bert_pretraining" and len(names) == 2
    assert names[1].startswith("bert_pretraining-") and names[1].endswith(".egg-info")
    assert (packages / "bert_pretraining/configs/iluvatar/V100x1x8.toml").is_file()
    assert (packages / "bert_pretraining/preparation/mini_start.pt").is_file()
    done = subprocess.run(
        [tmp_path / "prefix/bin/bert-pretraining", "config", "list"],
        env={**os.environ, "PYTHONPATH": str(packages)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--name iluvatar --config V100x1x8" in done.stdout


@without_setuptools
def test_the_build_leaves_nothing_beside_the_package(installed: tuple[Path, str]) -> None:
    """With PYTHONPATH=base, pip takes base/*.egg-info for the installed package, and `pip
    uninstall` removes nothing."""
    checkout, _ = installed
    assert [path.name for path in (checkout / "base").iterdir()] == ["bert_pretraining"]


def test_the_metadata_fetch_no_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    names = re.findall(r'"([\w-]+)', needed)
    assert sorted(names) == ["h5py", "numpy", "safetensors", "tokenizers", "tomli", "tqdm"]
    # What setuptools 65 does not know.
    assert not re.search(r"^license", text, re.MULTILINE)
    assert '"setuptools>=65"' in text


def test_requirements_agree() -> None:
    """A package that two files pin has one version."""
    pins: dict[str, set[str]] = {}
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = (ROOT / name).read_text().splitlines()
        for package, version in re.findall(r"^([\w-]+)==(\S+)", "\n".join(lines), re.MULTILINE):
            pins.setdefault(f"{name} {package}", set()).add(version)
    both = {key.split()[1] for key in pins if key.startswith("requirements.txt")} & {
        key.split()[1] for key in pins if key.startswith("requirements-dev.txt")
    }
    assert both == {"mlperf-logging"}
    for package in both:
        assert pins[f"requirements.txt {package}"] == pins[f"requirements-dev.txt {package}"]
