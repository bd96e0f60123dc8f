"""What a short run shows: on a terminal, in a pipe, and without optional packages."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bert_pretraining.logs.bar import MARGIN
from bert_pretraining.logs.reading.events import mllog_events, read_log
from helpers import ROOT, command, error_lines
from mlperf_logs import BELOW_TARGET, failures
from screens import Written, in_a_terminal, rendered, resize
from tracked_runs import PATIENT

MINI = ("--name", "mini", "--config", "CPUx1x1", "--device", "cpu", "--data_dir")
COLUMNS = 80
SHORT = ("--max_steps", "12", "--eval_steps", "6", "--log_freq", "2", "--num_eval_examples", "64")


UP_TO_3000 = ("--max_steps", "3000", "--num_eval_examples", "64")
UNTOLD = """
from bert_pretraining.logs import watch_outputs, watch_ranks

watch_outputs.ONCE = watch_ranks.DELAY = 1e9
"""
# The target is reached at the first evaluation: the start weights have 0.34.
TO_A_TARGET = ("--eval_steps", "10", "--target_mlm_accuracy", "0.345", "--seed", "1")


def on_a_terminal(
    cwd: Path,
    columns: int,
    *flags: object,
    seen: Callable[[str, int, subprocess.Popen], None] = lambda text, descriptor, process: None,
    shell: str = "",
    **environment: str | None,
) -> Written:
    """What a run writes to a terminal of so many columns; shell: words after its command."""
    words = [sys.executable, "-m", "bert_pretraining", "launch", *flags]
    if shell:
        words = ["bash", "-o", "pipefail", "-c", f"{shlex.join(map(str, words))} {shell}"]
    path = {"PYTHONPATH": str(ROOT / "base")}
    return in_a_terminal(words, cwd, columns, {**path, **environment}, seen)


def bars_in(text: str) -> list[str]:
    """Every state of the bar."""
    parts = re.split(r"[\r\n]", text.replace("\033[K", ""))
    return [part for part in parts if re.match(r"\d+/\d+ ", part)]


def folder_of(cwd: Path, config: str = "CPUx1x1") -> Path:
    (folder,) = (cwd / f"output/mini_{config}").glob("run-*")
    return folder


def test_a_terminal_shows_what_people_read(mini_data: Path, tmp_path: Path) -> None:
    done = on_a_terminal(tmp_path, COLUMNS, *MINI, mini_data, *SHORT, "--kernels", "torch")
    assert done.code == 3
    screen = rendered(done.text, COLUMNS)
    lines = screen.lines
    assert "[PerfLog]" not in done.text
    assert ":::MLLOG" not in done.text
    (first,) = (at for at, line in enumerate(lines) if line.startswith("Model "))
    outline = [line for line in lines[first:] if not line.startswith(" ")][:6]
    names = [line.split("  ")[0] for line in outline]
    assert names == ["Model", "Data", "Ranks", "Batch", "Precision", "Target"]
    assert outline[0] == "Model      BERT, 2 layers of 64, 128 k parameters"
    assert outline[4] == "Precision  fp32, kernels: torch"
    assert any(line.startswith("Binding: ") for line in lines[:first])
    # What matters is bold, and nothing else is.
    starts = ["Start: MLM", "Evaluation:", "Evaluation:", "Target 0.72 not", "Logs: output"]
    assert all(map(str.startswith, screen.bold, starts)), screen.bold
    assert len(screen.bold) == len(starts)
    assert not screen.ends_bold
    assert "Step " not in done.text  # the bar takes the place of a line a step
    assert "\n| p_train (no evaluations)" in "\n".join(lines)
    assert max(map(len, lines)) <= COLUMNS

    last = bars_in(done.text)[-1]
    assert re.fullmatch(r"12/12 \S+ +loss \d\.\d{3}, acc 0\.\d{3}, lr \S+, [\d,]+ seq/s", last), (
        last
    )
    assert len(last) <= COLUMNS
    # Not every step is drawn: a fast one comes before the next drawing is due.
    assert any("evaluating" in bar for bar in bars_in(done.text))
    assert "/12 " not in "\n".join(screen.lines), "the bar is gone at the end"

    folder = folder_of(tmp_path)
    kept = (folder / "console.txt").read_text()
    for start in (
        "Optimizer: ",
        "Kernels: ",
        "Start weights: ",
        "Model  ",
        "Step 12/12: ",
        "Logs: ",
    ):
        assert f"\n{start}" in f"\n{kept}", start
    assert "\n| Model             | GPUs " in kept
    assert "\n| p_train (no evaluations)" in kept
    for name in ("mllog.txt", "perflog.txt"):
        assert read_log(folder / name).faults == []
        assert len((folder / name).read_text().splitlines()) > 15


def test_readme_shows_what_a_terminal_shows(mini_data: Path, tmp_path: Path) -> None:
    """Its sample, but for numbers: lines in this order, none left out but where it says so."""
    (tmp_path / "data/datasets").mkdir(parents=True)
    (tmp_path / "data/datasets/bert_mini").symlink_to(mini_data)
    flags = [flag.replace("CPUx1x1", "CPUx1x2") for flag in MINI]
    # A busy machine stops ranks for seconds, which would be told.
    (tmp_path / "sitecustomize.py").write_text(UNTOLD)
    done = on_a_terminal(
        tmp_path, COLUMNS, *flags, "data/datasets/bert_mini", *TO_A_TARGET,
        PYTHONPATH=f"{tmp_path}:{ROOT / 'base'}",
    )  # fmt: skip
    assert done.code == 0
    printed = rendered(done.text, COLUMNS).lines
    sample = (ROOT / "README.md").read_text().split("```\n")[2].splitlines()
    assert all(len(line) <= COLUMNS for line in sample)
    (bar,) = (line for line in sample if re.match(r"\d+/1000 ", line))
    sample.remove(bar)
    # The time to the target shows where an estimate is sure enough, which is not so in every run.
    figures, *estimate = without_numbers(bar[bar.index("loss") :]).partition(", target in ~")
    assert estimate in ([", target in ~", "0"], ["", ""])
    assert figures == "loss 0, acc 0, 0 seq/s"
    shown = [re.sub(r", lr [^,]+", "", state) for state in bars_in(done.text)]
    assert any(figures in without_numbers(state) for state in shown)
    # What it leaves out at first are the lines of the data set's making, and notices.
    assert sample[0] == "..."
    place, skipping = 0, False
    for line in sample:
        if line == "...":
            skipping = True
            continue
        wanted = without_numbers(line)
        while skipping and place < len(printed) and without_numbers(printed[place]) != wanted:
            place += 1
        assert place < len(printed), f"README shows a line that is not printed: {line}"
        assert without_numbers(printed[place]) == wanted, f"before {line}: {printed[place]}"
        place, skipping = place + 1, False
    assert place == len(printed), f"README leaves out {printed[place]}"


def without_numbers(line: str) -> str:
    """The line with 0 for each number; a table is as wide as its figures."""
    return re.sub(r"-+", "-", re.sub(" +", " ", re.sub(r"\d+([.,:]\d+)*", "0", line)))


@pytest.mark.parametrize(
    ("name", "columns", "environment", "shell"),
    [
        ("dumb", 80, {"TERM": "dumb"}, ""),
        ("no colour", 60, {"NO_COLOR": "1", "LANG": "C"}, ""),
        ("narrow", 20, {}, ""),
        ("a CI's job", 80, {"CI": "true"}, ""),
        ("tee", 80, {}, "| tee out.txt"),
        ("stderr in a file", 80, {}, "2> err.txt"),
        ("stdout in a file", 80, {}, "> out.txt"),
    ],
)
def test_every_terminal_is_served(
    mini_data: Path,
    tmp_path: Path,
    name: str,
    columns: int,
    environment: dict[str, str],
    shell: str,
) -> None:
    done = on_a_terminal(tmp_path, columns, *MINI, mini_data, *SHORT, shell=shell, **environment)
    assert done.code == 3
    screen = rendered(done.text, columns)
    bars = bars_in(done.text)
    shown = "\n".join(screen.lines)
    for_people = name not in ("a CI's job", "tee", "stdout in a file")
    has_bar = name in ("no colour", "narrow", "stderr in a file", "stdout in a file")
    assert bool(bars) == has_bar
    assert all(len(bar) < columns for bar in bars)
    assert not re.search(r"^\d+/\d+ ", shown, re.MULTILINE), "a bar is left"
    assert not screen.ends_bold
    if not has_bar:
        assert "\033" not in done.text
    if name == "no colour":
        assert "\033[1m" not in done.text
        assert done.text.isascii()
        table = [line for line in screen.lines if line.startswith("|")]
        assert len(table) > 15
        assert all(line.endswith("|") for line in table), "it does not wrap"
        assert "\033[0m" not in done.text
        evaluations = [line for line in screen.lines if line.startswith("Evaluation: ")]
        assert all(re.search(r", after \d+ sequences$", line) for line in evaluations), "nor they"
        assert "| training_sequences_per_second | " in shown
    if name == "narrow":
        assert "training_sequences_per_second: " in shown.replace("\n", "")
    if name == "stdout in a file":
        kept = (tmp_path / "out.txt").read_text()
        assert "\033" not in kept
        assert "\nStep 12/12: " in kept
        assert "[PerfLog]" in kept
        assert "[PerfLog]" not in shown
    else:
        assert ("[PerfLog]" in shown) == (not for_people)
        assert (":::MLLOG" in shown) == (not for_people)
        assert ("\nStep 12/12: " in shown) == (not has_bar)


@pytest.mark.parametrize(("machine_lines", "there"), [("on", True), ("off", False)])
def test_machine_lines_go_where_they_are_asked_for(
    mini_data: Path, tmp_path: Path, machine_lines: str, there: bool
) -> None:
    """On a terminal and in a pipe; each record is whole, on a line of its own, as in its file."""
    flags = (*MINI, mini_data, *SHORT, "--machine_lines", machine_lines)
    if there:
        done = on_a_terminal(tmp_path, COLUMNS, *flags)
        text = "\n".join(rendered(done.text, 100_000).lines) + "\n"
    else:
        text = command("launch", *flags, cwd=tmp_path).stdout
    folder = folder_of(tmp_path)
    for name, token in (("mllog.txt", ":::MLLOG "), ("perflog.txt", "[PerfLog] ")):
        written = (folder / name).read_text().splitlines()
        assert len(written) > 15
        assert [line for line in text.splitlines() if line.startswith(token)] == written * there
    assert "\nEvaluation: MLM accuracy " in text


def test_a_resize_while_the_bar_is_there(mini_data: Path, tmp_path: Path) -> None:
    """The bar takes the new width at once, and does not wrap."""
    at: list[int] = []

    def seen(text: str, descriptor: int, process: subprocess.Popen) -> None:
        if not at and re.search(r"K([2-9]|1\d)/200 ", text):
            resize(descriptor, 50)
            at.append(len(text))

    flags = ("--max_steps", "200", "--eval_steps", "100", "--num_eval_examples", "64")
    done = on_a_terminal(tmp_path, COLUMNS, *MINI, mini_data, *flags, seen=seen)
    assert done.code == 3
    (changed,) = at
    before, after = bars_in(done.text[:changed]), bars_in(done.text[changed:])
    assert 50 < max(map(len, before)) <= COLUMNS - MARGIN
    # What was being written as the window changed has the width before.
    narrow = list(itertools.dropwhile(lambda bar: len(bar) > 50 - MARGIN, after))
    assert narrow and max(map(len, narrow)) <= 50 - MARGIN
    assert len(after) - len(narrow) < len(after) / 2


def test_ctrl_c_leaves_the_terminal_clean(mini_data: Path, tmp_path: Path) -> None:
    sent: list[int] = []

    def seen(text: str, descriptor: int, process: subprocess.Popen) -> None:
        if not sent and re.search(r"K\d+/3000 +\S* +loss", text):
            os.write(descriptor, b"\x03")
            sent.append(len(text))

    done = on_a_terminal(tmp_path, COLUMNS, *MINI, mini_data, *UP_TO_3000, seen=seen)
    assert done.code == 4
    screen = rendered(done.text, COLUMNS)
    assert not screen.ends_bold
    assert screen.column == 0
    shown = "\n".join(screen.lines)
    assert "^C" not in shown
    assert "/3000 " not in shown
    assert shown.count("\nStopping after this update and saving; Ctrl-C again ends at once\n") == 1
    assert "\nTarget 0.72 not reached (stopped by signal SIGINT) after " in shown
    assert screen.lines[-2] == "To go on: the same command with --resume auto"
    assert screen.lines[-1].startswith("Logs: output/mini_CPUx1x1/run-")


def test_a_killed_rank_leaves_the_terminal_clean(mini_data: Path, tmp_path: Path) -> None:
    """Its bar is gone before the launcher says what happened."""
    killed: list[int] = []

    def seen(text: str, descriptor: int, process: subprocess.Popen) -> None:
        if not killed and re.search(r"K\d+/3000 +\S* +loss", text):
            killed.append(only_child(process.pid))
            os.kill(killed[0], signal.SIGKILL)

    done = on_a_terminal(tmp_path, COLUMNS, *MINI, mini_data, *UP_TO_3000, seen=seen)
    assert done.code == 1
    screen = rendered(done.text, COLUMNS)
    assert "/3000 " not in "\n".join(screen.lines)
    assert any(line.startswith("Error: rank 0 was killed by SIGKILL") for line in screen.lines)
    assert not screen.ends_bold


def only_child(pid: int) -> int:
    """The process that another one has started."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    (child,) = " ".join(path.read_text() for path in children).split()
    return int(child)


def test_in_a_pipe_there_are_lines_and_no_bar(mini_data: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(PATIENT)
    done = command(
        "launch", *MINI, mini_data, *SHORT, "--tensorboard_dir", "board", "--report",
        cwd=tmp_path, PYTHONPATH=f"{tmp_path / 'site'}:{ROOT / 'base'}",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert not set("\r\033") & set(done.stdout + done.stderr)
    steps = [line for line in done.stdout.splitlines() if line.startswith("Step ")]
    shape = r"Step (\d+)/12: loss [\d.]+, MLM accuracy 0\.\d{4}, learning rate [\de.-]+, "
    shape += r"[\d,]+ sequences/s(, evaluation in [^,]+)?"
    found = [re.fullmatch(shape, line) for line in steps]
    assert [match and match[1] for match in found] == ["1", "2", "4", "6", "8", "10", "12"]
    evaluations = [line for line in done.stdout.splitlines() if line.startswith("Evaluation: ")]
    assert [line.rpartition("after ")[2] for line in evaluations] == [
        "384 sequences",
        "768 sequences",
    ]
    assert done.stdout.splitlines()[-1].startswith("Report: ")
    # Upstream's table in one row comes first, as it was; no outline.
    assert re.search(r"\nLogs: .*\n\n\| Model .* \|\n\|-.*\n.*\n\n\| Speed ", done.stdout)
    assert "\nPrecision  " not in done.stdout

    (folder,) = (tmp_path / "output/mini_CPUx1x1").glob("run-*")
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "console.txt", "mllog.txt", "perflog.txt", "report", "versions.json",
    }  # fmt: skip
    assert (folder / "report/report.html").stat().st_size > 10_000
    assert_tensorboard_has(tmp_path / "board/mini_CPUx1x1" / folder.name)


def assert_tensorboard_has(folder: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulators.EventAccumulator(str(folder))
    board.Reload()
    steps = {tag: [event.step for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    training = ("loss", "mlm_accuracy", "learning_rate", "sequences_per_second")
    wanted = {
        **{f"training/{name}": [1, 2, 4, 6, 8, 10, 12] for name in training},
        **{f"evaluation/{name}": [0, 6, 12] for name in ("loss", "mlm_accuracy")},
    }
    assert {tag: steps[tag] for tag in wanted} == wanted


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
