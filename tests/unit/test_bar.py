"""What stands beside the bar, and when the target is expected."""

from __future__ import annotations

import io
import json
import re
import time

import pytest

from bert_pretraining.logs.bar import MARGIN, Bar, LinesAbove, fitting
from bert_pretraining.logs.terminal import Terminal
from bert_pretraining.logs.time_to_target import samples_at_target
from bert_pretraining.runtime import screen
from helpers import ROOT

FIGURES = {
    "loss": "loss 2.348",
    "accuracy": "acc 0.415",
    "learning_rate": "lr 5.25e-03",
    "speed": "1,530 seq/s",
    "evaluation": "eval in 00:01",
    "target": "target in ~03:20",
}
NEVER = 10**9
# (trained sequences, MLM accuracy) of BERT-large, MLPerf Training, target 0.72: NVIDIA's run on
# 8 H200 (v4.1), and Quanta's slowest on 4 H100 PCIe (v4.0, D54U-3U, result_5).
H200 = [
    (150336, 0.3799), (299889, 0.4013), (450211, 0.4677), (600957, 0.6340), (750972, 0.6994),
    (900858, 0.7081), (1051158, 0.7116), (1200285, 0.7132), (1349755, 0.7148), (1500274, 0.7159),
    (1649746, 0.7168), (1799017, 0.7180), (1949274, 0.7183), (2099018, 0.7191), (2248679, 0.7199),
    (2398552, 0.7201),
]  # fmt: skip
H100 = [
    (150529, 0.3744), (299792, 0.3766), (450181, 0.3872), (599992, 0.4040), (750699, 0.4205),
    (900394, 0.4718), (1050687, 0.5216), (1200126, 0.5848), (1350519, 0.6500), (1500340, 0.6899),
    (1650240, 0.7017), (1799591, 0.7066), (1949974, 0.7102), (2099156, 0.7121), (2249458, 0.7139),
    (2398546, 0.7148), (2548907, 0.7153), (2698876, 0.7164), (2849432, 0.7166), (2998302, 0.7176),
    (3148909, 0.7178), (3298167, 0.7179), (3448251, 0.7185), (3597723, 0.7193), (3748393, 0.7202),
]  # fmt: skip


def mini_curves() -> list[list[tuple[int, float]]]:
    """(trained sequences, MLM accuracy) of nine runs with an evaluation every 25 steps of 64."""
    measured = json.loads((ROOT / "results/2026-11-26_gpu_ready/fp8_curves.json").read_text())
    curves = [run["accuracies"].items() for run in measured["runs"]]
    return [[(64 * int(step), accuracy) for step, accuracy in curve] for curve in curves]


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (
            100,
            "loss 2.348, acc 0.415, lr 5.25e-03, 1,530 seq/s, eval in 00:01, target in ~03:20",
        ),
        (80, "loss 2.348, acc 0.415, lr 5.25e-03, 1,530 seq/s, eval in 00:01, target in ~03:20"),
        (79, "loss 2.348, acc 0.415, 1,530 seq/s, eval in 00:01, target in ~03:20"),
        (60, "loss 2.348, acc 0.415, 1,530 seq/s, target in ~03:20"),
        (43, "loss 2.348, acc 0.415, target in ~03:20"),
        (30, "loss 2.348, target in ~03:20"),
        (16, "target in ~03:20"),
        (15, ""),
        (-4, ""),
    ],
)
def test_the_least_important_figures_go_first(columns: int, shown: str) -> None:
    assert fitting(FIGURES, columns) == shown


def test_a_figure_that_is_not_known_takes_no_place() -> None:
    assert fitting({"speed": "1,530 seq/s", "loss": "loss 2.348"}, 30) == "loss 2.348, 1,530 seq/s"
    assert fitting({}, 30) == ""


@pytest.mark.parametrize("columns", [20, 60, 80, 200])
@pytest.mark.parametrize("language", ["C.UTF-8", "C"])
def test_the_bar_keeps_its_place_and_width_whatever_stands_beside_it(
    monkeypatch: pytest.MonkeyPatch, columns: int, language: str
) -> None:
    monkeypatch.setenv("LC_ALL", language)
    monkeypatch.setattr(screen, "columns", lambda stream: columns)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    bar = Bar(1000, 0, stream)
    shown = {}
    for steps in (1, 149, 150, 600, 650, 1000):
        for left_out in ((), ("target",), ("evaluation", "target"), FIGURES):
            figures = {name: text for name, text in FIGURES.items() if name not in left_out}
            bar.n = steps
            bar.show(figures)
            stream.flush()
            state = stream.buffer.getvalue().decode().rpartition(screen.CLEAR_LINE)[2]
            assert len(state) <= columns - MARGIN
            counter, drawn, place = re.fullmatch(r"(\d+/1000) +([^ a-z\d]*)(.*)", state).groups()
            assert int(counter.split("/")[0]) == steps
            text = re.search("[a-z].*", place) or re.search(r"\d+ seq.*", place)
            at = text and text.start() + state.index(place)
            shown.setdefault(steps, set()).add(drawn)
            shown.setdefault("beside", set()).update({at} - {None})
            if language == "C":
                assert set(drawn) <= {"#"}
    bar.close()
    assert all(len(shown[steps]) == 1 for steps in (1, 149, 150, 600, 650, 1000))
    lengths = [len(*shown[steps]) for steps in (1, 149, 150, 600, 650, 1000)]
    assert lengths == sorted(lengths) and lengths[-1] >= 4
    assert len(shown["beside"]) == (columns > 20), "what stands beside it does not move"


class FakeBar:
    """Notes what is written above it."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write_above(self, stream: io.StringIO, text: str) -> None:
        self.written.append(text)
        stream.write(text)


def test_lines_of_others_are_written_whole() -> None:
    bar, stream = FakeBar(), io.StringIO()
    lines = LinesAbove(bar, stream)
    print("Warning: one", "two", file=lines)
    lines.write("three\nfour\nfi")
    lines.flush()
    assert bar.written == ["Warning: one two\n", "three\nfour\n"]
    assert lines.end() is stream
    assert stream.getvalue() == "Warning: one two\nthree\nfour\nfi"


def every_thousand(*accuracies: float) -> list[tuple[int, float]]:
    return [(1000 * number, accuracy) for number, accuracy in enumerate(accuracies, 1)]


# A straight line over the sequences from the 3rd evaluation on: 0.02 a thousand.
STEADY = every_thousand(0.1, 0.1, 0.40, 0.42, 0.44, 0.46, 0.48, 0.50, 0.52, 0.54)


def test_an_estimate_is_an_evaluation_that_comes() -> None:
    # The line over the sequences has 0.6 at 13,000, that over their logarithm at 14,400. Between
    # them lies 13,700; the next evaluation is at 14,000.
    assert samples_at_target(STEADY, 0.6, NEVER) == 14_000
    assert samples_at_target(STEADY, 0.545, NEVER) == 11_000
    # The start's evaluation, after 0 sequences, has no part in it.
    assert samples_at_target([(0, 0.5), *STEADY], 0.6, NEVER) == 14_000


def test_no_estimate_lies_behind_the_end() -> None:
    assert samples_at_target(STEADY, 0.6, 14_000) == 14_000
    assert samples_at_target(STEADY, 0.6, 13_999) is None


@pytest.mark.parametrize(
    "evaluations",
    [
        [],
        every_thousand(0.4),
        STEADY[2:8],  # six: the fourth estimate in a row comes with the seventh evaluation
        [(0, 0.1), *STEADY[2:8]],
        every_thousand(*[0.5] * 10),  # no growth
        every_thousand(*[0.5 - 0.01 * number for number in range(10)]),  # a fall
        [*STEADY, (11_000, 0.44)],  # one fall is enough
        [*STEADY, (11_000, 0.54), (12_000, 0.54)],  # a plateau
        every_thousand(*[0.4 + 0.01 * number + 0.02 * (number % 2) for number in range(10)]),
        every_thousand(*[0.5 + 0.0001 * number for number in range(10)]),  # the target is far away
        [*STEADY, (11_000, 0.60)],  # it is reached
        every_thousand(0.10, 0.11, 0.12, 0.13, 0.14, 0.25, 0.36, 0.47, 0.58),  # it begins to learn
        every_thousand(0.10, 0.20, 0.30, 0.40, 0.50, 0.56, 0.570, 0.580),  # it bends
    ],
)
def test_an_estimate_that_means_nothing_is_not_made(evaluations: list[tuple[int, float]]) -> None:
    assert samples_at_target(evaluations, 0.6, NEVER) is None


def errors(curve: list[tuple[int, float]]) -> list[float]:
    """Of each estimate along a curve: the time left that it promised, by what was left."""
    end, _ = curve[-1]
    found = []
    for count in range(1, len(curve)):
        now, _ = curve[count - 1]
        estimate = samples_at_target(curve[:count], 0.72, NEVER)
        if estimate is not None:
            found.append((estimate - now) / (end - now))
    return found


def test_the_estimates_of_real_curves_are_as_wrong_as_the_docstring_says() -> None:
    of_mini = [error for curve in mini_curves() for error in errors(curve)]
    assert len(of_mini) >= 10
    assert 0.5 < min(of_mini) < max(of_mini) < 2.1
    # The curves of BERT-large rise steeply to 0.7, then bend: what the steep part promises is a
    # fifteenth of the time left, and is not shown.
    assert errors(H200) == pytest.approx([0.75, 1.0], abs=0.01)
    assert errors(H100) == []


def test_the_time_that_the_bar_takes_counts_as_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it does where a user holds the terminal (Ctrl-S)."""
    now = [100.0]

    class Held(io.StringIO):
        def write(self, text: str) -> int:
            now[0] += 5.0
            return super().write(text)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(screen, "stream_of_the_bar", Held)
    terminal = Terminal(total_steps=10)
    terminal.begin_at(0)
    before = terminal.seconds
    terminal.show(FIGURES)
    assert terminal.seconds == before + 5.0
    terminal.close()
