"""Events of log files: ours, a published MLPerf log, DeepSparkHub's PerfLog, and spoiled ones."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from bert_pretraining.errors import UserError
from bert_pretraining.logs.mlperf import MlperfLog
from bert_pretraining.logs.perflog import PerfLog
from bert_pretraining.logs.reading.events import mllog_events, perflog_events, read_log
from helpers import REFERENCE, needs_reference

# The form that DeepSparkHub writes: other keys than ours, events without a value.
DEEPSPARKHUB = """\
[PerfLog] {"event": "TRAIN_BEGIN", "metadata": {"file": "run.py", "lineno": 90, "time_ms": 1665310000000, "rank": 0}}
[PerfLog] {"event": "STEP_END", "value": {"loss": 1.298828125, "mlm_acc": 0.7184170484542847, "epoch": 0, "end_training": true, "num_trained_samples": 10500864, "global_steps": 41020, "iter_dataloader_idx": 8, "learning_rate": 0.00020643, "seq/s": 1302.15}, "metadata": {"file": "run.py", "lineno": 137, "time_ms": 1665310732959, "rank": 0}}
"""  # noqa: E501


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_what_the_loggers_write_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    lines: list[str] = []
    mlperf = MlperfLog([lines.append])
    mlperf.evaluation_started(0)
    mlperf.evaluation_stopped(0, 0.34)
    PerfLog([lines.append], rank=0).log("STEP_END", {"loss": float("nan"), "seq/s": 12.5})
    path = write(tmp_path / "log.txt", "\n".join(["text between", *lines]) + "\n")
    events = mllog_events(path)
    assert [event.key for event in events] == [
        "eval_start",
        "eval_accuracy",
        "eval_stop",
    ]
    assert [event.line for event in events] == [2, 3, 4]
    assert events[0].kind == "INTERVAL_START"
    assert events[0].time_ms == 1700000000000
    assert events[1].value == 0.34
    assert events[2].metadata["epoch_num"] == 0
    (step,) = perflog_events(path)
    assert step.key == "STEP_END"
    assert step.value == {"loss": None, "seq/s": 12.5}
    assert step.line == 5
    both = read_log(path)
    assert (len(both.mllog), len(both.perflog), both.faults) == (3, 1, [])


@needs_reference
def test_published_logs_are_read() -> None:
    events = mllog_events(REFERENCE / "mlperf_log" / "nvidia_v4.1_h200_result_0.txt")
    assert len(events) == 503
    assert sum(event.key == "weights_initialization" for event in events) == 398
    accuracies = [event for event in events if event.key == "eval_accuracy"]
    assert accuracies[-1].value == pytest.approx(0.72006, abs=1e-5)
    assert accuracies[-1].metadata["epoch_num"] == 2398552
    # Records without namespace and event_type: the key says what they are.
    kinds = {
        event.key: event.kind
        for event in mllog_events(REFERENCE / "mlperf_log" / "minimal_closed.txt")
    }
    assert kinds["run_start"] == "INTERVAL_START"
    assert kinds["run_stop"] == "INTERVAL_END"
    assert kinds["seed"] == "POINT_IN_TIME"


def test_deepsparkhub_perflog_is_read(tmp_path: Path) -> None:
    begin, step = perflog_events(write(tmp_path / "rank0.out.log", DEEPSPARKHUB))
    assert (begin.kind, begin.value, begin.time_ms) == ("INTERVAL_START", None, 1665310000000)
    assert step.value["num_trained_samples"] == 10500864
    assert step.metadata["rank"] == 0


def record(**content: object) -> str:
    return ":::MLLOG " + json.dumps(
        {"time_ms": 1, "key": "seed", "value": 7, "metadata": {}, **content}
    )


def test_prefixes_and_progress_bars_are_no_faults(tmp_path: Path) -> None:
    text = f"0: {record()}\n 40%|####      | 2/5\r{record(value=8)}\r 60%|######\nno :::MLLOG\n"
    log = read_log(write(tmp_path / "log.txt", text))
    assert [(event.line, event.value) for event in log.mllog] == [(1, 7), (2, 8)]
    assert log.faults == []


@pytest.mark.parametrize(
    ("text", "what", "events"),
    [
        (record() + " step 4", "not a whole :::MLLOG record", 0),
        (record()[:-9], "not a whole :::MLLOG record", 0),
        (record() + record(), "2 :::MLLOG records on one line", 2),
        (":::MLLOG [1]", "no JSON object", 0),
        (record(key=None), "no 'key'", 0),
        (record(metadata=3), "metadata that is no JSON object", 1),
        (record(time_ms="now"), "time_ms that is no number: 'now'", 1),
        (':::MLLOG {"key": "seed", "time_ms": 1, "metadata": {}}', "'seed' has no 'value'", 1),
        (':::MLLOG {"key": "seed", "time_ms": 1, "value": 2}', "'seed' has no 'metadata'", 1),
        (':::MLLOG {"key": "seed", "value": 2, "metadata": {}}', "'seed' has no 'time_ms'", 1),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, text: str, what: str, events: int) -> None:
    path = write(tmp_path / "log.txt", f"{record()}\n\n{text}\n{record()}\n")
    with pytest.raises(UserError, match=r"log\.txt:3: ") as raised:
        mllog_events(path)
    assert what in str(raised.value)
    assert len(mllog_events(path, strict=False)) == 2 + events
    assert read_log(path).faults[0].line == 3


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*absent\.txt"):
        mllog_events(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="cannot read"):
        mllog_events(tmp_path)
    (tmp_path / "binary").write_bytes(b"PK\x03\x04\0\0\0")
    with pytest.raises(UserError, match="not a text file"):
        perflog_events(tmp_path / "binary")
