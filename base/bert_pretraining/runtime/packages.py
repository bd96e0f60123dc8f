"""Which packages are installed, and commands that add what is missing and change nothing else.

It needs nothing beyond the standard library: scripts/installed.py and `doctor` use it where no
package is there yet.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

# What training imports, and the oldest version that the tests were run with.
REQUIRED = {
    "torch": "2.4",
    "numpy": "1.24",
    "h5py": "3.11",
    "tokenizers": "0.20",
    "safetensors": "0.4.5",
    "tqdm": "4.66",
}
if sys.version_info < (3, 11):
    REQUIRED["tomli"] = "2"  # later Pythons have tomllib
# Of the packages that are imported by another name. The whole of MLflow would bring 40 packages.
MODULES = {"mlperf-logging": "mlperf_logging", "mlflow-skinny": "mlflow"}
UNKNOWN = "version unknown"
FLAGLESS = "run 'bash run_training.sh' once without flags, which installs into .venv"


def installed_version(package: str) -> str | None:
    """The version of a package as pip knows it; None if it is not installed.

    torch's own file tells the vendor's build too, as in 2.4.1+corex.4.3.0, and is there where a
    build has no metadata. A package without either is UNKNOWN.
    """
    folder = folder_of(MODULES.get(package, package))
    if folder is not None and package == "torch":
        own = _version_in(folder / "torch" / "version.py")
        if own is not None:
            return own
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None if folder is None else UNKNOWN


def _version_in(path: Path) -> str | None:
    if not path.is_file():
        return None
    found = re.search(r"^__version__[^=]*= *['\"]([^'\"]+)", path.read_text(), re.MULTILINE)
    return found[1] if found else None


def folder_of(module: str) -> Path | None:
    """The folder that a module would be imported from, as site-packages; None if it is missing.

    It does not import the module. A mere folder of that name is no module.
    """
    spec = find_spec(module)
    return None if spec is None or spec.origin is None else Path(spec.origin).parents[1]


def is_older(version: str, than: str) -> bool:
    """Compare releases: 2.10.0+cpu is not older than 2.9. UNKNOWN is not older."""
    return version != UNKNOWN and release(version) < release(than)


def release(version: str) -> tuple[int, ...]:
    """The numbers at a version's beginning: "2.4.1+corex.4.3.0" -> (2, 4, 1)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")) if found else ()


def how_to_install(packages: Iterable[str]) -> str:
    """A command, or an order, that installs packages and replaces none that is there."""
    names = list(packages)
    if "torch" in names:
        return f"{FLAGLESS}; or set PYTHON to a Python that has torch"
    flag = "--no-deps " if set(names) <= set(REQUIRED) else ""
    return f"{sys.executable} -m pip install {flag}{' '.join(names)}"


def package_of(module: str) -> str:
    """The package that holds a module, under the name that pip knows."""
    return {name: package for package, name in MODULES.items()}.get(module, module)
