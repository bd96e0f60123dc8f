"""What a file is by its first bytes, and what errors of the system mean."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch

from bert_pretraining.errors import UserError
from bert_pretraining.runtime.file_kind import (
    cannot_read,
    cannot_write,
    kind_of,
    not_the_kind,
    require_regular,
    shown,
)

# The first record of a file that TensorFlow wrote: length, masked CRC-32C of the length, data.
TFRECORD = (10).to_bytes(8, "little") + bytes.fromhex("aea3bf3a") + b"\n\x08" + b"x" * 8 + b"crc!"


def hdf5() -> bytes:
    with h5py.File("in memory", "w", driver="core", backing_store=False) as file:
        file["input_ids"] = np.arange(9000)
        file.flush()
        return bytes(file.id.get_file_image())


def saved(write: object, value: object) -> bytes:
    buffer = io.BytesIO()
    write(value, buffer)
    return buffer.getvalue()


def archive(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(name, "x" * 9)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("a"))
    return buffer.getvalue()


KINDS = {
    "empty": (b"", "an empty file"),
    "zeros": (bytes(100), "a file of zeros (100 bytes): space was reserved and not filled"),
    "gzip": (gzip.compress(b"x"), "a gzip-compressed file"),
    "bz2": (bz2.compress(b"x"), "a bzip2-compressed file"),
    "xz": (lzma.compress(b"x"), "an xz-compressed file"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", "a zstd-compressed file"),
    "zip": (archive("a.txt"), "a zip archive"),
    "npz": (archive("a.npy"), "a NumPy .npz file"),
    "tar": (tar(), "a tar archive"),
    "torch_zip": (saved(torch.save, {"a": torch.ones(2)}), "a PyTorch file"),
    "torch_pickle": (
        saved(lambda *to: torch.save(*to, _use_new_zipfile_serialization=False), [1]),
        "a PyTorch file (form before 1.6)",
    ),
    "pickle": (pickle.dumps({"a": 1}), "a Python pickle"),
    "safetensors": (safetensors.torch.save({"a": torch.ones(2)}), "a safetensors file"),
    "safetensors_cut": (
        safetensors.torch.save({"a": torch.ones(2)})[:20],
        "a safetensors file that ends in its header (20 bytes)",
    ),
    "npy": (saved(lambda value, to: np.save(to, value), np.ones(3)), "a NumPy .npy file"),
    "parquet": (b"PAR1\x15\x04\x00PAR1", "a Parquet file"),
    "tfrecord": (TFRECORD, "a TFRecord file"),
    "hdf5": (hdf5(), "an HDF5 file"),
    "lfs_pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 4\n",
        "a Git LFS pointer (text of 64 bytes)",
    ),
    "html": (b"\n<!DOCTYPE html><title>Sign in</title>", "a web page (HTML)"),
    "xml": (b'<?xml version="1.0"?><Error/>', "an XML document"),
    "json": (b'{"vocab_size": 30522}', "JSON text"),
    "text": ("Zur\u00fcck\nb".encode(), "plain text that begins 'Zur\u00fcck'"),
    "utf16": ("text".encode("utf-16"), "text in UTF-16"),
    "ds_store": (b"\x00\x00\x00\x01Bud1\x00\x00", "a .DS_Store file of macOS"),
    "apple_double": (
        b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X",
        "a file of macOS with another file's attributes",
    ),
}


@pytest.mark.parametrize("key", KINDS)
def test_the_first_bytes_tell_what_a_file_is(key: str, tmp_path: Path) -> None:
    path = tmp_path / "part_0.hdf5"
    content, what = KINDS[key]
    path.write_bytes(content)
    found = kind_of(path)
    assert found is not None
    assert (found.key, found.what) == (key, what)
    error = str(not_the_kind(path, "a BERT vocabulary"))
    instead = "" if key.endswith("_cut") else ", not a BERT vocabulary"
    assert error == f"{path}: {what}{instead}; {found.fix}"


@pytest.mark.parametrize("libver", ["earliest", "v108", "v110", "latest"])
def test_an_hdf5_file_that_was_cut_is_told_with_both_sizes(tmp_path: Path, libver: str) -> None:
    path = tmp_path / "part_0.hdf5"
    with h5py.File(path, "w", libver=libver) as file:
        file["input_ids"] = np.arange(9000)
    size = path.stat().st_size
    assert kind_of(path).key == "hdf5"
    os.truncate(path, size - 5000)
    assert kind_of(path).what == (
        f"an HDF5 file that ends too early ({size - 5000} of {size} bytes)"
    )


def test_unknown_bytes_are_no_kind_and_the_library_speaks(tmp_path: Path) -> None:
    path = tmp_path / "part_0.hdf5"
    path.write_bytes(bytes(range(200, 256)) * 9)
    assert kind_of(path) is None
    error = not_the_kind(path, "an HDF5 shard", reason="bad signature")
    assert str(error) == (
        f"{path}: not an HDF5 shard, or a damaged one (bad signature); download or copy it again"
    )


def test_a_long_text_may_be_cut_inside_a_character(tmp_path: Path) -> None:
    for shift in range(3):
        path = tmp_path / "text"
        path.write_bytes(b"a" * shift + "\u4e00".encode() * 5000)
        assert kind_of(path).key == "text"


def test_what_is_no_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"/pipe: a named pipe, not a file; pass the right file"):
        require_regular(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"/folder: a directory, not a file; pass a file"):
        require_regular(tmp_path / "folder", "pass a file")
    assert kind_of(tmp_path / "pipe").key == "pipe"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOLCK, "the file system has no locks (errno 37: No locks available); set HDF5_USE"),
        (errno.EAGAIN, "another program has locked it (errno 11"),
        (errno.EACCES, "no permission to read it (errno 13: Permission denied); give it: chmod"),
        (errno.EIO, "the disk or network failed to read it (errno 5"),
        (errno.ESTALE, "the network file system lost it (stale handle) (errno 116"),
        (errno.EMFILE, "this process has too many open files (errno 24"),
        (errno.ENOENT, "does not exist (errno 2: No such file or directory); pass another"),
    ],
)
def test_errors_of_reading_say_what_they_mean(number: int, words: str) -> None:
    own = OSError(number, os.strerror(number), "/data/a")
    from_h5py = OSError(f"Unable to open file (errno = {number}, error message = 'x')")
    for error in (own, from_h5py):
        text = str(cannot_read("/data/a", error, "pass another"))
        assert text.startswith(f"cannot read /data/a: {words}")


def test_errors_of_writing_say_what_they_mean() -> None:
    full = OSError(errno.ENOSPC, "x")
    assert str(cannot_write("/data/a", full)) == (
        "cannot write /data/a: no space left on the disk (errno 28: No space left on device); "
        "free disk space, or choose another folder"
    )
    unknown = cannot_write("/data/a", ValueError("unknown format\nmore"), "choose .png")
    assert str(unknown) == "cannot write /data/a: unknown format; choose .png"


def test_a_link_to_nothing_names_its_target(tmp_path: Path) -> None:
    link = tmp_path / "part_0.hdf5"
    link.symlink_to("/gone/part_0.hdf5")
    with pytest.raises(UserError, match=re.escape(f"{link}: a link to nothing (/gone/part_0")):
        require_regular(link)


def test_a_name_with_a_line_break_stays_on_one_line() -> None:
    assert shown(Path("a\nb")) == "a\\nb"
    assert shown(os.fsdecode(b"a\xff")) == "a\\udcff"
    assert shown("Zur\u00fcck dir/a b") == "Zur\u00fcck dir/a b"
