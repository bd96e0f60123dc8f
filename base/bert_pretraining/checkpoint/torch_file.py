"""Reading the files of PyTorch without running any code that is in them."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from bert_pretraining.errors import UserError

ARCHIVE_START = b"PK\x03\x04"
READ_AT_A_TIME = 1 << 20  # bytes


def read_torch_file(path: Path) -> object:
    """What torch.save wrote: tensors in plain containers, memory-mapped if the file allows it.

    Only tensors and plain containers are unpickled (`weights_only=True`). Files of PyTorch
    1.6 and later have checksums, which are verified.
    Raises UserError for a damaged or foreign file, and for one that would run code.
    """
    # A mapped tensor is read from the file when it is used. Files before PyTorch 1.6 cannot be.
    in_place = _is_archive(path)
    try:
        if in_place:
            _verify_checksums(path)
        with warnings.catch_warnings():
            # The error that follows says more than this warning.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=in_place)
    except pickle.UnpicklingError as error:
        called = _called_functions(path)
        what = (
            f"holds more than tensors: it would call {called}"
            if called
            else "not a checkpoint of PyTorch, or one with more than tensors in it"
        )
        raise UserError(
            f"{path}: {what}, which is not safe to read",
            "copy it again, or export its tensors alone",
        ) from error
    except Exception as error:  # a cut file fails in many ways, depending on where it is cut
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: not a checkpoint of PyTorch, or a damaged one ({reason})", "copy it again"
        ) from error


def _is_archive(path: Path) -> bool:
    """Whether the file is of PyTorch 1.6 or later; UserError for one that is cut off."""
    try:
        with open(path, "rb") as file:
            starts = file.read(len(ARCHIVE_START)) == ARCHIVE_START
            ends = zipfile.is_zipfile(file)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})", "copy it again") from error
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: damaged at its end ({error})", "copy it again") from error
    if starts and not ends:
        raise UserError(f"{path}: damaged, its end is missing", "copy it again")
    return ends


def _verify_checksums(path: Path) -> None:
    """Raise zipfile.BadZipFile if a record is damaged, which torch.load does not check."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.CRC:  # it is 0 if written with torch.serialization.set_crc32_options(False)
                with archive.open(record) as file:
                    while file.read(READ_AT_A_TIME):
                        pass


def _called_functions(path: Path) -> str:
    """The functions that the pickle of an archive would call; empty where they are not known."""
    try:
        return ", ".join(sorted(get_unsafe_globals_in_checkpoint(path))[:3])
    except Exception:  # no archive, or a cut one, which the caller reports anyway
        return ""
