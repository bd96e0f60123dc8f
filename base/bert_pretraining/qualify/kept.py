"""What a stage, or one of its ranks, has found so far: it stays where the stage is ended early."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bert_pretraining.qualify.context import Context


def keep_figures(
    context: Context,
    stage: str,
    figures: Mapping[str, object],
    notes: Sequence[str] = (),
    fault: str = "",
) -> None:
    """Keep a stage's figures and notes, in place of those before.

    fault: why the stage fails already, whatever it would find later.
    """
    kept = {"figures": figures, "notes": list(notes), "fault": fault}
    _write(_folder(context) / f"{stage}.json", kept)


def kept_figures(context: Context, stage: str) -> dict[str, Any]:
    """{"figures": ..., "notes": ..., "fault": ...}; all are empty where it has kept none."""
    return _read(_folder(context) / f"{stage}.json") or {"figures": {}, "notes": [], "fault": ""}


def keep_of_rank(context: Context, rank: int, found: Mapping[str, object]) -> None:
    """Keep what a rank would return if it ended now, in place of that before."""
    _write(_folder(context) / "ranks" / f"{rank}.json", found)


def kept_of_ranks(context: Context) -> list[dict[str, Any]]:
    """What each rank has kept, in their order; empty unless all have."""
    found = [_read(_folder(context) / "ranks" / f"{rank}.json") for rank in range(context.ranks)]
    return [] if None in found else found


def keep_progress(context: Context, rank: int) -> None:
    """A rank has made updates, of which nothing is kept yet."""
    file = _folder(context) / "progress" / str(rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()


def latest(context: Context) -> float:
    """When the stage or a rank of it last kept something: seconds as of `time.time`, 0.0: never."""
    files = [file for file in _folder(context).rglob("*") if file.is_file()]
    return max((file.stat().st_mtime for file in files), default=0.0)


def forget_ranks(context: Context) -> None:
    """Before other ranks start."""
    shutil.rmtree(_folder(context) / "ranks", ignore_errors=True)


def forget(context: Context) -> None:
    """Before a stage starts, and when its end is known."""
    shutil.rmtree(_folder(context), ignore_errors=True)


def _folder(context: Context) -> Path:
    return context.folder / "stages" / "so_far"


def _write(path: Path, found: Mapping[str, object]) -> None:
    """Atomically. It need not survive a power failure, and so does not wait for the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(found), encoding="utf-8")
    os.replace(new, path)


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
