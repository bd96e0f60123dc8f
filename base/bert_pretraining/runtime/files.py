"""Check the files that a run reads, without opening a shard, and write files whole.

The launcher and the ranks share these checks and their messages. Only the standard library
is imported: the checks run before any large package is imported, and `--dry_run` needs none.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from bert_pretraining.errors import UserError
from bert_pretraining.runtime.file_kind import RIGHT_FILE, cannot_read, kind_of, shown

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = 64  # that wait for files; they compute next to nothing
PARTIAL_SUFFIX = ".partial"  # ends the name of a file that is being written
OTHER_CHECKPOINT = (
    "pass --init_checkpoint FILE, or --init_checkpoint random to start from random weights"
)
OTHER_FILE = "pass a checkpoint of PyTorch, safetensors, Hugging Face or TensorFlow 1"
# Names in the directories of checkpoints that each rank writes a part of.
SHARDED = ("*.distcp", "*/*.distcp", "*mp_rank_*_model_states.pt", "*/*mp_rank_*_model_states.pt")
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

    A device or a pipe (/dev/null, /dev/stdout, `>(...)`) is written to, and never replaced: the
    superuser could, and the machine would have no /dev/null any more.

    Args:
        path: in a folder that exists.
        content: text (written as UTF-8), bytes, or a function that gets the path of the
            temporary file and writes it.

    Raises:
        OSError: the file cannot be written; also whatever the function raises.
    """
    if _is_stream(path):
        _write(path, content)
        return
    temporary = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        if callable(content):
            temporary.unlink(missing_ok=True)  # a process that was killed may have left it
        _write(temporary, content)
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


def _write(path: Path, content: str | bytes | Callable[[Path], None]) -> None:
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def _is_stream(path: Path) -> bool:
    """Whether `path` is a device, a pipe, a socket, or another process's name for an open file."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    folder = os.path.realpath(path.parent)
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or (
        folder == "/dev" or f"{folder}/".startswith("/proc/")
    )


def write_shared(path: Path, content: str, mode: int | None = None) -> None:
    """`write_whole` for a file that several processes, of several machines, may write at a time.

    The last one wins. mode: who may read and write the file; None: as usual. Raises OSError.
    """
    own = path.with_name(f"{path.name}-{socket.gethostname()}-{os.getpid()}")
    try:
        write_whole(own, content)
        if mode is not None:
            os.chmod(own, mode)
        os.replace(own, path)
    except BaseException:
        own.unlink(missing_ok=True)
        raise


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`[function(item) for item in items]`, with the waiting for a slow file system overlapped.

    Where the system allows no more threads, those that it allowed do all, or the caller alone.
    Raises what the function raises.
    """
    if len(items) < THREADS:
        return [function(item) for item in items]
    results: list[Result] = [None] * len(items)  # type: ignore[list-item]  (all are replaced)
    left = collections.deque(range(len(items)))

    def work() -> None:
        while True:
            try:
                number = left.popleft()
            except IndexError:
                return
            results[number] = function(items[number])

    started = []
    with ThreadPoolExecutor(THREADS) as threads:
        try:
            for _ in range(THREADS):
                started.append(threads.submit(work))
        except RuntimeError:  # no more threads: a limit of processes, as containers have
            work()
    for one in started:
        one.result()
    return results


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

    Raises UserError if `path` does not exist, is an empty file, a part of a TensorFlow checkpoint
    or another directory. `fix` says what to pass instead.
    """
    status = _status(path, fix)
    if status is None:
        if _status(with_ending(path, ".index"), fix) is not None:
            return "tensorflow"
        raise _no_checkpoint(path, fix)
    if stat.S_ISDIR(status.st_mode):
        if any((path / name).is_file() for name in HUGGING_FACE_WEIGHTS):
            return "hugging_face"
        raise _other_directory(path, fix)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: no regular file, so no checkpoint", f"{fix}")
    if status.st_size == 0:
        raise UserError(f"{path}: an empty file, not a checkpoint", f"copy it again, or {fix}")
    prefix = _tensorflow_prefix(path)
    if prefix is not None:
        raise UserError(f"{path}: one part of a TensorFlow checkpoint", f"pass {prefix}")
    if re.fullmatch(r".+-\d{5}-of-\d{5}\.(bin|safetensors)|.+\.index\.json", path.name):
        raise UserError(
            f"{shown(path)}: one file of a Hugging Face checkpoint in parts",
            f"pass its folder, {shown(path.parent)}",
        )
    endings = {".index": "tensorflow", ".safetensors": "safetensors"}
    return endings.get(path.suffix, "torch")


def weight_file_kind(path: Path) -> str:
    """The format of one file with weights: "torch" or "safetensors", by its first bytes.

    Where they tell nothing, its name does. Raises UserError for a file that is plainly another,
    such as a Git LFS pointer, and for one that cannot be read.
    """
    try:
        kind = kind_of(path)
    except OSError as error:
        raise cannot_read(path, error, OTHER_FILE) from error
    if kind is None or kind.key == "zip":  # a zip archive may be PyTorch's
        return "safetensors" if path.suffix == ".safetensors" else "torch"
    if kind.key in ("safetensors", "safetensors_cut"):
        return "safetensors"
    if kind.key in ("torch_zip", "torch_pickle", "pickle", "tar"):
        return "torch"
    fix = OTHER_FILE if kind.fix == RIGHT_FILE else kind.fix
    raise UserError(f"{shown(path)}: {kind.what}, not a checkpoint", fix)


def _tensorflow_prefix(path: Path) -> Path | None:
    """The name to pass for one file of a TensorFlow checkpoint other than its index."""
    data = re.fullmatch(r"(.+)\.data-\d{5}-of-\d{5}", path.name)
    if data:
        return path.with_name(data[1])
    if path.suffix == ".meta":
        return path.with_suffix("")
    if path.name == "checkpoint":  # text in which TensorFlow notes the latest name
        named = re.match(rb'\s*model_checkpoint_path:\s*"([^"\n]+)"', path.read_bytes()[:4096])
        if named:
            return path.parent / os.fsdecode(named[1]).rpartition("/")[2]
    return None


def _no_checkpoint(path: Path, fix: str) -> UserError:
    """The error for a name at which there is neither a file nor a TensorFlow checkpoint."""
    beside = [
        ending for ending in (".meta", ".data-00000-of-00001")
        if with_ending(path, ending).exists()
    ]  # fmt: skip
    if beside:
        return UserError(
            f"no {with_ending(path, '.index')}, which a TensorFlow checkpoint needs beside "
            f"{with_ending(path, beside[0]).name}",
            "copy all of its files",
        )
    hub = "" if path.suffix or path.is_absolute() or len(path.parts) > 2 else (
        " (a name on the Hugging Face hub is not downloaded: pass a local directory)"
    )  # fmt: skip
    return UserError(f"no checkpoint at {path}{hub}", f"{fix}")


def _other_directory(path: Path, fix: str) -> UserError:
    """The error for a directory without weights of Hugging Face: what to pass of what is in it."""
    for name in HUGGING_FACE_WEIGHTS:
        if (path / name).is_symlink():  # a cache of the hub holds links to files elsewhere
            return cannot_read(path / name, FileNotFoundError(errno.ENOENT, "no such file"))
    sharded = next((path.glob(name) for name in SHARDED if any(path.glob(name))), None)
    if sharded is not None:
        return UserError(
            f"{path}: a checkpoint in parts, one for each rank, of FSDP or DeepSpeed",
            "join them: python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE, "
            "or DeepSpeed's zero_to_fp32.py",
        )
    flag = "--init_checkpoint " if fix == OTHER_CHECKPOINT else ""
    inside = _checkpoints_inside(path)
    return UserError(
        f"{path}: a directory, not a checkpoint", f"pass {flag}{inside[-1]}" if inside else fix
    )


def _checkpoints_inside(path: Path) -> list[Path]:
    """What could be meant in a directory, the likeliest last."""
    for pattern in ("snapshots/*/", "*.safetensors", "*.bin", "*.pth", "run-*/*.pt", "*.index",
                    "*.pt")[::-1]:  # fmt: skip
        found = sorted(path.glob(pattern), key=_by_numbers)
        if found:
            return [file.with_suffix("") if pattern == "*.index" else file for file in found]
    return []


def _by_numbers(path: Path) -> list[tuple[int, str]]:
    """A sort key by which step 10 follows step 9."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def with_ending(path: Path, ending: str) -> Path:
    """`path` with `ending` added to its name. Unlike `with_suffix`, it replaces nothing."""
    return path.with_name(path.name + ending)


def real(path: Path) -> Path:
    """The path without links, as `Path.resolve`, which raises RuntimeError before Python 3.13 where
    links form a loop.
    """
    return Path(os.path.realpath(path))


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
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise cannot_read(path, error, fix) from error
        return None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise cannot_read(path, error, fix) from error
