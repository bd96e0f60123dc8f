"""Reading the files of PyTorch without running any code that is in them."""

from __future__ import annotations

import os
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import torch

from bert_pretraining.errors import UserError
from bert_pretraining.runtime import compat
from bert_pretraining.runtime.file_kind import AGAIN, cannot_read, kind_of, not_the_kind

ARCHIVE_START = b"PK\x03\x04"
SAFE_PROTOCOL = 2  # of pickle; the only one that weights_only=True reads in every version
READ_AT_A_TIME = 1 << 20  # bytes
NAMED = 3  # functions in a message
EXPORT = "load it in the program that wrote it, and save its state_dict() with torch.save"


def read_torch_file(path: Path, verify: bool = True) -> object:
    """What torch.save wrote: tensors in plain containers, memory-mapped if the file allows it.

    Only tensors and plain containers are unpickled (`weights_only=True`). Files of PyTorch
    1.6 and later have checksums, which are verified unless `verify` is False.
    Raises UserError for a damaged or foreign file, and for one that would run code.
    """
    is_archive = _is_archive(path)
    _refuse_formats_with_code(path, is_archive)
    try:
        if is_archive and verify:
            _verify_checksums(path)
        with warnings.catch_warnings():
            # The error that follows says more than this warning.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return _load(path, is_archive)
    except OSError as error:
        raise cannot_read(path, error) from error
    except pickle.UnpicklingError as error:
        called = sorted(compat.called_functions(path, error))
        protocol = _pickle_protocol(path, is_archive)
        if called:
            whole = any(name.startswith("torch.nn.modules.") for name in called)
            what = "holds a whole model" if whole else "holds more than tensors"
            what += f": it would call {', '.join(called[:NAMED])}"
        elif protocol is not None and protocol > SAFE_PROTOCOL:
            what = f"pickled with protocol {protocol} and not with torch.save's {SAFE_PROTOCOL}"
        else:
            what = "not a checkpoint of PyTorch, or one with more than tensors in it"
        raise UserError(f"{path}: {what}, which is not safe to read", EXPORT) from error
    except Exception as error:  # a cut file fails in many ways, depending on where it is cut
        kind = kind_of(path)
        if kind is not None and kind.key == "zip":
            raise not_the_kind(path, "a checkpoint of PyTorch") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: not a checkpoint of PyTorch, or a damaged one ({reason})", AGAIN
        ) from error


def _load(path: Path, is_archive: bool) -> object:
    """torch.load of tensors alone."""
    if path.suffix == ".safetensors" or not is_utf8(path):
        # PyTorch opens and maps only names that are UTF-8, and new versions take this ending for
        # another format.
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    # A mapped tensor is read from the file when it is used. Files before PyTorch 1.6 cannot be.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)


def _pickle_protocol(path: Path, is_archive: bool) -> int | None:
    """The version of the pickle in a file; None where there is none."""
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            start = archive.read(names[0])[:2] if names else b""
    else:
        with open(path, "rb") as file:
            start = file.read(2)
    return start[1] if len(start) == 2 and start[0] == 0x80 else None


def is_utf8(path: Path) -> bool:
    """Whether the name of a path is UTF-8. Libraries that are not in Python open no other."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_archive(path: Path) -> bool:
    """Whether the file is of PyTorch 1.6 or later; UserError for one that is cut off."""
    try:
        with open(path, "rb") as file:
            starts = file.read(len(ARCHIVE_START)) == ARCHIVE_START
            ends = zipfile.is_zipfile(file)
    except OSError as error:
        raise cannot_read(path, error) from error
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: damaged at its end ({error})", AGAIN) from error
    if starts and not ends:
        raise UserError(f"{path}: damaged, its end is missing", AGAIN)
    return ends


def _refuse_formats_with_code(path: Path, is_archive: bool) -> None:
    """Raise UserError for TorchScript and for the tar files of PyTorch before 0.1.10.

    Before PyTorch 2.6, torch.load(weights_only=True) does not restrict what they do
    (CVE-2025-32434).
    """
    what = "a tar file" if _is_tar(path) else None
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                what = "TorchScript, a program with its weights"
    if what is not None:
        raise UserError(
            f"{path}: {what}, which is not safe to read",
            EXPORT,
        )


def _is_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:") as archive:
            return archive.firstmember is not None  # a file of zeros is an empty archive
    except tarfile.TarError:
        return False


def _verify_checksums(path: Path) -> None:
    """Raise zipfile.BadZipFile if a record is damaged, which torch.load does not check."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.CRC:  # it is 0 if written with torch.serialization.set_crc32_options(False)
                with archive.open(record) as file:
                    while file.read(READ_AT_A_TIME):
                        pass
