"""MLflow: a SQLite store in the output folder, unless MLFLOW_TRACKING_URI names another one."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bert_pretraining.logs.trackers.tracker import TrackedRun, Tracker, Value, markdown, numbers

STORE, ARTIFACTS = "mlflow.db", "mlartifacts"
STATUSES = {"finished": "FINISHED", "failed": "FAILED", "aborted": "KILLED"}
PARAMETERS_A_CALL, METRICS_A_CALL = 100, 1000  # the most that MLflow takes
SECONDS_BETWEEN_CALLS = 1.0  # a call takes 50 ms on a slow disk, more than a step of a small model
DESCRIPTION = "mlflow.note.content"  # the tag that MLflow's page of a run shows


class MLflow(Tracker):
    """Metrics by step, facts as parameters, notices as tags, the final table as the description.

    The output folder is one experiment. SQLite: MLflow 3.17 refuses its older store of files.
    """

    def __init__(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        self._client_class, self._entities = mlflow.MlflowClient, mlflow.entities
        self._client: mlflow.MlflowClient | None = None
        self._id = ""
        self._waiting: list[mlflow.entities.Metric] = []
        self._called = 0.0

    def start(self, run: TrackedRun, facts: dict[str, Value]) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = None
        if not uri:
            uri = f"sqlite:///{Path(run.output_dir).resolve() / STORE}"
            artifacts = (Path(run.output_dir).resolve() / ARTIFACTS).as_uri()
        self._client = self._client_class(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.group
        experiment = self._client.get_experiment_by_name(name)
        made = experiment or self._client.create_experiment(name, artifact_location=artifacts)
        tags = {"mlflow.source.name": "bert_pretraining", "folder": run.folder}
        begun = self._client.create_run(
            made if isinstance(made, str) else made.experiment_id, run_name=run.name, tags=tags
        )
        self._id = begun.info.run_id
        parameters = [self._entities.Param(key, str(value)) for key, value in facts.items()]
        for first in range(0, len(parameters), PARAMETERS_A_CALL):
            some = parameters[first : first + PARAMETERS_A_CALL]
            self._client.log_batch(self._id, params=some)

    def figures(self, step: int, values: dict[str, float]) -> None:
        now = round(time.time() * 1000)
        metric = self._entities.Metric
        self._waiting += [metric(key, value, now, step) for key, value in values.items()]
        is_due = time.monotonic() - self._called > SECONDS_BETWEEN_CALLS
        if is_due or len(self._waiting) > METRICS_A_CALL / 2:
            self._send()

    def text(self, step: int, title: str, text: str) -> None:
        self._client.set_tag(self._id, f"notice.{title}", f"{text} (step {step})")

    def finish(self, step: int, status: str, table: dict[str, Value]) -> None:
        self.figures(step, numbers(table))
        self._send()
        self._client.set_tag(self._id, DESCRIPTION, markdown({"status": status, **table}))
        self._client.set_terminated(self._id, STATUSES[status])

    def _send(self) -> None:
        """Write the figures that wait."""
        for first in range(0, len(self._waiting), METRICS_A_CALL):
            some = self._waiting[first : first + METRICS_A_CALL]
            self._client.log_batch(self._id, metrics=some)
        self._waiting.clear()
        self._called = time.monotonic()
