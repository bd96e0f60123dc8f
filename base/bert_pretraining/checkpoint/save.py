"""Writing checkpoints: whole or not at all, and without stopping the training."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bert_pretraining.runtime.files import write_whole

_NAME = re.compile(r"model\.ckpt-(\d+)\.pt")


def checkpoint_path(folder: Path, global_steps: int) -> Path:
    """`model.ckpt-<step>.pt`, as upstream names it."""
    return folder / f"model.ckpt-{global_steps}.pt"


def saved_in(folder: Path) -> list[Path]:
    """The files `model.ckpt-<step>.pt` of a folder, the lowest step first."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("model.ckpt-*.pt"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def newest_first(output_dir: Path) -> list[Path]:
    """Every checkpoint of the runs in `output_dir`: the latest run's last one first.

    Files that lie in `output_dir` itself, as upstream has them, come last.
    """
    runs = sorted((path for path in output_dir.glob("run-*") if path.is_dir()), reverse=True)
    return [path for folder in [*runs, output_dir] for path in reversed(saved_in(folder))]


def save_checkpoint(path: Path, model: dict, optimizer: dict, state: dict) -> None:
    """Write {"model", "optimizer", "state"}: plain tensors, numbers and texts only."""
    _write(path, {"model": model, "optimizer": optimizer, "state": state})


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write a start checkpoint in the apex layout: {"model": named tensors}."""
    _write(path, {"model": weights})


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            torch.save(content, file)

    write_whole(path, write)


class CheckpointWriter:
    """Writes a run's checkpoints in a thread, one at a time, and keeps the newest.

    What goes wrong is told by `report` and ends nothing: the run goes on, and the files that
    were there stay.

    Args:
        folder: of this run.
        keep: how many of its checkpoints to keep; 0 for all.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._thread: threading.Thread | None = None
        self._messages: list[str] = []

    def write(self, global_steps: int, content: dict[str, dict]) -> None:
        """Begin to write `content`, which nobody changes meanwhile; waits for the one before."""
        self._join()
        path = checkpoint_path(self._folder, global_steps)
        # No daemon: a program that ends waits for a file that is begun.
        self._thread = threading.Thread(
            target=self._write, args=(path, content), name="checkpoint writer"
        )
        self._thread.start()

    def report(self, say: Callable[[str], None], wait: bool = False) -> None:
        """Say what became of the files that were begun; wait for the last one if asked to."""
        if wait:
            self._join()
        messages, self._messages = self._messages, []
        for message in messages:
            say(message)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, path: Path, content: dict[str, dict]) -> None:
        try:
            save_checkpoint(path, **content)
        except (OSError, RuntimeError) as error:
            # RuntimeError: torch.save raises it where a file's OSError is the reason.
            self._messages.append(f"Warning: no checkpoint was written: {path}: {_reason(error)}")
            return
        self._messages.append(f"Checkpoint: {path}")
        if self._keep:
            for old in saved_in(self._folder)[: -self._keep]:
                self._remove(old)

    def _remove(self, old: Path) -> None:
        try:
            old.unlink()
        except OSError as error:
            self._messages.append(
                f"Warning: the old checkpoint {old} could not be removed: {_reason(error)}"
            )


def _reason(error: BaseException) -> str:
    """What the system said, if it is what an error came from."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]
