"""What people are told of a run, on a terminal and elsewhere, and what `console.txt` keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest

from bert_pretraining.logs.console import Console
from bert_pretraining.logs.line_file import LineFile
from bert_pretraining.logs.sinks import (
    EvaluationFigures,
    Resumption,
    RunOutline,
    RunResult,
    StepFigures,
    Throughputs,
)
from mlperf_logs import Clock, facts

OUTLINE = RunOutline(128_000, 2, 64, 15_248, 16, "torch", "fp32", None)
RESULT = RunResult(
    step=60,
    samples=3840,
    converged=False,
    reason="max_steps",
    eval_loss=2.5,
    eval_mlm_accuracy=0.4,
    e2e_time=7.5,
    train_time=5.0,
    init_time=2.0,
    sequences_per_second=768.0,
    resumed_from=None,
    throughputs=Throughputs(768.0, 900.0, None),
)
NOT_KEPT = "No checkpoint was kept; --save_checkpoint keeps one"
FLAGS = {"name": "mini", "config": "CPUx1x2", "data_dir": "mini"}


class Shown:
    """In the place of a Terminal: keeps the lines and the figures beside the bar."""

    columns = 60

    def __init__(self, is_watched: bool) -> None:
        self.is_watched = self.has_bar_alone = is_watched
        self.lines: list[str] = []
        self.figures: dict[str, str] = {}
        self.steps = 0

    def line(self, text: str) -> None:
        self.lines += text.split("\n")

    highlight = line

    def begin_at(self, step: int) -> None:
        self.steps = step

    def advance(self, steps: int, figures: Mapping[str, str]) -> None:
        self.steps += steps
        self.figures = dict(figures)

    def show(self, figures: Mapping[str, str]) -> None:
        self.figures = dict(figures)

    def close(self) -> None:
        pass


@pytest.fixture(params=[True, False], ids=["terminal", "pipe"])
def told(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Console, Shown, Path]:
    shown, path = Shown(request.param), tmp_path / "console.txt"
    return Console(shown, facts(**FLAGS), LineFile(path)), shown, path


def evaluation(step: int, accuracy: float) -> EvaluationFigures:
    return EvaluationFigures(step, step * 64, 2.5, accuracy, 1114, 0.1)


def test_a_terminal_is_not_told_of_details(told: tuple[Console, Shown, Path]) -> None:
    console, shown, path = told
    console.said("Optimizer: flat")
    console.said("Notice: a thing is odd")
    console.noticed("kind", "another one is odd")
    console.outlined(OUTLINE)
    console.training_began()
    console.said("Checkpoint: model.ckpt-20.pt")
    figures = {"loss": 2.5, "mlm_acc": 0.4, "learning_rate": 0.001}
    console.step_logged(StepFigures(20, 1280, figures, 1500.0, 8.0))
    console.close()
    outline = [line for line in shown.lines if line.startswith(("Model ", "Target "))]
    others = [line.partition(":")[0] for line in shown.lines if ":" in line]
    kept = path.read_text().splitlines()
    assert len(kept) == 5 + 6
    if shown.is_watched:
        assert outline == ["Model      BERT, 2 layers of 64, 128 k parameters",
                           "Target     MLM accuracy 0.72, at most 1,000 steps"]  # fmt: skip
        assert others == ["Notice", "Notice", "Precision  fp32, kernels", "Checkpoint"]
    else:
        assert outline == []
        assert others == ["Optimizer", "Notice", "Notice", "Checkpoint", "Step 20/1000"]
        assert set(shown.lines) < set(kept)


def test_the_bar_tells_the_time_to_the_target(
    told: tuple[Console, Shown, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    console, shown, _ = told
    clock = Clock(monkeypatch)
    console.training_began()
    # 0.02 for each 20 steps: 0.72 at step 240, or at 271 if the curve bends as the logarithm does.
    # The evaluation at 260 finds it, 4 x 10 s later.
    for step in range(20, 200, 20):
        accuracy = 0.48 + 0.001 * step
        clock.wait(10)
        console.evaluation_started(step * 64)
        assert shown.figures["evaluation"] == "evaluating"
        console.advanced(20, 9.0)
        console.evaluated(evaluation(step, accuracy))
    console.advanced(1, 8.0)
    assert shown.steps == 181
    assert shown.figures == {"evaluation": "eval in 00:08", "target": "target in ~00:40"}
    clock.wait(4)
    console.advanced(1, None)
    assert shown.figures == {"target": "target in ~00:36"}
    clock.wait(37)
    console.advanced(1, None)
    assert shown.figures == {}, "that time is over"


def test_a_line_an_evaluation_does_not_wrap_on_a_terminal(
    told: tuple[Console, Shown, Path],
) -> None:
    console, shown, path = told
    console.start_evaluated(evaluation(0, 0.34))
    console.evaluated(evaluation(650, 0.7))
    whole = [
        "Start: MLM accuracy 0.3400 on 1,114 sequences, loss 2.5000, target 0.72",
        "Evaluation: MLM accuracy 0.7000, target 0.72, loss 2.5000, after 41,600 sequences",
    ]
    assert path.read_text().splitlines() == whole
    if shown.is_watched:
        assert shown.lines == [
            "Start: MLM accuracy 0.3400 on 1,114 sequences, loss 2.5000",
            "Evaluation: MLM accuracy 0.7000, after 41,600 sequences",
        ]
    else:
        assert shown.lines == whole


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        (200, "MLM accuracy 0.7000, target 0.72, loss 2.5000, after "),
        (80, "MLM accuracy 0.7000, loss 2.5000, after "),
        (60, "MLM accuracy 0.7000, after "),
        (20, "MLM accuracy 0.7000, after "),
    ],
)
def test_all_evaluations_of_a_run_show_the_same_on_a_terminal(
    tmp_path: Path, columns: int, parts: str
) -> None:
    shown = Shown(is_watched=True)
    shown.columns = columns
    console = Console(shown, facts(**FLAGS), LineFile(tmp_path / "console.txt"))
    console.evaluated(evaluation(50, 0.7))
    console.evaluated(evaluation(650, 0.7))
    console.close()
    assert shown.lines == [
        f"Evaluation: {parts}{samples} sequences" for samples in ("3,200", "41,600")
    ]


@pytest.mark.parametrize(
    ("flags", "reason", "line"),
    [
        ({}, "max_steps", NOT_KEPT),
        ({"save_checkpoint": True}, "max_steps", None),
        ({}, "signal SIGINT", "To go on: the same command with --resume auto"),
        ({"resume": "auto"}, "signal to a rank", "To go on: the same command"),
        ({}, "an error", None),
    ],
)
def test_the_end_says_what_is_kept_and_how_to_go_on(
    tmp_path: Path, flags: dict[str, object], reason: str, line: str | None
) -> None:
    shown = Shown(is_watched=True)
    console = Console(shown, facts(**FLAGS, **flags), LineFile(tmp_path / "console.txt"))
    console.finished(dataclasses.replace(RESULT, reason=reason))
    console.close()
    assert shown.lines[-3 if line else -2 :] == ["", *([line] if line else []), "Logs: None"]


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (
            "target",
            "has reached the target 0.72 before (MLM accuracy 0.7210); to train on, pass a higher "
            "--target_mlm_accuracy",
        ),
        ("max_steps", "has made 1,000 steps; to train on, pass a higher --max_steps"),
        (
            "max_samples_termination",
            "has trained on 64,000 sequences; to train on, pass a higher --max_samples_termination",
        ),
        ("signal SIGTERM", None),
    ],
)
def test_a_run_that_had_ended_before_is_no_new_success(
    told: tuple[Console, Shown, Path], reason: str, words: str | None
) -> None:
    console, shown, path = told
    result = dataclasses.replace(
        RESULT, step=1000, samples=64_000, reason=reason, resumed_from=1000, throughputs=None,
        converged=reason == "target", eval_mlm_accuracy=0.721,
    )  # fmt: skip
    console.resumed(Resumption(Path("model.ckpt-1000.pt"), 1000, 64_000, [], 0.721))
    console.training_began()
    console.finished(result)
    resumed, *lines = path.read_text().splitlines()
    assert resumed == "Resumed: model.ckpt-1000.pt, step 1,000, 64,000 sequences"
    if words is None:
        assert lines[0].startswith("Target 0.72 not reached (stopped by signal SIGTERM)")
        return
    nothing = f"Nothing to do: model.ckpt-1000.pt {words}; to start over, --resume never"
    assert lines == [nothing, "Logs: None"]
    assert shown.lines == [resumed, nothing, "Logs: None"]


def test_the_end_is_a_table_and_where_the_logs_are(told: tuple[Console, Shown, Path]) -> None:
    console, shown, path = told
    console.finished(RESULT)
    for_programs = """\
Target 0.72 not reached (stopped by max_steps) after 60 steps, 3,840 sequences
No checkpoint was kept; --save_checkpoint keeps one
Logs: None

| Model             | GPUs   | E2E   | MLM Accuracy | training_sequences_per_second | final_loss |
|-------------------|--------|-------|--------------|-------------------------------|------------|
| BERT mini CPUx1x2 | CPU x1 | 7.50s | 0.400        | 768.000                       | 2.500      |

| Speed                    |                   |
|--------------------------|-------------------|
| p_whole (all time)       | 768.0 sequences/s |
| p_train (no evaluations) | 900.0 sequences/s |
"""
    assert path.read_text() == for_programs
    if shown.is_watched:
        assert shown.lines[0] == "Target 0.72 not reached (stopped by max_steps) after 60 steps"
        assert shown.lines[1] == ""
        assert shown.lines[2].startswith("| Result ")
        assert "| final_loss                    | 2.500             |" in shown.lines
        assert shown.lines[-3:] == ["", NOT_KEPT, "Logs: None"]
        assert max(map(len, shown.lines[2:])) <= 60
    else:
        assert "\n".join(shown.lines) + "\n" == for_programs
