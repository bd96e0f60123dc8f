"""Writing checkpoints whole, in a thread, while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bert_pretraining.checkpoint.run_order import RUN_NUMBER, next_run_number, saved_in
from bert_pretraining.runtime.files import write_whole


def checkpoint_path(folder: Path, global_steps: int) -> Path:
    """`model.ckpt-<step>.pt`, as upstream names it."""
    return folder / f"model.ckpt-{global_steps}.pt"


def save_checkpoint(path: Path, model: dict, optimizer: dict, state: dict) -> None:
    """Write {"model", "optimizer", "state"}, which hold plain tensors, numbers and text only."""
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
    """Writes the checkpoints of a run in a thread, one at a time, and keeps the newest.

    An error does not end the run: `report` says it, and the files that exist stay.

    Each file holds the run's number in its output_dir, by which `newest_first` orders the runs.

    Args:
        folder: of the run, in its output_dir.
        keep: how many of its checkpoints to keep; 0 for all.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._thread: threading.Thread | None = None
        self._messages: list[str] = []
        self._run_number: int | None = None  # until the first file is written

    def write(self, global_steps: int, content: dict[str, dict]) -> None:
        """Start to write `content`, once the checkpoint before is written.

        The caller must not change `content` until it is written.
        """
        self._join()
        path = checkpoint_path(self._folder, global_steps)
        # This is no daemon thread, so that a program waits for it before it ends.
        self._thread = threading.Thread(
            target=self._write, args=(path, content), name="checkpoint writer"
        )
        self._thread.start()

    def report(self, say: Callable[[str], None], wait: bool = False) -> None:
        """Call `say` with a line for each file that was written or could not be.

        wait: wait for the file that is being written now.
        """
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
        if self._run_number is None:
            self._run_number = next_run_number(self._folder)
        state = {**content["state"], RUN_NUMBER: self._run_number}
        try:
            save_checkpoint(path, **{**content, "state": state})
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
    """The message of the operating system, where an OSError is the cause, else of the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]
