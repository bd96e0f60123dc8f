"""The index: what the headers of many shards say, kept in one small file beside them.

A start with thousands of shards on network storage would wait for the header of each. With an index
it asks only for each file's size and time of change, many files at once. An entry counts while both
are what they were when the header was read. So an index that is copied, old or of other files costs
nothing but the time to read headers again; and one that cannot be read, or is not what it should
be, counts as absent.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bert_pretraining.data.flat_shard import ShardInfo
from bert_pretraining.data.shard_names import INDEX_NAME, ShardFolder
from bert_pretraining.runtime.file_kind import shown
from bert_pretraining.runtime.files import in_threads, write_shared

VERSION = 1
FEWEST = 64  # shards; of fewer, such as the mini data set, no file is left in the folder
# A file that changes again within one tick of its file system's clock may keep its time. So an
# entry counts only if the index was written clearly later. FAT has the coarsest clock: 2 s.
SETTLED_NS = 2 * 10**9
MOST_BYTES = 4096  # of one entry, before the index counts as something else

Headers = Callable[[Sequence[Path]], list[ShardInfo]]


class _State(NamedTuple):
    """Of a file: bytes, and nanoseconds of its last change."""

    size: int
    changed: int


class _Entry(NamedTuple):
    """What the index says of one shard."""

    state: _State
    num_sequences: int
    max_seq_length: int | None
    forms: tuple[str, ...]

    def info(self, path: Path) -> ShardInfo:
        return ShardInfo(path, self.num_sequences, self.max_seq_length, self.forms)


def inspect_indexed(
    folder: ShardFolder, read: Headers, say: Callable[[str], None] | None = None
) -> list[ShardInfo]:
    """The headers of the folder's shards, in order: from the index where it knows them.

    Others are read, and the index is written again.

    Args:
        read: reads the headers of files, in order.
        say: gets a line if the index cannot be written.
    """
    names = folder.names
    states = in_threads(_state, folder.shards)
    entries = _load(folder.directory, len(names))
    infos: list[ShardInfo | None] = [
        entries[name].info(path) if name in entries and entries[name].state == state else None
        for name, path, state in zip(names, folder.shards, states, strict=True)
    ]
    unknown = [index for index, info in enumerate(infos) if info is None]
    if unknown:
        for index, info in zip(unknown, read([folder.shards[i] for i in unknown]), strict=True):
            infos[index] = info
        _store(
            folder.directory, dict(zip(names, zip(states, infos, strict=True), strict=True)), say
        )
    return infos


def contradictions(directory: Path, num_sequences: dict[str, int]) -> list[str]:
    """The shards for which an index that counts says another number of sequences.

    num_sequences: what was read, by the name below the directory.
    """
    entries = _load(directory, len(num_sequences))
    return [
        name
        for name, count in num_sequences.items()
        if name in entries
        and entries[name].num_sequences != count
        and entries[name].state == _state(directory / name)
    ]


def _state(path: Path) -> _State | None:
    """None where the system does not say: reading the file will tell why."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return _State(status.st_size, status.st_mtime_ns)


def _load(directory: Path, count: int) -> dict[str, _Entry]:
    """The entries that count, by name below the directory; none where there is no sound index.

    count: of the shards that are there.
    """
    try:
        # A named pipe without a writer would block.
        descriptor = os.open(directory / INDEX_NAME, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            most = MOST_BYTES * (count + 1)
            if not stat.S_ISREG(status.st_mode) or status.st_size > most:
                return {}
            content = json.loads(file.read(most))
        if content["version"] != VERSION:
            return {}
        written = status.st_mtime_ns
        entries: dict[str, _Entry] = {}
        for name, (size, changed, *rest) in content["shards"].items():
            entry = _entry(_State(size, changed), *rest)
            if entry is not None and changed < written - SETTLED_NS:
                entries[name] = entry
        return entries
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _entry(state: _State, sequences: object, length: object, forms: object) -> _Entry | None:
    """None unless every value can be true; a sequence takes at least a byte of its file."""
    numbers = (*state, sequences, *([] if length is None else [length]))
    if not all(type(number) is int and number >= 0 for number in numbers):
        return None
    if sequences > state.size or not isinstance(forms, list):
        return None
    if not all(isinstance(form, str) and form.isprintable() for form in forms):
        return None
    return _Entry(state, sequences, length, tuple(forms))


def _store(
    directory: Path,
    shards: dict[str, tuple[_State | None, ShardInfo]],
    say: Callable[[str], None] | None,
) -> None:
    lines = [
        f"{json.dumps(name)}: "
        + json.dumps([*state, info.num_sequences, info.max_seq_length, list(info.forms)])
        for name, (state, info) in shards.items()
        if state is not None
    ]
    text = (
        f'{{"version": {VERSION},\n"columns": ["bytes", "changed (ns)", "sequences", '
        '"max_seq_length", "other forms"],\n"shards": {\n' + ",\n".join(lines) + "\n}}\n"
    )
    path = directory / INDEX_NAME
    try:
        # Whoever may read the shards may read the index.
        mode = os.stat(directory / next(iter(shards))).st_mode & 0o666
        write_shared(path, text, mode)
    except OSError as error:
        if say is not None:
            say(
                f"Notice: {shown(path)} cannot be written ({error.strerror}): each start reads the "
                f"headers of {len(lines)} shards, until a user who may write there starts a run"
            )
