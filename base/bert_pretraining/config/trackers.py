"""The trackers that a run's figures can go to, by the names that `track` takes."""

from __future__ import annotations

import os

# Each with the modules that it imports. The extra of pyproject.toml has the tracker's name.
TRACKERS = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}
# MLflow keeps a local store in SQLite through these two, which mlflow-skinny leaves out.
MLFLOW_STORE = ("sqlalchemy", "alembic")


def split_names(text: str) -> list[str]:
    """The names in a value that holds several: "a,b", "a b" or "a, b"; each once, in order."""
    return list(dict.fromkeys(text.replace(",", " ").split()))


def modules_of(tracker: str) -> tuple[str, ...]:
    """The modules that a tracker needs in this process's environment."""
    if tracker == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
        return TRACKERS[tracker] + MLFLOW_STORE
    return TRACKERS[tracker]
