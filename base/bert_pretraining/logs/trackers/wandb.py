"""Weights & Biases: an offline run in the run's folder, unless WANDB_MODE says otherwise."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bert_pretraining.logs.trackers.tracker import TrackedRun, Tracker, Value

EXIT_CODES = {"finished": 0, "failed": 1, "aborted": 130}
DEFAULT_PROJECT = "bert-pretraining"
SAVE_FAILED = "failed to save record"


class WandB(Tracker):
    """History by step, settings as the config, the final table and notices in the summary.

    The variables of W&B's environment hold, such as WANDB_PROJECT.
    """

    def __init__(self) -> None:
        # Set before the import: it would report itself over the network otherwise.
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb = wandb
        self._run: wandb.Run | None = None

    def start(self, run: TrackedRun, facts: dict[str, Value]) -> None:
        if os.environ["WANDB_MODE"] == "offline":  # all that it writes is in one place
            os.environ.setdefault("WANDB_CACHE_DIR", os.path.join(run.folder, "wandb", "cache"))
        own = os.environ.get
        self._run = self._wandb.init(
            project=own("WANDB_PROJECT", DEFAULT_PROJECT),
            group=own("WANDB_RUN_GROUP", run.group),
            name=own("WANDB_NAME", f"{run.group}/{run.name}"),
            dir=own("WANDB_DIR", run.folder),
            config=facts,
            settings=self._wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_git=True,  # it would store the changes of a user's own checkout
                disable_job_creation=True,
                x_stats_pid=os.getppid(),  # its machine figures are of the trainer
            ),
        )

    def figures(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def text(self, step: int, title: str, text: str) -> None:
        self._run.summary[f"notice/{title}"] = f"{text} (step {step})"

    def finish(self, step: int, status: str, table: dict[str, Value]) -> None:
        self._run.summary.update({"status": status, **table})
        log = self._run.settings.log_internal
        self._run.finish(exit_code=EXIT_CODES[status])
        _raise_failure(Path(log))


def _raise_failure(log: Path) -> None:
    """Raise OSError if records could not be saved. W&B tells that only in a log of its own."""
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # another version keeps none
    for line in lines:
        if SAVE_FAILED in line:
            raise OSError(json.loads(line)["msg"])
