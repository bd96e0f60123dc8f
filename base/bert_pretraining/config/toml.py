"""Reads TOML. Python 3.10 needs the package tomli for it, which may not be installed."""

from __future__ import annotations

import sys


def parse_toml(text: str) -> dict[str, object]:
    """The content of a TOML file.

    Raises ValueError for what is no TOML, ModuleNotFoundError on Python 3.10 without tomli.
    """
    # Imported only here, so that --help and `doctor` work without tomli.
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)
