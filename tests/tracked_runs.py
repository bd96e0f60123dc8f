"""What trackers have written about a run, read back through their own packages or file formats."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bert_pretraining.config import resolve
from bert_pretraining.config.trackers import MLFLOW_STORE, TRACKERS
from bert_pretraining.logs import sinks

MODULES = {**TRACKERS, "mlflow": (*TRACKERS["mlflow"], *MLFLOW_STORE)}
# For processes of a test, as their sitecustomize: who asks the network is noted, and refused.
NO_NETWORK = """
import os, socket

def refuse(asked):
    with open(os.environ["NETWORK_ASKED"], "a") as file:
        file.write(f"{asked}\\n")
    raise OSError("no network in this test")

LOCAL = (None, "", "127.0.0.1", "::1", "localhost", socket.gethostname())
connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

def local_connect(self, address):
    if isinstance(address, tuple) and address[0] not in LOCAL:
        refuse(address)
    return connect(self, address)

def local_getaddrinfo(host, *more, **others):
    if host not in LOCAL:
        refuse(host)
    return getaddrinfo(host, *more, **others)

socket.socket.connect, socket.getaddrinfo = local_connect, local_getaddrinfo
"""
# Likewise: the end of a run waits for trackers as long as a busy machine needs.
PATIENT = """
from bert_pretraining.logs.trackers import process

process.USUAL = process.Patience(idle=600.0, most=600.0)
"""

EVALUATION = sinks.EvaluationFigures(0, 0, 4.0, 0.3, 64, 1.5)
VALUES = {
    "loss": 1.5, "mlm_acc": 0.7, "learning_rate": 3e-4, "grad_norm": 2.0, "loss_scale": 1024.0,
    "epoch": 0, "end_training": False, "iter_dataloader_idx": 7,
}  # fmt: skip


@dataclass
class Tracked:
    """A run as a tracker holds it. figures: {name: {step: value}}. texts: the notices by kind."""

    status: str
    facts: dict[str, object]
    table: dict[str, object]
    figures: dict[str, dict[int, float]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def facts(folder: Path, **flags: object) -> sinks.RunFacts:
    """The facts of a run with this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    resolved = resolve({"output_dir": str(folder.parent), **flags})
    return sinks.RunFacts(resolved.config, resolved.path, 1e9, False, "CPU", 1, folder)


def require(*trackers: str) -> None:
    """Skip the test where one of these trackers is not installed."""
    for tracker in trackers:
        for module in MODULES[tracker]:
            pytest.importorskip(module, reason=f"the extra [{tracker}] is not installed")


def without_trackers_variables(patch: pytest.MonkeyPatch) -> None:
    """Take away what a user has set for trackers, such as WANDB_PROJECT."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "HF_")):
            patch.delenv(name)


def rows_of(table: str) -> dict[str, str]:
    """The rows of a Markdown table of two columns, below its head."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def read_tensorboard(folder: Path) -> Tracked:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import api_pb2, metadata

    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    tags = board.Tags()
    figures = {
        tag: {event.step: event.value for event in board.Scalars(tag)} for tag in tags["scalars"]
    }
    texts = {
        tag.removeprefix("notice/"): board.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in tags["tensors"]
        if tag.startswith("notice/")
    }
    (result,) = board.Tensors("result")
    table = rows_of(result.tensor_proto.string_val[0].decode())
    start, end = (
        board.SummaryMetadata(tag).plugin_data.content
        for tag in (metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG)
    )
    hparams = metadata.parse_session_start_info_plugin_data(start).hparams
    facts = {name: getattr(value, value.WhichOneof("kind")) for name, value in hparams.items()}
    code = metadata.parse_session_end_info_plugin_data(end).status
    wanted = {"finished": "STATUS_SUCCESS", "failed": "STATUS_FAILURE"}
    assert api_pb2.Status.Name(code) == wanted.get(table["status"], "STATUS_UNKNOWN")
    return Tracked(table["status"], facts, table, figures, texts)


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, after a head of 7 bytes."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, record = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def read_wandb(folder: Path) -> Tracked:
    os.environ["WANDB_MODE"], os.environ["WANDB_ERROR_REPORTING"] = "offline", "false"
    from wandb.proto import wandb_internal_pb2

    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    run = Tracked("", {}, {})
    for data in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.facts = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                values = run.figures.setdefault(name, {})
                values[record.history.step.num] = json.loads(item.value_json)
        elif kind == "summary":
            for item in record.summary.update:
                if item.key.startswith("notice/"):
                    text = json.loads(item.value_json)
                    run.texts[item.key.removeprefix("notice/")] = text
                elif item.key:
                    run.table[item.key] = json.loads(item.value_json)
        elif kind == "exit":
            wanted = {"finished": 0, "failed": 1, "aborted": 130}
            assert record.exit.exit_code == wanted[run.table["status"]]
    run.status = run.table["status"]
    return run


def read_mlflow(folder: Path) -> Tracked:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(folder.parent.name)
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == folder.name
    data = found.data
    figures = {
        name: {one.step: one.value for one in client.get_metric_history(found.info.run_id, name)}
        for name in data.metrics
    }
    texts = {
        name.removeprefix("notice."): text
        for name, text in data.tags.items()
        if name.startswith("notice.")
    }
    table = rows_of(data.tags["mlflow.note.content"])
    wanted = {"finished": "FINISHED", "failed": "FAILED", "aborted": "KILLED"}
    assert found.info.status == wanted[table["status"]]
    return Tracked(table["status"], dict(data.params), table, figures, texts)


def read_trackio(folder: Path) -> Tracked:
    (path,) = (folder.parent / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        (config,) = database.execute("select config from configs where run_name = ?", [folder.name])
        logged = list(database.execute("select step, metrics from metrics order by id"))
        texts = dict(database.execute("select title, text from alerts"))
    figures: dict[str, dict[int, float]] = {}
    table: dict[str, object] = {}
    for step, line in logged:
        values = json.loads(line)
        if "status" in values:
            table = values
        for name, value in values.items():
            figures.setdefault(name, {})[step] = value
    return Tracked(str(table["status"]), json.loads(config[0]), table, figures, texts)


READERS = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}
