"""Which of the training checkpoints in an output_dir is the newest.

Each run in an output_dir has a number, one higher than the highest before it, which its
checkpoints hold. Neither the names of the folders nor the times of the files tell the order: a
clock may have been wrong, and folders are copied.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bert_pretraining.checkpoint.torch_file import read_torch_file
from bert_pretraining.errors import UserError

RUN_NUMBER = "run_number"  # key of the training state
_NAME = re.compile(r"model\.ckpt-(\d+)\.pt")


def saved_in(folder: Path) -> list[Path]:
    """The files `model.ckpt-<step>.pt` of a folder, the lowest step first."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("model.ckpt-*.pt"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


@dataclass(frozen=True)
class SavedRun:
    """A folder with checkpoints.

    files: the highest step first. number: of the run; 0 where an older version wrote it, infinite
    where no file is a whole training checkpoint. step: of the newest whole one. written: the time
    of that file in seconds since 1970, 0 where it lies in the future. state: the training state in
    that file, whose checksums were not verified; empty where there is none.
    """

    folder: Path
    files: tuple[Path, ...]
    number: float
    step: int
    written: float
    state: Mapping = field(default_factory=dict, compare=False, repr=False)

    def age(self, output_dir: Path) -> tuple:
        """A key that sorts the newest last. output_dir: where the runs are."""
        # A copy of a run's folder has the run's number, and its file times say when it was copied.
        in_order = self.step if self.number else 0
        beside = self.folder == output_dir
        return self.number, in_order, not beside, self.written, self.step, self.folder.name


def runs_in(output_dir: Path) -> list[SavedRun]:
    """The runs with checkpoints in `output_dir`, the newest first.

    Runs that nothing can be read from come first, so that whoever takes the newest learns of
    them. Files in `output_dir` itself, where upstream writes them, are a run too.
    """
    folders = sorted(path for path in output_dir.glob("run-*") if path.is_dir())
    runs = [_run(folder) for folder in [output_dir, *folders] if saved_in(folder)]
    return sorted(runs, key=lambda run: run.age(output_dir), reverse=True)


def latest_by_name(output_dir: Path) -> SavedRun | None:
    """The run with checkpoints whose folder's name, a time, is the latest; no other run is read.

    A clock may have been wrong: where it matters which run is the newest, ask `runs_in`.
    """
    folders = sorted(output_dir.glob("run-*"), reverse=True)
    return next((_run(folder) for folder in folders if folder.is_dir() and saved_in(folder)), None)


def newest_first(output_dir: Path) -> list[Path]:
    """Every checkpoint of the runs in `output_dir`, the last one of the newest run first."""
    return [path for run in runs_in(output_dir) for path in run.files]


def next_run_number(folder: Path) -> int:
    """The number of the run in `folder`: one more than the highest beside it."""
    others = [run.number for run in runs_in(folder.parent) if run.folder != folder]
    return 1 + int(max((number for number in others if math.isfinite(number)), default=0))


def _run(folder: Path) -> SavedRun:
    files = tuple(reversed(saved_in(folder)))
    for path in files:
        state = _state(path)
        if state is not None:
            written = path.stat().st_mtime
            return SavedRun(
                folder,
                files,
                _number(state.get(RUN_NUMBER)),
                _number(state.get("global_steps")),
                written if written <= time.time() else 0.0,
                state,
            )
    return SavedRun(folder, files, math.inf, 0, 0.0)


def _number(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _state(path: Path) -> dict | None:
    """The training state in a file; None if it is damaged or holds weights alone.

    Checksums are not verified: whoever takes the file does that.
    """
    try:
        content = read_torch_file(path, verify=False)
    except UserError:
        return None  # whoever reads the files in order reports it
    state = content.get("state") if isinstance(content, dict) else None
    return state if isinstance(state, dict) and "order" in state else None
