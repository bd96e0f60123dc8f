"""Check the files that a run reads, without opening a shard, and write files whole.

The launcher and the ranks share these checks and their messages. Only the standard library
is imported: the checks run before any large package is imported, and `--dry_run` needs none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from bert_pretraining.errors import UserError
from bert_pretraining.runtime.file_kind import cannot_read

PARTIAL_SUFFIX = ".partial"  # ends the name of a file that is being written
OTHER_CHECKPOINT = (
    "pass --init_checkpoint FILE, or --init_checkpoint random to start from random weights"
)
# In the order in which Hugging Face looks for them.
HUGGING_FACE_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def write_whole(path: Path, content: str | bytes | Callable[[Path], None]) -> None:
    """Write `path` so that a reader finds the old file or the whole new one, never a part.

    The content goes to a temporary file in the same folder, which takes the place of `path`
    once it is on the disk. When anything fails, the temporary file is removed and `path` stays
    as it was. Two processes must not write the same path at the same time.

    Args:
        path: in a folder that exists.
        content: text (written as UTF-8), bytes, or a function that gets the path of the
            temporary file and writes it.

    Raises:
        OSError: the file cannot be written; also whatever the function raises.
    """
    temporary = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        if callable(content):
            temporary.unlink(missing_ok=True)  # a process that was killed may have left it
            content(temporary)
        else:
            data = content.encode("utf-8") if isinstance(content, str) else content
            temporary.write_bytes(data)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    try:
        _sync(path.parent)  # so that the new name too survives a power failure
    except OSError as error:
        # Some network file systems cannot do this for a folder; the file itself is complete.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` once it is complete; then all of it is there.

    `path` must not exist, or be an empty folder. If the block raises, nothing is left.
    Raises UserError in place of an OSError.
    """
    staging = path.with_name(f"{path.name}{PARTIAL_SUFFIX}-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        os.replace(staging, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error})",
            "free disk space, or choose another --output_dir",
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def require_directory(path: Path, what: str, fix: str) -> None:
    """Raise UserError, with `what` as the path's name and this `fix`, if it is no directory."""
    status = _status(path, fix)
    if status is None and path.is_symlink():
        raise cannot_read(path, FileNotFoundError(errno.ENOENT, ""), fix)
    if status is None:
        raise UserError(f"no such {what}: {path}", f"{fix}")
    if not stat.S_ISDIR(status.st_mode):
        raise UserError(f"{what} {path} is a file", "pass the directory that it is in")


def checkpoint_kind(path: Path, fix: str = OTHER_CHECKPOINT) -> str:
    """The format of a checkpoint: "torch", "safetensors", "hugging_face" or "tensorflow".

    The name and kind of the file tell it; the file is not opened. A TensorFlow checkpoint is
    named by its `.index` file, with or without the ending `.index`.

    Raises UserError if `path` does not exist, is an empty file or is another directory. `fix`
    says what to pass instead.
    """
    status = _status(path, fix)
    if status is None:
        if _status(with_ending(path, ".index"), fix) is None:
            raise UserError(f"no checkpoint at {path}", f"{fix}")
        return "tensorflow"
    if stat.S_ISDIR(status.st_mode):
        if any((path / name).is_file() for name in HUGGING_FACE_WEIGHTS):
            return "hugging_face"
        indices = [file.with_suffix("") for file in sorted(path.glob("*.index"))]
        inside = [*sorted(path.glob("*.pt")), *indices]
        flag = "--init_checkpoint " if fix == OTHER_CHECKPOINT else ""
        more = f"pass {flag}{inside[-1]}" if inside else fix
        raise UserError(f"{path}: a directory, not a checkpoint", f"{more}")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: no regular file, so no checkpoint", f"{fix}")
    if status.st_size == 0:
        raise UserError(f"{path}: an empty file, not a checkpoint", f"copy it again, or {fix}")
    if ".data-" in path.name and path.name.split(".data-")[1][:5].isdigit():
        prefix = path.with_name(path.name.split(".data-")[0])
        raise UserError(f"{path}: one part of a TensorFlow checkpoint", f"pass {prefix}")
    endings = {".index": "tensorflow", ".safetensors": "safetensors"}
    return endings.get(path.suffix, "torch")


def with_ending(path: Path, ending: str) -> Path:
    """`path` with `ending` added to its name. Unlike `with_suffix`, it replaces nothing."""
    return path.with_name(path.name + ending)


def _sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _status(path: Path, fix: str) -> os.stat_result | None:
    """The status of `path`; None if it does not exist. UserError if the system refuses to tell."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise cannot_read(path, error, fix) from error
