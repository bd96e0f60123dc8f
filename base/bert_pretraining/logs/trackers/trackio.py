"""Trackio: a local store in the output folder, unless TRACKIO_DIR, a Space or a server is set."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

from bert_pretraining.logs.trackers.tracker import TrackedRun, Tracker, Value, markdown

STORE = "trackio"
ONLINE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class Trackio(Tracker):
    """Metrics by step, facts as the config, notices as alerts, the final table as metrics and text.

    The output folder is one project. Trackio only warns where it cannot write, and from a thread of
    its own: that warning is the failure here.
    """

    def __init__(self) -> None:
        if not any(os.environ.get(name) for name in ONLINE):
            os.environ["HF_HUB_OFFLINE"] = "1"  # it would ask who the user is
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        self._failure = ""
        warnings.showwarning = self._note_warning

    def start(self, run: TrackedRun, facts: dict[str, Value]) -> None:
        os.environ.setdefault("TRACKIO_DIR", os.path.join(run.output_dir, STORE))
        import trackio  # reads TRACKIO_DIR as it is imported

        self._trackio = trackio
        self._run = trackio.init(
            project=re.sub(r"[^\w-]", "_", run.group),
            name=run.name,
            config=facts,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def figures(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)
        self._raise_failure()

    def text(self, step: int, title: str, text: str) -> None:
        self._run.alert(title, text=text, level=self._trackio.AlertLevel.WARN, step=step)

    def finish(self, step: int, status: str, table: dict[str, Value]) -> None:
        table = {"status": status, **table}
        self._run.log({**table, "result": self._trackio.Markdown(markdown(table))}, step=step)
        self._run.finish()
        self._raise_failure()

    def _note_warning(
        self, message: Warning | str, category: type[Warning], filename: str, *_: object
    ) -> None:
        """In place of `warnings.showwarning`."""
        print(f"{category.__name__}: {message}")
        if category is UserWarning and "trackio" in Path(filename).parts:
            self._failure = self._failure or str(message)

    def _raise_failure(self) -> None:
        if self._failure:
            raise RuntimeError(self._failure)
