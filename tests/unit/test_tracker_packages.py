"""Trackers with their real packages: what the run through the command line does not show."""

from __future__ import annotations

from pathlib import Path

import pytest

from bert_pretraining.logs import sinks
from bert_pretraining.logs.trackers.process import Patience
from bert_pretraining.logs.trackers.sink import Trackers
from tracked_runs import (
    EVALUATION,
    READERS,
    VALUES,
    facts,
    require,
    without_trackers_variables,
)


@pytest.mark.parametrize("tracker", READERS)
def test_an_error_a_notice_and_odd_values_reach_the_tracker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tracker: str
) -> None:
    """A run that fails: its status; its loss was no number."""
    require(tracker)
    without_trackers_variables(monkeypatch)
    notices: list[tuple[str, str]] = []
    run = facts(tmp_path / "mini CPU#1/run-1", track=tracker)
    sink = Trackers(run, lambda *notice: notices.append(notice), print, Patience(100, 100))
    sink.noticed("early", "before the start")
    sink.hyperparameters(sinks.Hyperparameters(seed=123))
    sink.start_evaluated(EVALUATION)
    sink.step_logged(sinks.StepFigures(1, 64, {**VALUES, "loss": float("nan")}, 10.0, None))
    sink.skipped(1, 2, 5, 512.0)
    sink.step_logged(sinks.StepFigures(2, 128, VALUES, 11.0, None))
    sink.noticed("late", "| loss is high |")
    try:
        raise ValueError("a defect")
    except ValueError:
        sink.aborted(128, 64)
    sink.close()
    assert notices == []
    found = READERS[tracker](run.folder)
    assert found.status == "failed"
    assert float(found.table["result/samples"]) == 128
    assert str(found.facts["seed"]) in ("123", "123.0")
    assert {kind: text.partition(" (step")[0] for kind, text in found.texts.items()} == {
        "early": "before the start", "late": "| loss is high |",
    }  # fmt: skip
    assert found.figures["training/loss"][2] == pytest.approx(1.5)
    assert found.figures["training/skipped_updates"] == {1: 5}
    assert found.figures["evaluation/seconds"] == {0: 1.5}


@pytest.mark.parametrize("tracker", READERS)
def test_a_run_that_never_began_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tracker: str
) -> None:
    require(tracker)
    without_trackers_variables(monkeypatch)
    run = facts(tmp_path / "output/run-1", track=tracker)
    sink = Trackers(run, lambda *_: None, print, Patience(100, 100))
    sink.noticed("early", "before the start")
    sink.aborted(0, 0)
    sink.close()
    assert list(run.folder.iterdir()) == []
    assert [path.name for path in run.folder.parent.iterdir()] == ["run-1"]
