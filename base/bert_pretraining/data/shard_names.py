"""Which files of a folder are shards, by their names; no file is opened.

The launcher, the ranks, `doctor`, `bench loader` and `data verify` share this choice and its
messages. Only the standard library is imported: a launch checks the folders before any large
package is imported.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bert_pretraining.errors import UserError
from bert_pretraining.runtime.file_kind import cannot_read, hidden, kind_of, shown, unfinished
from bert_pretraining.runtime.files import PARTIAL_SUFFIX, in_threads, require_directory
from bert_pretraining.runtime.words import counted, plural

NAME_PATTERN = re.compile(r"part[-_](\d+)[-_]of[-_](\d+)\.(hdf5|h5)")
WORD = "part"  # in the name of a shard where no pattern is given
HDF5_ENDINGS = (".hdf5", ".h5", ".hdf", ".he5")
# Files about a shard, which lie beside it under its name.
SIDE_FILES = (
    ".md5",
    ".sha1",
    ".sha256",
    ".sha512",
    ".crc",
    ".chk",
    ".txt",
    ".json",
    ".log",
    ".xml",
)
SHOWN = 3  # names in a message
# What `shard_index` keeps beside the shards; while it is written, its name has a longer ending.
INDEX_NAME = ".shard_index.json"


@dataclass(frozen=True)
class ShardFolder:
    """The content of a folder of shards.

    shards: what is read, sorted by name. other_shards: names of files that look like shards and
    are not read, because of their name; unread: all other files that are not read. broken: names of
    shards that are no files, such as links to nothing.
    """

    directory: Path
    pattern: str | None
    shards: list[Path]
    other_shards: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def notices(self) -> list[str]:
        """What a user should know before training on these files: one line each."""
        found, place = [], shown(self.directory)
        if self.other_shards:
            what = f"without '{WORD}' in the name" if self.pattern is None else "of other names"
            choice = quoted(_pattern_for([*self.other_shards, *self.names]))
            found.append(
                f"{place}: not read: {_count(self.other_shards, 'file')} {what} "
                f"({some(self.other_shards)}); to read them too: --shard_pattern {choice}"
            )
        if self.unfinished:
            found.append(
                f"{place}: not read: {_count(self.unfinished, 'file')} of an unfinished download "
                f"or copy ({some(self.unfinished)})"
            )
        missing = missing_shards(self.names)
        if missing:
            absent = len(missing.names)
            there = missing.count - absent
            found.append(
                f"{place}: {there} of {missing.count} shards {plural(there, 'is')} here; "
                f"{absent} {plural(absent, 'is')} missing ({some(missing.names)})"
            )
        return found

    @property
    def names(self) -> list[str]:
        """The names of the shards, below the folder."""
        return [str(path.relative_to(self.directory)) for path in self.shards]


@dataclass(frozen=True)
class Missing:
    """The shards that are not there. count: of the whole set."""

    count: int
    names: list[str]


class NoShardsError(UserError):
    """A folder without a shard."""


def shard_folder(
    directory: Path, fix: str, pattern: str | None = None, *, allow_broken: bool = False
) -> ShardFolder:
    """Choose the shards of a folder: every finished file with `part` in its name.

    Hidden files, unfinished downloads and checksum files are no shards. The folder is listed
    once and no file is opened, which is fast on network storage too.

    Args:
        fix: what to do where the folder is missing or has no shards.
        pattern: a shell pattern that chooses instead, below the folder: "*.h5", "*/*.hdf5".
        allow_broken: return the names of `broken` shards, in place of an error.

    Raises UserError if there are no shards, or if one is a link to nothing, a folder or a pipe.
    """
    require_directory(directory, "data directory", fix)
    try:
        content = _scan(directory)
        candidates = content if pattern is None else _matching(directory, pattern)
    except OSError as error:
        raise cannot_read(directory, error, fix) from error
    shards, broken = [], []
    for name, kind in candidates.items():
        if not _is_shards_name(name, pattern) or (kind == "folder" and not _is_hdf5_name(name)):
            continue
        (shards if kind == "file" else broken).append(name)
    broken.sort()
    if broken and not allow_broken:
        raise broken_shards(directory, broken)
    taken = set(shards)
    others = sorted(
        name
        for name, kind in content.items()
        if kind == "file" and name not in taken and not name.endswith(PARTIAL_SUFFIX)
    )
    if not shards and not broken:
        raise _no_shards(directory, fix, pattern, others)
    begun = [name for name in others if unfinished(name) and not hidden(name)]
    like = [name for name in others if _is_hdf5_name(name) and not hidden(name)]
    rest = [name for name in others if name not in begun and name not in like]
    paths = [directory / name for name in sorted(shards)]
    return ShardFolder(directory, pattern, paths, like, begun, rest, broken)


def _scan(directory: Path) -> dict[str, str]:
    """Each name in the folder, and what it is: "file", "folder" or "other" (as a link to nothing).

    Where an entry is no link, most listings say what it is, without a look at the file.
    """
    with os.scandir(directory) as listing:
        entries = [entry for entry in listing if not entry.name.startswith(INDEX_NAME)]
    return _with_kinds({entry.name: entry for entry in entries})


def _with_kinds(entries: Mapping[str, os.DirEntry | Path]) -> dict[str, str]:
    return dict(zip(entries, in_threads(_kind, list(entries.values())), strict=True))


def _kind(entry: os.DirEntry | Path) -> str:
    try:
        return "file" if entry.is_file() else "folder" if entry.is_dir() else "other"
    except OSError:
        return "other"  # a link that leads back to itself


def _matching(directory: Path, pattern: str) -> dict[str, str]:
    """The same for the names, below the folder, that fit the pattern."""
    try:
        if ".." in Path(pattern).parts:
            raise ValueError("'..' leads out of it")
        paths = list(directory.glob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"--shard_pattern {quoted(pattern)}: no pattern of names below a folder ({error})",
            "pass a pattern such as '*.hdf5'",
        ) from error
    return _with_kinds({str(path.relative_to(directory)): path for path in paths})


def _is_shards_name(name: str, pattern: str | None) -> bool:
    own = Path(name).name
    if hidden(own) or own.endswith(PARTIAL_SUFFIX):
        return False
    if unfinished(own) and not (pattern and unfinished(pattern)):
        return False
    return pattern is not None or (WORD in own and not own.endswith(SIDE_FILES))


def looks_like_shards(names: Sequence[str]) -> bool:
    """Whether one of the names is a shard's, by the usual rule or by its ending."""
    return any(_is_hdf5_name(name) or NAME_PATTERN.fullmatch(name) for name in names)


def _is_hdf5_name(name: str) -> bool:
    base = name.lower()
    for ending in (".gz", ".bz2", ".xz", ".zst"):
        base = base.removesuffix(ending)
    return base.endswith(HDF5_ENDINGS)


def broken_shards(directory: Path, names: list[str]) -> UserError:
    """The error for names of shards that are no files: links to nothing, folders, pipes."""
    path, more = directory / names[0], ""
    if rest := len(names) - 1:
        more = f" (and {rest} more that {plural(rest, 'is')} no files: {some(names[1:])})"
    try:
        what = kind_of(path)
    except OSError as error:
        fault = cannot_read(path, error)
        return UserError(f"{fault.problem}{more}", fault.fix)
    is_what = what.what if what else "no file"
    return UserError(
        f"{shown(path)}: {is_what}, not a shard{more}", "move it away, or copy the shard"
    )


def _no_shards(directory: Path, fix: str, pattern: str | None, others: list[str]) -> UserError:
    """The error for a folder without shards: what was expected, what is there, how to read it."""
    wanted = f"expected HDF5 files with '{WORD}' in the name"
    if pattern is not None:
        wanted = f"no file fits --shard_pattern {quoted(pattern)}"
    like = [name for name in others if _is_hdf5_name(name) and not unfinished(name)]
    below = [] if like else _below(directory)
    problem = f"no shards in {shown(directory)}: {wanted}, found "
    if like or below:
        where = "in sub-folders " if below else ""
        problem += f"{_count(like or below, 'other file')} {where}({some(like or below)})"
        choice = quoted(_pattern_for(like or below))
        return NoShardsError(problem, f"to read these pass --shard_pattern {choice}; else {fix}")
    visible = [name for name in others if not hidden(name)]
    if not visible:
        return NoShardsError(f"{problem}no files", fix)
    try:
        kind = kind_of(directory / visible[0])
    except OSError:
        kind = None  # the message does without it
    what = f", the first of them {kind.what}" if kind else ""
    problem += f"{_count(visible, 'other file')} ({some(visible)}){what}"
    if kind and kind.key == "hdf5":
        return NoShardsError(problem, f"to read these pass --shard_pattern '*'; else {fix}")
    return NoShardsError(problem, f"{kind.fix}, or {fix}" if kind else fix)


def _below(directory: Path) -> list[str]:
    """The names of HDF5 files up to three folders down."""
    try:
        return sorted(
            str(path.relative_to(directory))
            for pattern in ("*/*", "*/*/*", "*/*/*/*")
            for path in directory.glob(pattern)
            if _is_hdf5_name(path.name) and not hidden(path.name) and path.is_file()
        )
    except OSError:
        return []  # the message does without them


def _pattern_for(names: Sequence[str]) -> str:
    """A shell pattern for the files, by the commonest ending of a name."""
    ending = Counter(Path(name).suffix for name in names).most_common(1)[0][0]
    depth = max(name.count(os.sep) for name in names)
    return ("*", "*/*", "**/*")[min(depth, 2)] + ending


def missing_shards(names: Sequence[str]) -> Missing | None:
    """The shards that lack by the count in the names, `_of_NNNNN`; None where none lacks."""
    numbers: dict[int, set[int]] = {}
    for name in names:
        match = NAME_PATTERN.fullmatch(Path(name).name)
        if match:
            numbers.setdefault(int(match[2]), set()).add(int(match[1]))
    if not numbers:
        return None
    count, found = max(numbers.items(), key=lambda item: len(item[1]))
    absent = [number for number in range(count) if number not in found]
    lacking = [f"part_{number:05d}_of_{count:05d}.hdf5" for number in absent]
    return Missing(count, lacking) if lacking else None


def some(names: Sequence[str]) -> str:
    """The first names, for a message."""
    first = ", ".join(shown(name) for name in names[:SHOWN])
    return first + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def quoted(pattern: str) -> str:
    """A pattern as a shell needs it."""
    return shlex.quote(shown(pattern))


def _count(names: Sequence[str], what: str) -> str:
    return counted(len(names), what)
