"""HDF5 files: opened without locks, and what their datasets are.

Everything that h5py raises for such a file ends as a UserError that names the file and the cause.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np

from bert_pretraining.errors import UserError
from bert_pretraining.runtime import packages
from bert_pretraining.runtime.file_kind import (
    cannot_read,
    cannot_write,
    errno_of,
    not_the_kind,
    require_regular,
    shown,
)
from bert_pretraining.runtime.files import write_whole

AGAIN = "make the shard again"
# HDF5 1.10.7 and 1.12.1 brought the choice; what is older locks, unless the environment forbids it.
_VERSION = h5py.version.hdf5_version_tuple
_CAN_CHOOSE = _VERSION >= (1, 12, 1) or (1, 10, 7) <= _VERSION < (1, 11)
UNLOCKED = {"locking": False} if _CAN_CHOOSE else {}
# What h5py raises for a damaged file, depending on where it is damaged.
_H5PY_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError)
# The HDF Group's list of registered filters. Files name them too, but not always.
_FILTERS = {
    4: "szip", 305: "lzo", 307: "bzip2", 32000: "lzf", 32001: "blosc", 32004: "lz4",
    32008: "bitshuffle", 32013: "zfp", 32015: "zstd", 32017: "sz", 32026: "blosc2",
}  # fmt: skip


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """The file, opened to read; UserError for one that is missing, foreign, locked or damaged.

    It is opened without a lock, because shards do not change while they are read and some
    network file systems have no locks.
    """
    require_regular(path, "pass an HDF5 file")
    try:
        with h5py.File(path, "r", **UNLOCKED) as file:
            yield file
    except _H5PY_ERRORS as error:
        raise _fault(path, error) from error


def write_hdf5(path: Path, fill: Callable[[h5py.File], None]) -> None:
    """Write a file, whole or not at all; UserError where the system refuses."""

    def write(temporary: Path) -> None:
        with h5py.File(temporary, "w", **UNLOCKED) as file:
            fill(file)

    try:
        write_whole(path, write)
    except (OSError, RuntimeError) as error:
        raise cannot_write(path, error) from error


def _fault(path: Path, error: Exception) -> UserError:
    number = errno_of(error)
    if number and not (isinstance(error, FileNotFoundError) and path.exists()):
        return cannot_read(path, error)
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return not_the_kind(path, "an HDF5 file", "make or copy it again", reason, own="hdf5")


def dataset(file: h5py.File, name: str, path: Path) -> h5py.Dataset:
    """The dataset of integers of this name, with one dimension or more, which can be read.

    Raises UserError that says what stands in its place: nothing, a link to nothing, a group, a
    single value, texts, records, floats, values of a filter that is not installed; or why the
    system cannot read it.
    """
    where = f"{shown(path)}: '{name}'"
    link = file.get(name, getlink=True)
    if link is None:
        has = ", ".join(sorted(file)) or "nothing"
        raise UserError(f"{shown(path)}: no dataset '{name}' (has: {has})", AGAIN)
    try:
        found = file[name]
    except _H5PY_ERRORS as error:
        if errno_of(error) and isinstance(link, h5py.HardLink):
            raise cannot_read(path, error) from error
        found = None  # links to nothing, or that lead back to themselves
    if found is None:
        target = ":".join(
            part for part in (getattr(link, "filename", ""), getattr(link, "path", "")) if part
        )
        raise UserError(
            f"{where} is a link to {target or 'an object'}, which is not there",
            "copy the file that it points to as well, or make the shard again",
        )
    if not isinstance(found, h5py.Dataset):
        what = f"a group ({', '.join(found) or 'empty'})" if hasattr(found, "keys") else "a type"
        raise UserError(f"{where} is {what}, not a dataset of integers", AGAIN)
    if found.shape is None:
        raise UserError(f"{where} is a null dataset, expected rows of integers", AGAIN)
    if found.shape == ():
        raise UserError(f"{where} is a single value, expected one for each sequence", AGAIN)
    what = _not_integers(found.dtype)
    if what:
        raise UserError(f"{where} holds {what}, not integers", AGAIN)
    _require_filters(found, where)
    _require_sources(found, where, path)
    return found


def _not_integers(dtype: np.dtype) -> str | None:
    """What the elements are if they are no integers, nor truth values, nor rows of integers."""
    if h5py.check_string_dtype(dtype) or dtype.kind in "SU":
        return "text"
    rows = h5py.check_vlen_dtype(dtype)
    if rows is not None:
        inner = _not_integers(rows)
        return f"rows of {inner}" if inner else None
    if dtype.names:
        return f"records ({', '.join(dtype.names)})"
    if dtype.subdtype:
        return f"arrays of shape {dtype.shape}"
    if dtype.kind in "iub":
        return None
    return {"f": f"{dtype} numbers", "c": f"{dtype} numbers"}.get(dtype.kind, f"{dtype} objects")


def _require_filters(found: h5py.Dataset, where: str) -> None:
    """Raise UserError for a compression that the HDF5 library does not have."""
    properties = found.id.get_create_plist()
    for index in range(properties.get_nfilters()):
        code, _, _, text = properties.get_filter(index)
        if not h5py.h5z.filter_avail(code):
            with contextlib.suppress(ImportError):
                import hdf5plugin  # noqa: F401  # it registers its filters
        if not h5py.h5z.filter_avail(code):
            own = text.decode("utf-8", "replace").split(";")[0].strip("\x00 ")
            raise UserError(
                f"{where} is compressed with HDF5 filter {code} "
                f"({_FILTERS.get(code, own) or 'no name'}), which is not installed here",
                f"install it: {packages.how_to_install(['hdf5plugin'])}, or on a machine that has "
                "it write the file without: h5repack -f NONE IN OUT",
            )


def _require_sources(found: h5py.Dataset, where: str, path: Path) -> None:
    """Raise UserError where the values lie in other files that are not there.

    HDF5 itself reads zeros in place of a missing source of a virtual dataset.
    """
    names = [name for name, _, _ in found.external or ()]
    if found.is_virtual:
        names += [source.file_name for source in found.virtual_sources()]
    for name in names:
        if name != "." and not (path.parent / name).exists():
            raise UserError(
                f"{where} has its values in {name}, which is not there",
                "copy that file as well, or make the shard again",
            )
