"""Files that a user passes by mistake: about thirty kinds."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 31337\n"
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>\n"
TFRECORD = (10).to_bytes(8, "little") + bytes.fromhex("aea3bf3a") + b"\n\x08" + bytes(12)


def _written(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def _zipped(content: bytes) -> bytes:
    def write(buffer: io.BytesIO) -> None:
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("content", content)

    return _written(write)


def _tarred(content: bytes) -> bytes:
    def write(buffer: io.BytesIO) -> None:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            member = tarfile.TarInfo("content")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

    return _written(write)


# kind -> the bytes of such a file, made of those of a right one
CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda right: b"",
    "zeros": lambda right: bytes(5000),
    "random bytes": lambda right: np.random.RandomState(1).bytes(5000),
    "cut in the middle": lambda right: right[: len(right) // 2],
    "its first 100 bytes": lambda right: right[:100],
    "plain text": lambda right: b"Access denied\nTry again later\n",
    "text in UTF-16": lambda right: "Zur\u00fcck\n".encode("utf-16"),
    "text in Latin-1": lambda right: "Zur\u00fcck zur \u00dcbersicht\n".encode("latin-1") * 9,
    "web page": lambda right: PAGE,
    "XML": lambda right: b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>\n',
    "JSON list": lambda right: b'[{"a": 1}]\n',
    "LFS pointer": lambda right: LFS,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda right: b"\x28\xb5\x2f\xfd\x04\x00\x41\x00\x00" + bytes(90),
    "zip": _zipped,
    "tar": _tarred,
    "Parquet": lambda right: b"PAR1\x15\x04\x15" + bytes(90) + b"PAR1",
    "TFRecord": lambda right: TFRECORD,
    "NumPy": lambda right: _written(lambda buffer: np.save(buffer, np.ones(9))),
    "pickle": lambda right: pickle.dumps({"a": [1]}),
    "PyTorch": lambda right: _written(lambda buffer: torch.save([1], buffer)),
    "picture": lambda right: b"\x89PNG\r\n\x1a\n" + bytes(90),
}


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _unreadable(path: Path, right: bytes) -> None:
    path.write_bytes(right)
    path.chmod(0)


# kind -> what makes such a path; the second argument is a right file's bytes
PATHS: dict[str, Callable[[Path, bytes], object]] = {
    "missing": lambda path, right: None,
    "directory": lambda path, right: path.mkdir(),
    "pipe": lambda path, right: os.mkfifo(path),
    "link to nothing": lambda path, right: path.symlink_to("/gone/" + path.name),
    "link to itself": lambda path, right: _loop(path),
    "no permission": _unreadable,
}
KINDS = {
    **PATHS,
    **{
        kind: lambda path, right, content=content: path.write_bytes(content(right))
        for kind, content in CONTENTS.items()
    },
}


def skipped(kind: str) -> bool:
    """Whether this user reads every file, whatever its permissions are."""
    if kind != "no permission":
        return False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "closed"
        _unreadable(path, b"x")
        return os.access(path, os.R_OK)


def good_files(root: Path, data: Path) -> Path:
    """A folder with one right file of each kind. data: the mini data set."""
    good = root / "good"
    (good / "texts").mkdir(parents=True)
    for path in data.iterdir():
        (good / path.name).symlink_to(path)
    sentences = "\n".join(f"the old man saw a red house number {n} ." for n in range(40))
    text = "\n\n".join([sentences] * 20)
    for name in ("text.txt", "texts/part-0"):
        (good / name).write_text(text)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(text.split()))]
    if not (good / "vocab.txt").exists():
        (good / "vocab.txt").write_text("\n".join(words) + "\n")
    (good / "mine.toml").write_text("max_steps = 12\ntrain_batch_size = 2\n")
    record = {"event": "LAUNCH_TRAINING", "value": None, "metadata": {"file": "a", "lineno": 1}}
    (good / "run.log").write_text(f"[PerfLog] {json.dumps(record)}\n" * 40)
    return good


@contextlib.contextmanager
def fed_pipe(path: Path) -> Iterator[threading.Event]:
    """Let every reader of the pipe find its end at once; the event tells that there was one.

    Without a writer, a reader would wait for ever.
    """
    opened, done = threading.Event(), threading.Event()

    def feed() -> None:
        while not done.wait(0.001):
            with contextlib.suppress(OSError):  # ENXIO: nobody has opened it to read
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                opened.set()

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        yield opened
    finally:
        done.set()
        feeder.join()
