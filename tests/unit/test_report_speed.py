"""A run's speed in the report: read from its log, the table, and the pictures of a step."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import pytest

from bert_pretraining.logs.reading.loading import load_runs
from bert_pretraining.logs.sinks import PARTS, MatrixRate
from bert_pretraining.report import compare, speeds, summary
from bert_pretraining.report.page import page
from bert_pretraining.report.view import View
from log_files import speed_figures, write_run

pytest.importorskip("matplotlib", reason="the report needs matplotlib")
from matplotlib import rc_context
from matplotlib.figure import Figure

from bert_pretraining.report import figures
from bert_pretraining.report.style import DARK, LIGHT, Theme, settings


def view_of(*paths: Path) -> View:
    runs = load_runs(paths)
    return View(tuple(compare.series_of(runs)), tuple(compare.references(runs, "4.1.0")))


def drawn(view: View, name: str, theme: Theme = LIGHT) -> Figure:
    (picture,) = (each for each in figures.pictures(view) if each.name == name)
    with rc_context(settings(theme)):
        made = figures.figure(picture, view, theme)
        made.draw_without_rendering()
    return made


def labels(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def names(view: View) -> list[str]:
    return [picture.name for picture in figures.pictures(view)]


def without(path: Path, words: Sequence[str]) -> Path:
    """The run without the lines of its PerfLog that have one of the words."""
    log = path / "perflog.txt"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(line for line in lines if not any(word in line for word in words)))
    return path


def test_the_figures_are_read_as_they_were_logged(tmp_path: Path) -> None:
    (run,) = load_runs([write_run(tmp_path / "run", 1, speed=speed_figures)])
    for point, number in zip(run.training, range(1, 100), strict=False):
        logged = speed_figures(number)
        for name, value in point.speed.named().items():
            assert value == pytest.approx(logged[name]), name
        assert point.loss_scale == logged["loss_scale"]
    assert run.training[0].speed.sequences_per_second == run.training[0].sequences_per_second
    assert run.speed.named() == pytest.approx(
        {name: value for name, value in speed_figures(0).items() if not name.startswith("p_")}
    )
    assert run.throughputs == (3950.0, 4010.0, 4090.0)
    assert run.matrix_rate == MatrixRate(6.8e15, "bf16", (8192, 8192, 8192))


def test_figures_that_a_run_does_not_know(tmp_path: Path) -> None:
    def few(number: int) -> dict[str, object]:
        unknown = ("matrix_share", "peak_memory_mib", "seconds_data", "slowest_rank", "p_core")
        return {**speed_figures(number), **dict.fromkeys(unknown)}

    view = view_of(write_run(tmp_path / "run", 1, speed=few))
    (run,) = view.runs
    assert run.speed.seconds is None
    assert speeds.cells(run) == (
        "run", "1,000,000", "2,100", "6,800 bf16", "-", "-", "3,950", "4,010", "-", "-", "-",
    )  # fmt: skip
    assert "step" not in names(view)


def test_the_table_of_speed(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", 1, speed=speed_figures)
    other = write_run(tmp_path / "other", 2)
    view = view_of(path, other)
    rows = [line.split() for line in summary.text(view).splitlines()]
    assert [row for row in rows if row[1:3] == ["1,000,000", "2,100"]] == [
        "run 1,000,000 2,100 6,800 bf16 31.0% 37.00 GiB 3,950 4,010 4,090 1.0% 5: +6.0%".split()
    ]
    assert [row[:1] for row in rows].count(["other"]) == 1, "it has no figures of speed"
    text = page("title", view, [])
    assert "<h2>Speed</h2>" in text
    assert "<td class=number>5: +6.0%</td>" in text


def test_a_run_without_an_end_has_the_medians_of_its_steps(tmp_path: Path) -> None:
    path = without(write_run(tmp_path / "run", 1, speed=speed_figures), ["FINISHED"])
    (run,) = load_runs([path])
    assert (run.speed, run.throughputs) == (None, None)
    assert speeds.cells(run)[1:5] == ("1,000,000", "2,100", "6,800 bf16", "31.0%")
    assert speeds.cells(run)[5:9] == ("37.00 GiB", "-", "-", "-")
    usual = sum(speeds.part_seconds(run).values())
    assert usual == pytest.approx(0.105, abs=0.01)  # the first step took ten times as long


def test_logs_without_figures_give_the_report_as_before(tmp_path: Path) -> None:
    view = view_of(write_run(tmp_path / "run", 1))
    assert names(view) == ["accuracy", "target", "loss", "training"]
    assert "Tokens/s" not in summary.text(view)
    assert "<h2>Speed</h2>" not in page("title", view, [])


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_a_single_run_is_drawn_over_its_time(tmp_path: Path, theme: Theme) -> None:
    view = view_of(write_run(tmp_path / "run", 1, speed=speed_figures))
    assert names(view)[-2:] == ["step", "loss_scale"]
    figure = drawn(view, "step", theme)
    parts, ranks = figure.axes
    assert len(parts.collections) == len(PARTS)
    assert parts.get_title(loc="left").startswith("A step by part (the first, 1.")
    assert parts.get_ylim()[1] < 200  # ms; the first step is cut off
    assert "slowest rank (most often rank 5)" in labels(figure)
    slowest, median, fastest = (line.get_ydata() for line in ranks.lines)
    assert slowest / median == pytest.approx(1.06, rel=1e-4)
    assert fastest / median == pytest.approx(0.97, rel=1e-4)
    (curve,) = drawn(view, "loss_scale", theme).axes[0].lines
    assert list(curve.get_ydata())[:5] == [65536.0] * 4 + [32768.0]


def test_of_one_rank_no_ranks_are_compared(tmp_path: Path) -> None:
    one_rank = functools.partial(speed_figures, ranks=1)
    view = view_of(write_run(tmp_path / "run", 1, speed=one_rank))
    assert len(drawn(view, "step").axes) == 1
    assert speeds.cells(view.runs[0])[-1] == "-"


def test_several_runs_have_a_bar_each(tmp_path: Path) -> None:
    paths = [
        write_run(
            tmp_path / f"run-{seed}", seed, speed=functools.partial(speed_figures, step=seed / 10)
        )
        for seed in (1, 2)
    ]
    view = view_of(*paths, write_run(tmp_path / "old", 3))
    figure = drawn(view, "step")
    parts, ranks = figure.axes
    assert [text.get_text() for text in parts.get_yticklabels()] == ["run-1", "run-2"]
    assert len(parts.patches) == 2 * len(PARTS)
    widths = [bar.get_width() for bar in parts.patches]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.1)
    assert [text.get_text() for text in ranks.texts] == ["slowest: 5", "slowest: 5"]
    assert {"waiting for data", "median rank", "fastest to slowest rank"} <= set(labels(figure))


def test_a_log_with_figures_of_the_whole_run_alone(tmp_path: Path) -> None:
    def at_the_end(number: int) -> dict[str, object]:
        return {} if number else speed_figures(0)

    figure = drawn(view_of(write_run(tmp_path / "run", 1, speed=at_the_end)), "step")
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["run"]


@pytest.mark.parametrize(("scale", "is_drawn"), [(1.0, False), (65536.0, True)])
def test_a_loss_scale_of_1_is_not_drawn(scale: float, is_drawn: bool, tmp_path: Path) -> None:
    def still(number: int) -> dict[str, object]:
        return {**speed_figures(number), "loss_scale": scale}

    view = view_of(write_run(tmp_path / "run", 1, speed=still))
    assert ("loss_scale" in names(view)) == is_drawn
    if is_drawn:
        low, high = drawn(view, "loss_scale").axes[0].get_ylim()
        assert low < scale < high


def test_a_log_of_a_single_step_is_drawn(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", 1, speed=speed_figures)
    log = path / "perflog.txt"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:3], lines[-1]]))
    (path / "mllog.txt").unlink()
    view = view_of(path)
    assert len(view.runs[0].training) == 1
    figures.png(figures.pictures(view)[-1], view, LIGHT)
