"""What a short run shows: on a terminal, in a pipe, and without optional packages."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from bert_pretraining.logs.reading.events import mllog_events, read_log
from bert_pretraining.logs.terminal import BOLD, NORMAL
from helpers import ROOT, command, error_lines
from mlperf_logs import BELOW_TARGET, failures

MINI = ("--name", "mini", "--config", "CPUx1x1", "--device", "cpu", "--data_dir")
COLUMNS = 80
SHORT = ("--max_steps", "12", "--eval_steps", "6", "--log_freq", "2", "--num_eval_examples", "64")


def on_a_terminal(cwd: Path, columns: int, *flags: str) -> str:
    """What a run writes to a terminal of so many columns."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "bert_pretraining", "launch", *flags],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT / "base"), "TERM": "xterm"},
        stdin=its,
        stdout=its,
        stderr=its,
    )
    os.close(its)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux ends a terminal so
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait(timeout=300) == 3
    return shown.decode()


def test_on_a_terminal_a_bar_tells_how_far_it_is(mini_data: Path, tmp_path: Path) -> None:
    shown = on_a_terminal(tmp_path, COLUMNS, *MINI, str(mini_data), *SHORT)
    bars = [
        text.strip() for text in re.split(r"[\r\n]", shown) if "seq/s" in text and "{" not in text
    ]
    last = bars[-1]
    assert re.fullmatch(
        r"12/12 \S+ +loss \d\.\d{3}, MLM acc 0\.\d{3}, lr \d\.\d\de-\d\d, [\d,]+ seq/s", last
    ), last
    # Not every step is drawn: a fast one comes before the next drawing is due.
    assert any(re.search(r"\b\d+/12 .*seq/s, eval in 00:\d\d$", bar) for bar in bars), bars
    assert all(len(bar) < COLUMNS for bar in bars)
    # The bar takes the place of a line a step; what matters is bold.
    assert "\nStep " not in shown
    lines = [line.rpartition("\r")[2] for line in shown.replace("\r\n", "\n").split("\n")]
    for start in ("Start: MLM accuracy", "Evaluation: MLM accuracy", "Target 0.72 not reached"):
        assert any(line.startswith(BOLD + start) and line.endswith(NORMAL) for line in lines), start
    assert any(line.startswith(f"{BOLD}| Model ") for line in lines)
    # The records are whole, each on a line of its own, as in the files.
    (folder,) = (tmp_path / "output/mini_CPUx1x1").glob("run-*")
    for name, token in (("mllog.txt", ":::MLLOG "), ("perflog.txt", "[PerfLog] ")):
        written = (folder / name).read_text().splitlines()
        assert [line for line in lines if line.startswith(token)] == written
    (tmp_path / "screen.txt").write_text(shown)
    assert read_log(tmp_path / "screen.txt").faults == []


def test_in_a_pipe_there_are_lines_and_no_bar(mini_data: Path, tmp_path: Path) -> None:
    done = command(
        "launch", *MINI, mini_data, *SHORT, "--tensorboard_dir", "board", "--report", cwd=tmp_path
    )
    assert done.returncode == 3, done.stderr
    assert not set("\r\033") & set(done.stdout + done.stderr)
    steps = [line for line in done.stdout.splitlines() if line.startswith("Step ")]
    shape = r"Step (\d+)/12: loss [\d.]+, MLM accuracy 0\.\d{4}, learning rate [\de.-]+, "
    shape += r"[\d,]+ sequences/s(, evaluation in \d+ s)?"
    found = [re.fullmatch(shape, line) for line in steps]
    assert [match and match[1] for match in found] == ["1", "2", "4", "6", "8", "10", "12"]
    evaluations = [line for line in done.stdout.splitlines() if line.startswith("Evaluation: ")]
    assert [line.rpartition("after ")[2] for line in evaluations] == [
        "384 sequences",
        "768 sequences",
    ]
    assert done.stdout.splitlines()[-1].startswith("Report: ")

    (folder,) = (tmp_path / "output/mini_CPUx1x1").glob("run-*")
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "mllog.txt", "perflog.txt", "report", "versions.json",
    }  # fmt: skip
    assert (folder / "report/report.html").stat().st_size > 10_000
    assert_tensorboard_has(tmp_path / "board/mini_CPUx1x1" / folder.name)


def assert_tensorboard_has(folder: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulators.EventAccumulator(str(folder))
    board.Reload()
    steps = {tag: [event.step for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    training = ("loss", "mlm_accuracy", "learning_rate", "sequences_per_second")
    assert steps == {
        **{f"training/{name}": [1, 2, 4, 6, 8, 10, 12] for name in training},
        **{f"evaluation/{name}": [0, 6, 12] for name in ("loss", "mlm_accuracy")},
    }


def test_without_mlperf_logging_a_run_writes_the_log_that_the_checkers_want(
    mini_data: Path, tmp_path: Path
) -> None:
    """All but the target: a few steps do not reach it."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mlperf_logging'] = None\n")
    done = command(
        "train", *MINI, mini_data, *SHORT, "--submission_division", "open", cwd=tmp_path,
        PYTHONPATH=f"{tmp_path}:{ROOT / 'base'}",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    (folder,) = (tmp_path / "output/mini_CPUx1x1").glob("run-*")
    log = folder / "mllog.txt"
    assert not any(failures(log, ("1.0.0", "2.1.0", "4.1.0", "5.0.0")).values())
    closed = tmp_path / "closed.txt"
    closed.write_text(log.read_text().replace('"value": "open"', '"value": "closed"'))
    # Those that ask for 398 tensors want a model of 24 layers.
    rulesets = ("1.0.0", "3.0.0", "4.1.0", "5.0.0")
    assert failures(closed, rulesets) == dict.fromkeys(rulesets, BELOW_TARGET)
    tensors = [event for event in mllog_events(log) if event.key == "weights_initialization"]
    assert len(tensors) == 46


@pytest.mark.parametrize(
    ("flags", "package"),
    [(("--tensorboard_dir", "board"), "tensorboard"), (("--report",), "matplotlib")],
)
def test_a_missing_package_is_named_before_ranks_start(
    mini_data: Path, tmp_path: Path, flags: tuple[str, ...], package: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules['{package}'] = None\n")
    done = command(
        "launch", *MINI, mini_data, *flags, cwd=tmp_path,
        PYTHONPATH=f"{tmp_path}:{ROOT / 'base'}",
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = error_lines(done.stderr)
    assert line.startswith(f"Error: {flags[0]}: {package} is not installed; leave it out, or: ")
    assert not (tmp_path / "output").exists()
