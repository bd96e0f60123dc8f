"""A run's events reach every sink, in the order that `Sink` documents."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from bert_pretraining.config import resolve
from bert_pretraining.logs.run_log import RunLog
from bert_pretraining.logs.sinks import RunFacts, Sink, StepFigures
from bert_pretraining.logs.source import calling_frame
from mlperf_logs import Clock, Recording, triggers_of

EVENTS = [name for name, _ in inspect.getmembers(Sink, inspect.isfunction) if name[0] != "_"]


def recorder(told: list[tuple], name: str) -> Sink:
    """A sink that notes each event with its details."""
    methods = {
        event: lambda self, *details, event=event: told.append((name, event, details))
        for event in EVENTS
    }
    return type("Recorder", (Sink,), methods)()


class TwoRecorders(RunLog):
    """A log whose outputs are two recorders."""

    told: list[tuple]

    def make_sinks(self, facts: RunFacts, folder: Path) -> Iterator[Sink]:
        self.told = []
        yield recorder(self.told, "one")
        yield recorder(self.told, "two")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recording:
    """A recording whose log is `TwoRecorders`."""
    monkeypatch.setattr("mlperf_logs.RunLog", TwoRecorders)
    return Recording(Clock(monkeypatch), tmp_path)


def test_every_sink_gets_every_event(run: Recording) -> None:
    run.start_clock()
    run.start_evaluated()
    run.train_to_target(500_000)
    run.log.say("hello")
    run.finish()
    told = run.log.told
    by_sink = {which: [row[1:] for row in told if row[0] == which] for which in ("one", "two")}
    assert by_sink["one"] == by_sink["two"]
    events = [event for event, _ in by_sink["one"]]
    assert events[:3] == ["launched", "init_started", "hyperparameters"]
    assert events[-4:] == ["said", "training_ended", "finished", "close"]
    assert events.index("clock_started") < events.index("evaluation_started")
    step = next(row[2][0] for row in told if row[1] == "step_logged")
    assert isinstance(step, StepFigures)
    assert step.sequences_per_second == pytest.approx(4000)


def test_another_rank_has_no_sinks(tmp_path: Path) -> None:
    log = RunLog(resolve({"output_dir": str(tmp_path)}), rank=1, device_name="CPU", world_size=2)
    log.hyperparameters(1, triggers_of(8))
    log.say("not shown")
    log.close()
    assert log.folder is None
    assert list(tmp_path.iterdir()) == []


def test_every_event_of_the_interface_is_told_somewhere() -> None:
    source = ast.parse(Path(inspect.getsourcefile(RunLog)).read_text())
    told = {
        node.attr
        for node in ast.walk(source)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "Sink"
    }
    assert told == set(EVENTS) - {"close"}, "each sink is closed on its own"


def test_the_place_of_an_event_is_the_first_frame_outside_the_logs() -> None:
    frame, depth = calling_frame()
    assert frame.f_code.co_name == "test_the_place_of_an_event_is_the_first_frame_outside_the_logs"
    assert depth == 0
