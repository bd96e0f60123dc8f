"""Made-up packages: installed ones, and wheels that pip installs without a network."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path


def metadata_of(name: str, version: str) -> str:
    return f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"


def add_package(folder: Path, name: str, version: str, with_metadata: bool = True) -> None:
    """A package with nothing in it, as if installed into `folder`."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(f"__version__ = {version!r}\n")
    if name == "torch":
        (folder / name / "version.py").write_text(f"__version__ = {version!r}\n")
    if with_metadata:
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(metadata_of(name, version))


def make_wheel(folder: Path, name: str, version: str) -> None:
    """A wheel of a package with nothing in it."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"__version__ = {version!r}\n",
        f"{info}/METADATA": metadata_of(name, version),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if name == "torch":
        files["torch/version.py"] = f"__version__ = {version!r}\n"
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


def make_environment(folder: Path) -> Path:
    """A virtual environment without any package, pip included; returns its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = (folder / "lib").glob("python3*/site-packages")
    return packages
