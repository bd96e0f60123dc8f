"""What a Python has installed. environment.sh runs this file with that Python, before any package
is there, so it needs nothing beyond the standard library.

    PYTHON scripts/installed.py look PYPROJECT MODULE...
    PYTHON scripts/installed.py share SITE_PACKAGES CONSTRAINTS

`look` ends with exit code 1 where pyproject.toml does not allow this Python. Else it prints five
lines: this Python's folder; the version of torch, or "none"; "old" if the package needs a newer
torch; the folder that holds torch; the modules that are missing. It imports none of them.
`share` lets a virtual environment see the packages of this Python, and writes the constraints that
keep pip from replacing torch, numpy and what belongs to them.
"""

import os
import re
import sys

# Distributions that belong to a build of torch: its kernels, compilers, the vendor's libraries.
KEPT = re.compile(r"(numpy|apex)$|(py)?torch|triton|nvidia|intel-extension|cuda", re.IGNORECASE)


def look(pyproject, modules):  # no type hints: an old Python reads this too
    """Print what environment.sh asks for; return the exit code."""
    with open(pyproject) as file:
        oldest, after = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', file.read()).groups()
    if sys.version_info[0] != 3 or not int(oldest) <= sys.version_info[1] < int(after):
        return 1
    packages = import_packages()
    version = packages.installed_version("torch")
    if sys.version_info < (3, 11):
        modules = [*modules, "tomli"]
    is_old = version is not None and packages.is_older(version, packages.REQUIRED["torch"])
    print(os.path.realpath(sys.prefix))
    print(version or "none")
    print("old" if is_old else "")
    print(packages.folder_of("torch") or "")
    print(" ".join(name for name in modules if packages.folder_of(name) is None))
    return 0


def import_packages():
    """The module of the package that knows what is installed."""
    sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "base"))
    sys.dont_write_bytecode = True
    from bert_pretraining.runtime import packages

    return packages


def share(site_packages, constraints):
    """Write a .pth file to `site_packages`, and the file of constraints."""
    from importlib import metadata

    names = ("site-packages", "dist-packages")
    folders = [path for path in sys.path if os.path.basename(path) in names]
    folders.insert(0, str(import_packages().folder_of("torch")))
    # Not --system-site-packages: where this Python is itself in a virtual environment, that would
    # show the packages of the Python below it. addsitedir reads the folders' own .pth files too.
    with open(os.path.join(site_packages, "shared.pth"), "w") as file:
        for folder in dict.fromkeys(map(os.path.abspath, folders)):
            file.write(f"import site; site.addsitedir({folder!r})\n")
    kept = {}
    for found in metadata.distributions():
        name, version = found.metadata["Name"], found.version
        if name and version and KEPT.match(name):
            kept.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    with open(constraints, "w") as file:
        file.writelines(f"{name}=={kept[name]}\n" for name in sorted(kept))


if __name__ == "__main__":
    if sys.argv[1] == "look":
        sys.exit(look(sys.argv[2], sys.argv[3:]))
    share(*sys.argv[2:])
