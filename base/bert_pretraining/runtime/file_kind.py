"""What a file is by its first bytes, and what a system error about a file means.

Every reader of a file that others made uses these two, so that its message says what was found
and how to mend it. Only the standard library is imported.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.errors import UserError

READ_BYTES = 4096  # of the beginning of a file
AGAIN = "download or copy it again"
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
TENSORFLOW_INDEX_END = 0xDB4775248B80FB57.to_bytes(8, "little")
CONVERT = "convert it, or pass the right file"
RIGHT_FILE = "pass the right file"
_CUT = "truncated file"  # in HDF5's text for a file that is shorter than its header says
# Endings that programs give to a file while they write it.
UNFINISHED = (
    ".aria2", ".crdownload", ".download", ".filepart", ".incomplete", ".opdownload", ".part",
    ".partial", ".rsync-partial", ".swp", ".tmp", ".wget", "~",
)  # fmt: skip


@dataclass(frozen=True)
class FileKind:
    """What a file is, in words that go into a message, and what to do where another was needed.

    key: a short name for programs, such as "gzip".
    """

    key: str
    what: str
    fix: str


# first bytes -> key, words, fix; {path} stands for the file
_MAGIC: tuple[tuple[bytes, str, str, str], ...] = (
    (b"\x1f\x8b", "gzip", "a gzip-compressed file", "decompress it: gunzip {path}"),
    (b"BZh", "bz2", "a bzip2-compressed file", "decompress it: bunzip2 {path}"),
    (b"\xfd7zXZ\x00", "xz", "an xz-compressed file", "decompress it: unxz {path}"),
    (b"\x28\xb5\x2f\xfd", "zstd", "a zstd-compressed file", "decompress it: unzstd {path}"),
    (b"\x04\x22\x4d\x18", "lz4", "an lz4-compressed file", "decompress it: unlz4 {path}"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "a 7z archive", "unpack it: 7z x {path}"),
    (b"Rar!\x1a\x07", "rar", "a RAR archive", "unpack it: unrar x {path}"),
    (b"PAR1", "parquet", "a Parquet file", CONVERT),
    (b"ARROW1", "arrow", "an Arrow file", CONVERT),
    (b"FEA1", "arrow", "a Feather file", CONVERT),
    (b"ORC", "orc", "an ORC file", CONVERT),
    (b"Obj\x01", "avro", "an Avro file", CONVERT),
    (b"GGUF", "gguf", "a GGUF file (weights for llama.cpp)", RIGHT_FILE),
    (b"\x93NUMPY", "npy", "a NumPy .npy file", CONVERT),
    (b"CDF\x01", "netcdf", "a netCDF file", CONVERT),
    (b"MATLAB 5.0", "matlab", "a MATLAB file", CONVERT),
    (b"SQLite format 3\x00", "sqlite", "an SQLite database", RIGHT_FILE),
    (b"%PDF-", "pdf", "a PDF document", RIGHT_FILE),
    (b"\x89PNG\r\n", "image", "a PNG picture", RIGHT_FILE),
    (b"\xff\xd8\xff", "image", "a JPEG picture", RIGHT_FILE),
    (b"\x7fELF", "program", "a program (ELF)", RIGHT_FILE),
    (b"\x00\x05\x16\x07", "apple_double", "a file of macOS with another file's attributes",
     "delete it"),
    (b"\x00\x00\x00\x01Bud1", "ds_store", "a .DS_Store file of macOS", "delete it"),
    (b"b0VIM", "swap", "a swap file of the editor vim", "delete it"),
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "torch_pickle",
     "a PyTorch file (form before 1.6)", CONVERT),
    (b"version https://git-lfs", "lfs_pointer", "a Git LFS pointer (text of {size} bytes)",
     "fetch the file itself: git lfs pull"),
    (b"/annex/objects/", "annex_pointer", "a git-annex pointer (text of {size} bytes)",
     "fetch the file itself: git annex get {path}"),
)  # fmt: skip


def kind_of(path: Path) -> FileKind | None:
    """What a file is by its first bytes; None where they are unknown.

    At most READ_BYTES of it are read. A path that is no regular file is never opened, because a
    named pipe would block. Raises OSError where the file cannot be read.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        return _special(status.st_mode)
    size = status.st_size
    if size == 0:
        return FileKind("empty", "an empty file", AGAIN)
    with open(path, "rb") as file:
        start = file.read(READ_BYTES)
        file.seek(max(0, size - 8))
        end = file.read(8)
    return kind_of_bytes(start, end, size, path)


def kind_of_bytes(start: bytes, end: bytes, size: int, path: Path) -> FileKind | None:
    """What content is by its first READ_BYTES, its last 8 bytes and its size, as `kind_of` says.

    For content that is no file itself, such as what a compressed file holds. What to do may name
    `path`.
    """
    for magic, key, what, fix in _MAGIC:
        if start.startswith(magic):
            return FileKind(key, what.format(size=size), fix.format(path=shown(path)))
    return (
        _zeros(start, size)
        or _container(shown(path), start, size)
        or _tensorflow(start, end, size)
        or _text(start, size)
    )


def shown(path: Path | str) -> str:
    """A path for a one-line message: line breaks and bytes that are no text are escaped."""
    text = str(path)
    return text if text.isprintable() else repr(text)[1:-1]


def not_the_kind(
    path: Path, wanted: str, fix: str = AGAIN, reason: str = "", own: str = ""
) -> UserError:
    """The error for a file that its reader refused: what it is instead, and what to do.

    wanted: what the reader needs, such as "an HDF5 shard". fix: what to do where the bytes tell
    nothing. reason: what the reader's library said; it stands in the message only then, as the
    first bytes say more. own: the key of the wanted kind, as a file of it may still be damaged.
    """
    try:
        kind = kind_of(path)
    except OSError as error:
        return cannot_read(path, error)
    name = shown(path)
    because = f" ({reason})" if reason else ""
    if kind is None:
        return UserError(f"{name}: not {wanted}, or a damaged one{because}", fix)
    if kind.key == own:
        return UserError(f"{name}: not {wanted} that can be read{because}", fix)
    if kind.key.endswith("_cut"):  # of the right kind, but not all of it
        return UserError(f"{name}: {kind.what}", kind.fix)
    return UserError(f"{name}: {kind.what}, not {wanted}", kind.fix)


def require_regular(path: Path, fix: str = RIGHT_FILE) -> None:
    """Raise UserError where `path` is no regular file that can be opened: nothing, a directory, a
    named pipe (which would block), no permission."""
    try:
        kind = _special(os.stat(path).st_mode)
        if kind is None:
            with open(path, "rb"):
                return
    except (OSError, ValueError) as error:
        raise cannot_read(path, error, fix) from error
    raise UserError(f"{shown(path)}: {kind.what}, not a file", fix)


def read_json(path: Path, wanted: str, fix: str, absent: str = "") -> object:
    """The content of a user's JSON file. UserError where there is none that can be read.

    wanted: what it is, such as "a qualification". absent: what to do where the file is missing or
    closed to the user; `fix` by default.
    """
    require_regular(path, absent or fix)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise cannot_read(path, error, absent or fix) from error
    except (ValueError, RecursionError) as error:
        raise not_the_kind(path, wanted, fix, f"not valid JSON ({error})", own="json") from error


def unfinished(name: str) -> bool:
    """Whether a file's name says that a program is writing it: a download, an editor."""
    return name.lower().endswith(UNFINISHED)


def hidden(name: str) -> bool:
    """Whether a file's name begins with a dot: macOS's ._ files, .DS_Store, editors' files."""
    return name.startswith(".")


# The words of errors of the system, with the order that mends them.
_READ_ERRORS = {
    "ENOENT": ("does not exist", RIGHT_FILE),
    "ENOTDIR": ("a part of this path is a file, not a folder", "correct the path"),
    "EISDIR": ("a directory, not a file", RIGHT_FILE),
    "EACCES": ("no permission to read it", "give it: chmod u+r, and u+x for each folder above it"),
    "EPERM": ("the system does not permit reading it", "ask who owns it, or copy it"),
    "ELOOP": ("a link that leads back to itself", "make the link again"),
    "ENAMETOOLONG": ("the name is too long for the file system", "correct the path"),
    "ENOLCK": ("the file system has no locks", "set HDF5_USE_FILE_LOCKING=FALSE"),
    "EAGAIN": ("another program has locked it", "wait until that program has closed it"),
    "EBUSY": ("another program uses it", "wait until that program has closed it"),
    "EIO": ("the disk or network failed to read it", "check the disk (dmesg), and copy it again"),
    "ESTALE": ("the network file system lost it (stale handle)", "mount it again, then repeat"),
    "ETIMEDOUT": ("the network file system does not answer", "check the mount, then repeat"),
    "ENOTCONN": ("the network file system is not connected", "mount it again, then repeat"),
    "EHOSTDOWN": ("the network file system's server is down", "check the mount, then repeat"),
    "EREMOTEIO": ("the network file system failed to read it", "check the mount, then repeat"),
    "EMFILE": ("this process has too many open files", "raise the limit: ulimit -n 4096"),
    "ENFILE": ("this machine has too many open files", "end other programs"),
    "ENOMEM": ("no memory left to read it", "free memory"),
    "ENXIO": ("a device or socket, not a file", RIGHT_FILE),
    "ENODEV": ("its device is gone", "mount it again, then repeat"),
    "EINVAL": ("the system does not accept this path or file", "correct the path"),
}  # fmt: skip
_WRITE_ERRORS = {
    "ENOENT": ("its folder does not exist", "make the folder, or choose another"),
    "ENOTDIR": ("a part of this path is a file, not a folder", "correct the path"),
    "EISDIR": ("a directory stands there", "choose another name"),
    "EEXIST": ("a file stands there", "choose another name"),
    "EACCES": ("no permission to write there", "choose another folder, or: chmod u+w"),
    "EPERM": ("the system does not permit writing there", "choose another folder"),
    "EROFS": ("the file system is read-only", "choose another folder"),
    "ENOSPC": ("no space left on the disk", "free disk space, or choose another folder"),
    "EDQUOT": ("the disk quota is used up", "free disk space, or choose another folder"),
    "EFBIG": ("the file would be too large", "raise the limit (ulimit -f), or another folder"),
    "ETXTBSY": ("a program that runs", "choose another name"),
    "EIO": ("the disk or network failed to write it", "check the disk (dmesg)"),
}


def cannot_read(path: Path | str, error: Exception, fix: str = "") -> UserError:
    """The error for a file or folder that the system refuses to read, by its errno.

    error: an OSError, or a library's that names an errno in its text, as h5py's does. fix: what
    to do where the file is not there or is no file.
    """
    name, number = shown(path), errno_of(error)
    symbol = _symbol(number)
    if symbol == "ENOENT" and os.path.islink(path):
        return UserError(
            f"{name}: a link to nothing ({shown(os.readlink(path))})",
            "make the link again, or copy the file itself",
        )
    what, usual = _READ_ERRORS.get(symbol, (_reason(error), RIGHT_FILE))
    if fix and usual == RIGHT_FILE:
        usual = fix
    return UserError(f"cannot read {name}: {what}{_errno_words(number)}", usual)


def cannot_write(path: Path | str, error: Exception, fix: str = "") -> UserError:
    """The error for a file or folder that the system refuses to write, by its errno.

    fix: what to do in place of the usual order.
    """
    number = errno_of(error)
    symbol = _symbol(number)
    usual = ("choose another folder", *_READ_ERRORS.get(symbol, (_reason(error), "")))
    what, order = _WRITE_ERRORS.get(symbol, (usual[1], usual[0]))
    return UserError(f"cannot write {shown(path)}: {what}{_errno_words(number)}", fix or order)


def errno_of(error: Exception) -> int | None:
    """The errno of an error: its own, or the one that a library's text names; None without."""
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return number
    found = re.search(r"errno = (\d+)", str(error))
    return int(found[1]) if found else None


def may_come_back(error: Exception) -> bool:
    """Whether what could not be read may be there in a moment, as the same file.

    So where the system failed to read it, such as a network disk that is away, and where an HDF5
    file ends too early, which may still be copied. Content of another kind stays as it is.
    """
    if isinstance(error, UserError):
        cause = error.__cause__  # h5py also raises KeyError and RuntimeError for such a disk
        return cause is not None and (bool(errno_of(cause)) or _CUT in str(cause))
    return isinstance(error, OSError)


def _symbol(number: int | None) -> str:
    return errno.errorcode.get(number, "") if number is not None else ""


def _errno_words(number: int | None) -> str:
    return f" (errno {number}: {os.strerror(number)})" if number else ""


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]


def _special(mode: int) -> FileKind | None:
    """What a path is that is no regular file."""
    for is_kind, key, what in (
        (stat.S_ISDIR, "directory", "a directory"),
        (stat.S_ISFIFO, "pipe", "a named pipe"),
        (stat.S_ISSOCK, "socket", "a socket"),
        (stat.S_ISCHR, "device", "a device"),
        (stat.S_ISBLK, "device", "a device"),
    ):
        if is_kind(mode):
            return FileKind(key, what, RIGHT_FILE)
    return None


def _zeros(start: bytes, size: int) -> FileKind | None:
    if start.strip(b"\x00"):
        return None
    what = f"a file of zeros ({size} bytes)" if size <= READ_BYTES else "zeros where data begins"
    return FileKind("zeros", f"{what}: space was reserved and not filled", AGAIN)


def _container(name: str, start: bytes, size: int) -> FileKind | None:
    """HDF5, zip and what is kept in zip files, tar, pickle, safetensors."""
    if start.startswith(HDF5_SIGNATURE):
        end = _hdf5_end(start)
        if end is not None and size < end:
            what = f"an HDF5 file that ends too early ({size} of {end} bytes)"
            return FileKind("hdf5_cut", what, AGAIN)
        return FileKind("hdf5", "an HDF5 file", CONVERT)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        length = int.from_bytes(start[26:28], "little")
        first = start[30 : 30 + length]
        if first.endswith((b"/data.pkl", b"/version", b"/byteorder")):
            return FileKind("torch_zip", "a PyTorch file", CONVERT)
        if first.endswith(b".npy"):
            return FileKind("npz", "a NumPy .npz file", CONVERT)
        return FileKind("zip", "a zip archive", f"unpack it: unzip {name}")
    if start[257:262] == b"ustar":
        return FileKind("tar", "a tar archive", f"unpack it: tar -xf {name}")
    if start[0] == 0x80 and len(start) > 1 and start[1] in range(2, 6):
        return FileKind("pickle", "a Python pickle", CONVERT)
    header = int.from_bytes(start[:8], "little")
    if 2 <= header <= 100_000_000 and start[8:9] == b"{":
        if size < 8 + header:
            what = f"a safetensors file that ends in its header ({size} bytes)"
            return FileKind("safetensors_cut", what, AGAIN)
        return FileKind("safetensors", "a safetensors file", CONVERT)
    return None


def _hdf5_end(start: bytes) -> int | None:
    """The size that an HDF5 file has according to its header; None where that is unknown."""
    if len(start) < 96:
        return 96
    version = start[8]
    width, at = {0: (start[13], 24), 1: (start[13], 28)}.get(version, (start[9], 12))
    if version > 3 or width not in (4, 8):
        return None
    fields = (start[at + which * width : at + (which + 1) * width] for which in (0, 2))
    base, end = (int.from_bytes(field, "little") for field in fields)
    return base + end if end < 1 << (8 * width - 1) else None


def _tensorflow(start: bytes, end: bytes, size: int) -> FileKind | None:
    if end == TENSORFLOW_INDEX_END:
        return FileKind("tensorflow_index", "the index of a TensorFlow checkpoint", RIGHT_FILE)
    length = int.from_bytes(start[:8], "little")
    if len(start) >= 12 and 0 < length < 1 << 40:
        crc = _crc32c(start[:8])
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        if masked == int.from_bytes(start[8:12], "little"):
            return FileKind("tfrecord", "a TFRecord file", CONVERT)
    return None


def _crc32c(data: bytes) -> int:
    """CRC-32C of a few bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def _text(start: bytes, size: int) -> FileKind | None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        fix = "convert it: iconv -f UTF-16 -t UTF-8"
        return FileKind("utf16", "text in UTF-16", fix)
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # a character may be cut at the end
    try:
        text = decoder.decode(start, final=size <= len(start))
    except UnicodeDecodeError:
        return None
    if any(character < " " and character not in "\t\n\r\f\v" for character in text):
        return None
    begins = text.lstrip()[:200].lower()
    if re.match(r"<(!doctype html|html|head|body)", begins):
        return FileKind("html", "a web page (HTML)", f"{AGAIN}: a server sent a page in its place")
    if begins.startswith("<?xml") or begins.startswith("<error>"):
        return FileKind("xml", "an XML document", f"{AGAIN}, or {RIGHT_FILE}")
    if begins.startswith("#!"):
        return FileKind("script", "a script", RIGHT_FILE)
    if re.match(r'\{\s*("|\}|$)|\[\s*("|\{|\[|\]|-?\d|$)', begins):
        return FileKind("json", "JSON text", RIGHT_FILE)
    line = text.strip().split("\n")[0].strip()[:40]
    return FileKind("text", f"plain text that begins {line!r}" if line else "blanks", RIGHT_FILE)
