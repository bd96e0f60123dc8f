"""Trackers: names and values, and that one that fails costs the run nothing but a notice."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from bert_pretraining.config import resolve
from bert_pretraining.config.toml import parse_toml
from bert_pretraining.config.trackers import TRACKERS
from bert_pretraining.data import inputs
from bert_pretraining.errors import UserError
from bert_pretraining.logs import sinks
from bert_pretraining.logs.reading.events import mllog_events, perflog_events
from bert_pretraining.logs.trackers import figures, process
from bert_pretraining.logs.trackers.child import serve
from bert_pretraining.logs.trackers.process import Patience
from bert_pretraining.logs.trackers.sink import Trackers
from bert_pretraining.logs.trackers.table import CLASSES
from bert_pretraining.logs.trackers.tracker import TrackedRun, Tracker
from bert_pretraining.runtime import process_stat
from helpers import ROOT
from mlperf_logs import Clock, Recording
from tracked_runs import EVALUATION, READERS, VALUES, facts, without_trackers_variables

SPEED = sinks.Speed(
    sequences_per_second=100.0,
    tokens_per_second=25_000.0,
    flop_per_second=5e12,
    matrix_share=None,
    peak_memory=3 * 2**30,
    seconds={"data": 0.01, "forward_backward": 0.2, "optimizer": 0.03},
    slowest=sinks.RankSeconds(3, 0.25),
)
# A package by the name of a real one, whose behaviour the variable BEHAVIOUR chooses.
FAKE = """
import errno, os, sys, time
BEHAVIOUR = os.environ["BEHAVIOUR"]
print("noise on stdout"); print("noise on stderr", file=sys.stderr)
if BEHAVIOUR == "broken": raise ImportError("libfake.so: cannot open\\nshared object file")
Settings = dict
class Run:
    summary, settings = {}, type("S", (), {"log_internal": "/nonexistent"})
    def log(self, values, step):
        if BEHAVIOUR == "full": raise OSError(errno.ENOSPC, "No space left on device")
        if BEHAVIOUR == "crash": os._exit(7)
    def finish(self, exit_code):
        if BEHAVIOUR == "hang": time.sleep(600)
        while BEHAVIOUR == "starved" and time.process_time() < 3: pass
def init(**_):
    if BEHAVIOUR == "hang at start": time.sleep(600)
    return Run()
"""


def resolved_trackers(**flags: object) -> list[str]:
    return resolve(flags).config.trackers


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Makes `wandb` the fake package in processes that are started; the test sets BEHAVIOUR."""
    without_trackers_variables(monkeypatch)
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/wandb.py").write_text(FAKE)
    paths = [str(tmp_path / "fake"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return monkeypatch


# ---- which trackers


def test_track_takes_names_in_every_form(tmp_path: Path) -> None:
    assert resolved_trackers() == []
    assert resolved_trackers(track="") == []
    assert resolved_trackers(track="wandb,tensorboard wandb, trackio") == [
        "tensorboard", "wandb", "trackio",
    ]  # fmt: skip
    assert resolved_trackers(tensorboard_dir="board") == ["tensorboard"]
    assert resolved_trackers(tensorboard_dir="board", track="mlflow") == ["tensorboard", "mlflow"]
    file = tmp_path / "own.toml"
    for text in ('track = ["mlflow", "wandb"]', 'track = "mlflow,wandb"'):
        file.write_text(f"nnodes = 1\nnproc_per_node = 1\n{text}\n")
        assert resolved_trackers(config=str(file)) == ["wandb", "mlflow"]
    assert resolved_trackers(config=str(file), track="") == []


def test_an_unknown_tracker_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--track wandb,tensorbord: 'tensorbord' must be one of "):
        resolve({"track": "wandb,tensorbord"})
    with pytest.raises(UserError, match=r"trackio; did you mean mlflow\?"):
        resolve({"track": "mlflo"})


def test_every_tracker_has_a_class_an_extra_a_reader_and_a_page() -> None:
    project = parse_toml((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    page = (ROOT / "docs/trackers.md").read_text()
    assert list(CLASSES) == list(TRACKERS) == list(READERS)
    for name in TRACKERS:
        assert name in extras
        assert f"| `{name}` |" in page


@pytest.mark.parametrize(
    ("flags", "module", "wanted"),
    [
        ({"track": "trackio"}, "trackio", "--track trackio: trackio is not installed"),
        ({"track": "mlflow"}, "mlflow", "--track mlflow: mlflow-skinny "),
        ({"tensorboard_dir": "x"}, "tensorboard", "--tensorboard_dir: tensorboard is not "),
    ],
)
def test_a_missing_package_is_a_fault_of_the_launch(
    monkeypatch: pytest.MonkeyPatch,
    mini_data: Path,
    flags: dict[str, str],
    module: str,
    wanted: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    without_trackers_variables(monkeypatch)
    (fault,) = inputs.faults(resolve({"data_dir": str(mini_data), **flags}).config)
    assert str(fault).startswith(wanted)
    assert f"(the extra [{flags.get('track', 'tensorboard')}])" in str(fault)


def test_a_server_of_mlflow_needs_no_local_store(
    monkeypatch: pytest.MonkeyPatch, mini_data: Path
) -> None:
    for module in ("sqlalchemy", "alembic"):
        monkeypatch.setitem(sys.modules, module, None)
    without_trackers_variables(monkeypatch)
    config = resolve({"data_dir": str(mini_data), "track": "mlflow"}).config
    assert "sqlalchemy and alembic are not installed" in str(inputs.faults(config)[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert not any("sqlalchemy" in str(fault) for fault in inputs.faults(config))


# ---- names and values


def test_the_figures_of_a_step() -> None:
    found = figures.step_figures(sinks.StepFigures(7, 448, VALUES, 123.5, 2.0, SPEED))
    assert found == {
        "training/loss": 1.5,
        "training/mlm_accuracy": 0.7,
        "training/learning_rate": 3e-4,
        "training/grad_norm": 2.0,
        "training/loss_scale": 1024.0,
        "training/epoch": 0,
        "training/samples": 448,
        "training/sequences_per_second": 123.5,
        "speed/tokens_per_second": 25_000.0,
        "speed/tflop_per_second": 5.0,
        "speed/peak_memory_mib": 3072,
        "speed/seconds_data": 0.01,
        "speed/seconds_forward_backward": 0.2,
        "speed/seconds_optimizer": 0.03,
        "speed/slowest_rank": 3,
        "speed/slowest_rank_seconds": 0.25,
    }


def result(reason: str = "target", **more: object) -> sinks.RunResult:
    return sinks.RunResult(
        9, 576, reason == "target", reason, 1.25, 0.73, 60.0, 40.0, 15.0, 14.4, None, **more
    )


def test_the_final_table() -> None:
    energy = sinks.Energy("RAPL", run=6000.0, training=4800.0, sequences=600)
    throughputs = sinks.Throughputs(14.4, 16.0, None)
    found = figures.result_table(result(speed=SPEED, throughputs=throughputs, energy=energy))
    assert found["result/p_whole"] == 14.4
    assert found["result/p_train"] == 16.0
    assert "result/p_core" not in found
    assert found["result/joules_per_sequence"] == 8.0
    assert found["result/joules_per_sequence_run"] == 10.0
    assert "result/mean_watts" not in found
    assert found["result/energy_source"] == "RAPL"
    assert found["result/tokens_per_second"] == 25_000.0
    assert found["result/converged"] is True
    assert "result/resumed_from_step" not in found


def test_the_status_of_a_run() -> None:
    reasons = ("target", "max_steps", "signal SIGTERM", "an error")
    found = [figures.status_of(result(reason)) for reason in reasons]
    assert found == ["finished", "finished", "aborted", "failed"]


# ---- a tracker's process


class Notebook(Tracker):
    """Remembers what it is told."""

    told: list[tuple]

    def __init__(self) -> None:
        type(self).told = []

    def start(self, run: TrackedRun, facts: dict) -> None:
        self.told.append(("start", run.name, facts))

    def figures(self, step: int, values: dict[str, float]) -> None:
        if values.get("fail"):
            raise SystemExit("two\nlines")
        self.told.append(("figures", step, values))

    def text(self, step: int, title: str, text: str) -> None:
        self.told.append(("text", step, title, text))

    def finish(self, step: int, status: str, table: dict) -> None:
        self.told.append(("finish", step, status, table))


def lines(*calls: list) -> list[bytes]:
    return [json.dumps(call).encode() for call in calls]


RUN = {"name": "r", "group": "g", "folder": "", "output_dir": "", "tensorboard_dir": ""}


def test_a_run_whose_process_has_gone_is_aborted() -> None:
    started = ["start", RUN, {"a": 1}]
    assert serve(Notebook, lines(started, ["figures", 4, {"x": 0.5}])) == {"done": True}
    assert Notebook.told == [
        ("start", "r", {"a": 1}), ("figures", 4, {"x": 0.5}), ("finish", 4, "aborted", {}),
    ]  # fmt: skip
    ended = ["finish", 5, "finished", {"y": 1}]
    assert serve(Notebook, lines(started, ended)) == {"done": True}
    assert Notebook.told[1:] == [("finish", 5, "finished", {"y": 1})]
    assert serve(Notebook, []) == {"done": True}, "a run that never began leaves nothing"
    assert Notebook.told == []


def test_whatever_a_package_raises_is_an_answer() -> None:
    calls = lines(["start", RUN, {}], ["figures", 4, {"fail": 1}], ["figures", 5, {"x": 1}])
    assert serve(Notebook, calls) == {"failed": "SystemExit: two lines", "in": "figures"}


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("broken", "in its import, ImportError: libfake.so: cannot open shared object file"),
        ("full", "in its figures, OSError: [Errno 28] No space left on device"),
        ("crash", "its process ended with exit code 7"),
    ],
)
def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(
    fake: pytest.MonkeyPatch, tmp_path: Path, behaviour: str, said: str
) -> None:
    """A full disk too, which ends the run where its own logs meet it."""
    fake.setenv("BEHAVIOUR", behaviour)
    run = Recording(Clock(fake), tmp_path / "output", track="wandb")
    run.start_clock()
    run.start_evaluated()
    run.train_to_target(500_000)
    mllog = run.finish()
    folder = mllog.parent
    log = folder / "tracker_wandb.log"
    told = perflog_events(folder / "perflog.txt")
    notices = [event.value for event in told if event.key == "NOTICE"]
    (notice,) = [value["text"] for value in notices if value["kind"] == "tracker_wandb_failed"]
    assert notice == (
        f"the tracker wandb has failed ({said}), and the run goes on without it; see {log}, then "
        "mend it for the next run or leave it out of --track"
    )
    assert "noise on stdout" in log.read_text()
    assert sum(event.key == "FINISHED" for event in told) == 1
    (stop,) = [event for event in mllog_events(mllog) if event.key == "run_stop"]
    assert stop.metadata["status"] == "success"


@pytest.mark.parametrize("behaviour", ["hang", "hang at start"])
def test_a_tracker_that_hangs_is_waited_for_aloud_and_then_ended(
    fake: pytest.MonkeyPatch, tmp_path: Path, behaviour: str
) -> None:
    assert process.USUAL.idle <= 5, "seconds"
    fake.setenv("BEHAVIOUR", behaviour)
    fake.setattr(process, "QUIET_SECONDS", 0.0)
    run, told = facts(tmp_path / "output/run-1", track="wandb"), []
    sink = Trackers(
        run, lambda kind, text: told.append(f"{kind}: {text}"), told.append, Patience(0.5, 60)
    )
    sink.start_evaluated(EVALUATION)
    sink.finished(result())
    sink.close()
    waits, fails = told
    assert re.match(r"Notice: waiting for the tracker wandb, \d+ s at most", waits)
    assert re.search(r"\(it did not finish within .* s after the run\), and it may lack", fails)


def test_a_tracker_that_takes_nothing_never_holds_up_the_run(
    fake: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake.setenv("BEHAVIOUR", "hang at start")
    fake.setattr(process, "MOST_UNSENT", 10_000)
    notices: list[tuple[str, str]] = []
    run = facts(tmp_path / "output/run-1", track="wandb")
    sink = Trackers(run, lambda *notice: notices.append(notice), print, Patience(0.1, 0.1))
    sink.start_evaluated(EVALUATION)
    for step in range(1, 3000):  # more than a pipe holds
        sink.step_logged(sinks.StepFigures(step, 64 * step, VALUES, 10.0, None, SPEED))
    sink.close()
    ((_, text),) = notices
    assert "(it takes figures more slowly than the run makes them)" in text


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_tracker_that_waits_for_a_cpu_is_not_taken_for_one_that_hangs(
    fake: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a busy machine its process has no ticks of the clock; here none are seen."""
    fake.setenv("BEHAVIOUR", "starved")
    fake.setattr(process_stat, "cpu_ticks", lambda pid: 0)
    fake.setattr(process, "QUIET_SECONDS", 0.1)
    run, notices = facts(tmp_path / "output/run-1", track="wandb"), []
    sink = Trackers(
        run, lambda *notice: notices.append(notice), lambda text: None, Patience(1.0, 600)
    )
    sink.start_evaluated(EVALUATION)
    sink.finished(result())
    sink.close()
    assert notices == []


def test_what_a_good_tracker_prints_leaves_no_file(
    fake: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.setenv("BEHAVIOUR", "good")
    notices: list[tuple[str, str]] = []
    run = facts(tmp_path / "output/run-1", track="wandb")
    patience = Patience(600, 600)
    sink = Trackers(run, lambda *notice: notices.append(notice), lambda text: None, patience)
    sink.start_evaluated(EVALUATION)
    sink.close()
    assert notices == []
    assert list(run.folder.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_tensorboard_dir_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = facts(tmp_path / "output/run-1", tensorboard_dir=str(tmp_path / "file/board"))
    with pytest.raises(UserError, match=r"cannot write to tensorboard_dir .*board \(Not a dir"):
        Trackers(run, lambda *_: None, print)
