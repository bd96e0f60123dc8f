"""What a Python has installed. environment.sh runs this file with that Python, before any package
of ours is there, so it needs nothing beyond the standard library.

    PYTHON scripts/installed.py look PYPROJECT MODULE...
    PYTHON scripts/installed.py share SITE_PACKAGES CONSTRAINTS

`look` ends with exit code 1 where pyproject.toml does not allow this Python. Else it prints five
lines: this Python's folder; the version of torch, or "none"; "old" if pyproject.toml wants a newer
torch; the folder that holds torch; the modules that are missing. It imports no package.
`share` lets a virtual environment see the packages of this Python, and writes the constraints that
keep pip from replacing torch, numpy and what belongs to them.
"""

import os
import re
import sys

# Distributions that belong to a build of torch: its kernels, compilers, vendor's libraries.
KEPT = re.compile(r"(numpy|apex)$|(py)?torch|triton|nvidia|intel-extension|cuda", re.IGNORECASE)


def look(pyproject, modules):
    """Print what environment.sh asks for; return the exit code."""
    with open(pyproject) as file:
        text = file.read()
    oldest, after = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', text).groups()
    if sys.version_info[0] != 3 or not int(oldest) <= sys.version_info[1] < int(after):
        return 1
    from importlib.util import find_spec

    spec = find_spec("torch")
    known = spec is not None and spec.origin is not None  # a mere folder named torch has no origin
    folder = os.path.dirname(os.path.dirname(spec.origin)) if known else ""
    if sys.version_info < (3, 11):
        modules = modules + ["tomli"]
    missing = [name for name in modules if find_spec(name) is None]
    if not known and "torch" in modules and "torch" not in missing:
        missing.append("torch")
    print(os.path.realpath(sys.prefix))
    version = version_of_torch(folder) if known else "none"
    wanted = re.search(r'"torch>=(\d+)\.(\d+)', text).groups()
    has = re.match(r"(\d+)\.(\d+)", version)
    print(version)
    print("old" if has and tuple(map(int, has.groups())) < tuple(map(int, wanted)) else "")
    print(folder)
    print(" ".join(missing))
    return 0


def version_of_torch(folder):
    """The version of the torch in a folder, from its own file; else from its metadata."""
    path = os.path.join(folder, "torch", "version.py")
    if os.path.isfile(path):
        with open(path) as file:
            found = re.search(r"^__version__[^=]*= *['\"]([^'\"]+)", file.read(), re.MULTILINE)
        if found:
            return found.group(1)
    from importlib import metadata

    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "unknown"


def share(site_packages, constraints):
    """Write a .pth file to `site_packages`, and the file of constraints."""
    from importlib import metadata
    from importlib.util import find_spec

    spec = find_spec("torch")
    folders = [os.path.dirname(os.path.dirname(spec.origin))]
    names = ("site-packages", "dist-packages")
    folders += [path for path in sys.path if os.path.basename(path) in names]
    # Not --system-site-packages: where this Python is itself in a virtual environment, that would
    # show the packages of the Python below it. addsitedir reads the folders' own .pth files too.
    with open(os.path.join(site_packages, "shared.pth"), "w") as file:
        for folder in dict.fromkeys(map(os.path.abspath, folders)):
            file.write("import site; site.addsitedir({!r})\n".format(folder))
    kept = {}
    for found in metadata.distributions():
        name, version = found.metadata["Name"], found.version
        if name and version and KEPT.match(name):
            kept.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    with open(constraints, "w") as file:
        for name in sorted(kept):
            file.write("{}=={}\n".format(name, kept[name]))


if __name__ == "__main__":
    if sys.argv[1] == "look":
        sys.exit(look(sys.argv[2], sys.argv[3:]))
    share(*sys.argv[2:])
