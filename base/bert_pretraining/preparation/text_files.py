"""Text files of others: which files of a folder are text, and how each is read.

Everything that reads text reads it here, so compressed files are read everywhere, and files that
are no text are refused everywhere, in the same words.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from bert_pretraining.errors import UserError
from bert_pretraining.runtime import file_kind
from bert_pretraining.runtime.packages import how_to_install
from bert_pretraining.runtime.words import plural

HEAD_BYTES = 1 << 16  # enough to tell what a file is
# Kinds of runtime/file_kind.py that may be text. What has no kind may be text in another encoding.
TEXT_KINDS = {"text", "json", "script", "empty"}
NOT_TEXT = "leave it out, or give text in its place"
# Made beside text by downloads, checksum programs and file managers.
NEVER_TEXT = {".md5", ".sha1", ".sha256", ".sha512"}
OF_FILE_MANAGERS = {"desktop.ini", "thumbs.db"}
_PART = re.compile(r"(\d+)[-_]of[-_](\d+)")
# first bytes, name, how to open a file; None for zstd, whose module may be missing
_COMPRESSIONS: tuple[tuple[bytes, str, Callable[[IO[bytes]], IO[bytes]] | None], ...] = (
    (b"\x1f\x8b", "gzip", lambda file: gzip.GzipFile(fileobj=file)),
    (b"BZh", "bz2", bz2.BZ2File),
    (b"\xfd7zXZ\x00", "xz", lzma.LZMAFile),
    (b"\x28\xb5\x2f\xfd", "zstd", None),
)
_NUL_SHARE = 0.1  # of characters; text in UTF-16 has about a half


@dataclass(frozen=True)
class FolderTexts:
    """The text files of a folder by name, and what was left out: a name with its reason."""

    files: list[Path]
    left_out: list[str] = field(default_factory=list)


def why_no_text(name: str) -> str | None:
    """Why a file of this name is never text; None where it may be text."""
    lowered = name.lower()
    if file_kind.hidden(name):
        return "hidden"
    if lowered in OF_FILE_MANAGERS:
        return "made by a file manager"
    if file_kind.unfinished(name):
        return "an unfinished or temporary file"
    if any(lowered.endswith(ending) for ending in NEVER_TEXT):
        return "a checksum"
    return None


def folder_texts(
    folder: Path, flag: str, not_training: Callable[[Path], str | None]
) -> FolderTexts:
    """The text files directly in a folder, sorted by name.

    flag: names the folder in messages. not_training: says why a file that may be text is left out,
    or None.

    Raises UserError where the folder is none, cannot be read or holds no text file.
    """
    if not folder.exists():
        raise UserError(f"no such directory of text files: {folder}", f"pass {flag} DIR")
    if not folder.is_dir():
        raise UserError(
            f"{flag} {folder} is a file, not a directory", f"pass {flag} {folder.parent}"
        )
    files, left_out = [], []
    for path in sorted(_entries(folder)):
        if path.is_dir():
            reason: str | None = "a folder"
        else:
            reason = why_no_text(path.name) or not_training(path)
        if reason is None:
            files.append(path)
        else:
            left_out.append(f"{path.name} ({reason})")
    if not files:
        found = f", only {listed(left_out)}" if left_out else ""
        raise UserError(
            f"no text files in {folder}{found}; expected part-00000-of-00500 and so on",
            f"make them with python -m bert_pretraining data segment, or pass another {flag}",
        )
    return FolderTexts(files, left_out)


def expanded(inputs: Iterable[Path]) -> FolderTexts:
    """Files as they are; of each folder, the text files in it and in its folders.

    Raises UserError for a folder that cannot be read or holds no text file, and for an input that
    is not there.
    """
    files, left_out = [], []
    for path in inputs:
        if not path.is_dir():
            reason = why_no_text(path.name) if path.exists() else None
            if reason is None:
                files.append(path)
            else:
                left_out.append(f"{path} ({reason})")
            continue
        found = list(_below(path))
        if not any(reason is None for _, reason in found):
            raise UserError(f"{path}: no text file in this folder", "pass a folder that holds text")
        files += [inner for inner, reason in found if reason is None]
        left_out += [f"{inner} ({reason})" for inner, reason in found if reason is not None]
    return FolderTexts(files, left_out)


def listed(items: Sequence[str], most: int = 5) -> str:
    """The first items, and how many more there are."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def missing_parts(names: Iterable[str]) -> str | None:
    """What is missing of the parts that names such as part-00000-of-00500 promise; None if nothing.

    Names without "N-of-M" or "N_of_M" promise nothing.
    """
    promised: dict[tuple[str, int], set[int]] = {}
    for name in names:
        found = _PART.search(name)
        if found:
            key = name[: found.start()], int(found[2])
            promised.setdefault(key, set()).add(int(found[1]))
    for (beginning, total), numbers in sorted(promised.items()):
        first = 1 if total in numbers and 0 not in numbers else 0
        absent = sorted(set(range(first, first + total)) - numbers)
        if absent:
            numbers_shown = listed([str(number) for number in absent])
            of_which = f" {beginning}*" if len(promised) > 1 else ""
            there = total - len(absent)
            return (
                f"{there} of {total} parts{of_which} {plural(there, 'is')} there "
                f"(not number {numbers_shown})"
            )
    return None


def require_all_parts(names: Iterable[str], where: str, allowed: bool) -> list[str]:
    """Return a line for each set of parts that is not whole, where that is allowed.

    Raises UserError where it is not.
    """
    missing = missing_parts(names)
    if missing is None:
        return []
    if not allowed:
        raise UserError(
            f"{where}: {missing}",
            "copy the others there too, or pass --allow_missing_parts to go on without them",
        )
    return [f"{where}: {missing}: the data set is made of these alone"]


def read_text(path: Path) -> str:
    """A whole text file, decompressed, without a byte order mark, with its line ends as they are.

    gzip, bz2 and xz files are read, and zstd where the Python has a module for it.

    Raises UserError for a file that cannot be read, is damaged, is another kind of file, or is not
    UTF-8.
    """
    return _decode(_read(path, whole=True), path)


def read_start(path: Path) -> str:
    """The beginning of a text file, as `read_text` reads it, without a character that is cut."""
    return _read(path, whole=False).removeprefix(b"\xef\xbb\xbf").decode(errors="ignore")


def read_bytes(path: Path) -> bytes:
    """A whole file; UserError if it cannot be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise file_kind.cannot_read(path, error) from error


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise file_kind.cannot_read(folder, error) from error


def _below(folder: Path) -> Iterable[tuple[Path, str | None]]:
    """Every file in a folder and its folders, and why it is no text; hidden folders are one."""
    for path in sorted(_entries(folder)):
        reason = why_no_text(path.name)
        if path.is_dir() and reason is None and not path.is_symlink():
            yield from _below(path)
        elif path.is_dir() and reason is None:
            yield path, "a link to a folder"
        else:
            yield path, reason


def _read(path: Path, whole: bool) -> bytes:
    """The content of a text file, decompressed; only its beginning if not `whole`."""
    file_kind.require_regular(path, "name a text file that can be read")
    try:
        with open(path, "rb") as file:
            magic = file.read(8)
            file.seek(0)
            for start, name, opened in _COMPRESSIONS:
                if magic.startswith(start):
                    return _decompress(file, path, name, opened or _open_zstd, whole)
            return _read_text_of(file, path, whole)
    except OSError as error:
        raise file_kind.cannot_read(path, error) from error


def _read_text_of(content: IO[bytes], path: Path, whole: bool) -> bytes:
    start = content.read(HEAD_BYTES)
    _require_text(start, path)
    return start + content.read() if whole else start


def _open_zstd(file: IO[bytes]) -> IO[bytes]:
    """Open with Python's own module (3.14 and later), or a package that may be installed."""
    for module, name in (
        ("compression.zstd", "ZstdFile"),
        ("backports.zstd", "ZstdFile"),
        ("pyzstd", "ZstdFile"),
    ):
        with contextlib.suppress(ImportError):
            return getattr(importlib.import_module(module), name)(file)
    with contextlib.suppress(ImportError):
        zstandard = importlib.import_module("zstandard")
        return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    raise UserError(
        f"{file.name}: a zstd-compressed file, and this Python has no module for it",
        f"install one: {how_to_install(['zstandard'])}; or decompress it: unzstd {file.name}",
    )


def _decompress(
    file: IO[bytes], path: Path, name: str, opened: Callable[[IO[bytes]], IO[bytes]], whole: bool
) -> bytes:
    try:
        with opened(file) as content:
            return _read_text_of(content, path, whole)
    except Exception as error:
        # Each module has errors of its own for damage; those of the system have a number.
        damage = isinstance(error, OSError | EOFError | zlib.error | lzma.LZMAError)
        of_zstd = type(error).__name__ == "ZstdError"
        if not (damage or of_zstd) or getattr(error, "errno", None) is not None:
            raise
        raise UserError(
            f"{path}: a damaged or cut-off {name} file ({error})", file_kind.AGAIN
        ) from error


def _require_text(start: bytes, path: Path) -> None:
    """Raise UserError where the first bytes of a file, decompressed, are no text's."""
    begins = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:2000]
    if begins.startswith(b"<mediawiki") or (b"<mediawiki" in begins and begins[:5] == b"<?xml"):
        raise UserError(
            f"{path}: a MediaWiki XML dump, not text",
            "extract its text first: python -m wikiextractor.WikiExtractor " + f"{path} -o RAW",
        )
    # The size is not known; a beginning that is full has more behind it.
    size = len(start) + (len(start) == HEAD_BYTES)
    head = start[: file_kind.READ_BYTES]
    kind = file_kind.kind_of_bytes(head, b"", size, path) if start else None
    if kind is not None and kind.key not in TEXT_KINDS:
        markup = kind.key in ("html", "xml")
        fix = NOT_TEXT if markup or kind.fix == file_kind.RIGHT_FILE else kind.fix
        raise UserError(f"{path}: {kind.what}, not text", fix)


def _decode(data: bytes, path: Path) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + (len(data) - len(error.object))  # without the byte order mark
        line = data.count(b"\n", 0, at) + 1
        raise UserError(
            f"{path}: not UTF-8 text (byte {at}), in line {line}",
            f"convert the file to UTF-8: iconv -f LATIN1 -t UTF-8 {path}, or the encoding it has",
        ) from error
    zeros = text.count("\0")
    if zeros > _NUL_SHARE * len(text):
        raise UserError(
            f"{path}: {zeros:,} of {len(text):,} characters are NUL: not text, or text in UTF-16",
            "convert the file to UTF-8, or copy it again",
        )
    if "\n" not in text and text.rstrip().count("\r"):
        raise UserError(
            f"{path}: its lines end in CR alone, the form of old Macs",
            f"convert the line ends: tr '\\r' '\\n' < {path}",
        )
    return text
