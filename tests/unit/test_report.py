"""`report`: curves, comparison with the reference, pictures, the page, bad input."""

from __future__ import annotations

import base64
import io
import itertools
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from bert_pretraining import config
from bert_pretraining.errors import EXIT_NOT_CONVERGED, UserError
from bert_pretraining.logs.reading.loading import load_runs
from bert_pretraining.report import compare, curves, figures
from bert_pretraining.report.command import main, make_report
from bert_pretraining.report.curves import SECONDS, Curve
from bert_pretraining.report.style import DARK, LIGHT, Theme, settings
from bert_pretraining.report.view import View
from bert_pretraining.training import train
from helpers import REFERENCE, command, needs_reference
from log_files import mllog_line, perflog_line, write_run

pytest.importorskip("matplotlib", reason="the report needs matplotlib")
from matplotlib import rc_context
from PIL import Image

NVIDIA = REFERENCE / "mlperf_log" / "nvidia_v4.1_h200_result_0.txt"


def view_of(*paths: Path) -> View:
    runs = load_runs(paths)
    return View(tuple(compare.series_of(runs)), tuple(compare.references(runs, "4.1.0")))


def ten_runs(folder: Path, missed: int = 1, **changes: object) -> Path:
    for seed in range(1, 11):
        write_run(folder / f"run-{seed}", seed, converges=seed > missed, **changes)
    return folder


def test_median_of_curves() -> None:
    def line(*values: float) -> Curve:
        return Curve(np.arange(len(values), dtype=np.float64), np.asarray(values, np.float64))

    fast, middle, slow = line(0, 4), line(0, 2, 4), line(0, 1, 2, 3, 4)
    # While two of the three go on: to x = 2. The fast one counts with its last value, 4.
    found = curves.median([fast, middle, slow], finished_count=True)
    assert found.x.tolist() == [0, 1, 2]
    assert found.y.tolist() == [0, 2, 4]
    # Without it, the median of what goes on.
    assert curves.median([fast, middle, slow], finished_count=False).y.tolist() == [0, 2, 3]
    assert len(curves.median([line()], finished_count=True)) == 0


def test_throughput_without_any_in_the_log(tmp_path: Path) -> None:
    lines = [
        mllog_line("run_start", None, 0),
        mllog_line("eval_accuracy", 0.3, 1000, epoch_num=100),
        mllog_line("eval_accuracy", 0.4, 3000, epoch_num=500),
    ]
    (tmp_path / "log.txt").write_text("\n".join(lines))
    (run,) = load_runs([tmp_path / "log.txt"])
    found, logged = curves.throughput(run, SECONDS)
    assert (found.x.tolist(), found.y.tolist(), logged) == ([3.0], [200.0], False)


def test_ten_runs_are_one_series_scored_as_mlperf_scores(tmp_path: Path) -> None:
    (series,) = view_of(ten_runs(tmp_path)).series
    assert series.label == "8xH200, batch 448"
    assert (len(series.runs), len(series.reached)) == (10, 9)
    # The run that missed is the slowest: the fastest of the others goes too.
    samples = sorted(run.target_point.samples for run in series.reached)[1:]
    assert series.mean_samples == pytest.approx(sum(samples) / 8)
    assert series.mean_of == "8 runs without fastest and slowest"


def test_two_missed_runs_leave_no_mean(tmp_path: Path) -> None:
    (series,) = view_of(ten_runs(tmp_path, missed=2)).series
    assert (len(series.reached), series.mean_samples) == (8, None)


def test_few_runs_have_a_colour_each(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"run-{seed}", seed) for seed in range(1, 4)]
    view = view_of(*paths)
    assert [series.label for series in view.series] == ["run-1", "run-2", "run-3"]
    assert len(view.references) == 1  # one batch size


def test_reference_only_where_it_holds(tmp_path: Path) -> None:
    real = view_of(write_run(tmp_path / "real", 1)).references[0]
    assert real.point.mean_samples == pytest.approx(2_414_421, abs=1)
    mini = view_of(write_run(tmp_path / "mini", 1, eval_samples=1114)).references[0]
    assert mini.point is None
    assert mini.reason == "evaluated on 1,114 sequences, where MLPerf's data set has 10,000"
    large = view_of(write_run(tmp_path / "large", 1, batch_size=20_000)).references[0]
    assert large.point is None
    assert large.reason.startswith("batch size 20,000: no reference point")
    with pytest.raises(UserError, match="BERT left MLPerf Training"):
        compare.references(load_runs([tmp_path / "mini"]), "5.1.0")


def test_without_mlperf_logging_runs_are_drawn_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(batch_size: int, ruleset: str) -> None:
        raise UserError("python lacks the package mlperf_logging", "install it")

    monkeypatch.setattr(compare, "convergence_point", none)
    view = view_of(write_run(tmp_path / "run", 1))
    assert view.references[0].reason == "python lacks the package mlperf_logging; install it"
    assert [each.name for each in figures.pictures(view)] == ["accuracy", "loss", "training"]


def test_outcomes_that_contradict_themselves_are_seen(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 1)
    text = (folder / "mllog.txt").read_text()
    (folder / "mllog.txt").write_text(text.replace('"success"', '"aborted"'))
    assert compare.outcome(load_runs([folder])[0]) == "'aborted', but target reached"
    folder = write_run(tmp_path / "other", 1, converges=False)
    text = (folder / "mllog.txt").read_text()
    (folder / "mllog.txt").write_text(text.replace('"aborted"', '"success"'))
    assert compare.outcome(load_runs([folder])[0]) == "'success', but below the target"


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_legends_cover_nothing_and_axes_say_their_units(tmp_path: Path, theme: Theme) -> None:
    ten_runs(tmp_path / "a")
    ten_runs(tmp_path / "b", batch_size=4096, platform="16xB200")
    view = view_of(tmp_path / "a", tmp_path / "b")
    drawn = figures.pictures(view)
    assert [each.name for each in drawn] == ["accuracy", "target", "loss", "training"]
    for picture in drawn:
        with rc_context(settings(theme)):
            figure = figures.figure(picture, view, theme)
            figure.draw_without_rendering()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        for axes in figure.axes:
            assert not box.overlaps(axes.get_tightbbox())
            assert axes.get_title(loc="left")
            assert "(" in axes.get_xlabel()


# How colours look without red and without green receptors, on linear RGB (Vienot, Brettel and
# Mollon 1999).
SIGHTS = {
    "all": np.eye(3),
    "no red": np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
    "no green": np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]),
}
RGB_TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)
WHITE = RGB_TO_XYZ @ np.ones(3)


def linear(color: str) -> np.ndarray:
    parts = np.array([int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB."""
    ratio = RGB_TO_XYZ @ np.clip(rgb, 0, 1) / WHITE
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_throughput_of_unequal_machines_is_logarithmic(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"run-{seed}", seed) for seed in (1, 2)]
    for ratio, scale in ((1, "linear"), (100, "log")):
        text = (paths[1] / "perflog.txt").read_text().replace('"seq/s": ', f'"seq/s": {ratio}')
        (paths[1] / "perflog.txt").write_text(text)
        view = view_of(*paths)
        figure = figures.figure(figures.pictures(view)[-1], view, LIGHT)
        assert figure.axes[-1].get_yscale() == scale


def test_odd_names_and_training_losses_alone_are_drawn(tmp_path: Path) -> None:
    paths = []
    for seed, name in enumerate(("_hidden", "costs $5 $\\frac$", "long" * 30), 1):
        folder = write_run(tmp_path / name, seed)
        (folder / "mllog.txt").unlink()
        lines = (folder / "perflog.txt").read_text().splitlines()
        kept = [line for line in lines if "EVALUATION" not in line]
        (folder / "perflog.txt").write_text("\n".join(kept))
        paths.append(folder)
    view = view_of(*paths)
    drawn = figures.pictures(view)
    assert [each.name for each in drawn] == ["loss", "training"]
    with rc_context(settings(LIGHT)):
        figure = figures.figure(drawn[0], view, LIGHT)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [" _hidden", "costs $5 $\\frac$", f"{'long' * 6}...{('long' * 30)[-19:]}"]
    assert all(len(line.get_xdata()) > 10 for line in figure.axes[0].lines)
    for picture in drawn:
        figures.png(picture, view, LIGHT)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_colours_are_told_apart(theme: Theme) -> None:
    for one, other in itertools.combinations(theme.series, 2):
        for sight, matrix in SIGHTS.items():
            distance = np.linalg.norm(lab(matrix @ linear(one)) - lab(matrix @ linear(other)))
            assert distance > 15, (one, other, sight)
    for color in (*theme.series, theme.text, theme.muted):
        low, high = sorted((RGB_TO_XYZ @ linear(each))[1] for each in (color, theme.background))
        # What WCAG 2.2 asks of graphs.
        assert (high + 0.05) / (low + 0.05) >= 3.0, color


class Page(HTMLParser):
    """What a page loads, and what it says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_one_command_makes_pictures_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = ten_runs(tmp_path / "logs", platform="<script>8xH200 & co")
    main([str(logs), "--output-dir", str(tmp_path / "out"), "--title", "Ten <runs>"])
    said = capsys.readouterr().out
    assert "9 of 10 runs reached the target" in said
    assert "run-1   target not reached" in said
    assert "mean 2,414,421 sequences, standard deviation 197,392" in said
    names = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {"accuracy.png", "target.png", "loss.png", "training.png"}
    assert names == {*pictures, "report.html"}
    for name in pictures:
        with Image.open(tmp_path / "out" / name) as image:
            assert image.width == 1624
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20  # something is drawn
        assert (tmp_path / "out" / name).stat().st_size < 150_000
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("img") == 4
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "Ten <runs>" in page.words
    assert len(page.links) == 8  # light and dark
    for link in page.links:
        kind, _, data = link.partition(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    assert page.tags.count("tr") >= 11 + 11
    # A second report takes the first one's place.
    main([str(logs / "run-2"), "--output_dir", str(tmp_path / "out"), "--ruleset", "5.0.0"])
    assert "ruleset 5.0.0" in capsys.readouterr().out
    again = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "BERT pretraining: run-2" in again.words


@needs_reference
def test_a_published_log_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(NVIDIA), "--output_dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert "1.9% fewer sequences than the reference's mean" in said
    assert "interpolated between 448 and 4,608" in said
    # It has no loss: nothing is drawn for it.
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == [
        "accuracy",
        "target",
        "training",
    ]


def test_a_run_of_this_package(mini_data: Path, tmp_path: Path) -> None:
    """What a trainer writes today is what the report reads."""
    flags = {"name": "mini", "config": "CPUx1x1", "data_dir": str(mini_data), "max_steps": 4,
             "log_freq": 1, "eval_steps": 2, "num_eval_examples": 64,
             "output_dir": str(tmp_path / "output")}  # fmt: skip
    assert train.main(config.resolve(flags)) == EXIT_NOT_CONVERGED
    made = make_report([tmp_path / "output"], tmp_path / "out")
    assert "target not reached" in made.summary
    assert "No reference convergence point: evaluated on 64 sequences" in made.summary
    (run,) = load_runs([tmp_path / "output"])
    assert [point.samples for point in run.evaluations] == [0, 128, 256]
    assert all(point.loss is not None for point in run.evaluations)
    assert [point.samples for point in run.training] == [64, 128, 192, 256]
    assert [path.stem for path in made.files] == ["report", "accuracy", "loss", "training", "step"]
    # What the run said of itself: the warm-up of this configuration has more than four steps.
    assert run.commonest_share == pytest.approx(0.11, abs=0.05)
    (notice,) = run.notices
    assert f"Notices of the runs:\n  {run.name}: {notice}" in made.summary
    assert "<h2>Notices of the runs</h2>" in (tmp_path / "out/report.html").read_text()


def test_the_commonest_token_is_drawn_as_a_baseline(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / f"run-{seed}", seed) for seed in (1, 2))
    assert view_of(first).baselines == []
    for folder, share in ((first, 0.0512), (second, 0.05123)):
        facts = {"masked_tokens": 1000, "commonest_token": 1996, "commonest_share": share}
        with (folder / "perflog.txt").open("a") as file:
            file.write(perflog_line("EVALUATION_SET", facts, 1) + "\n")
    view = view_of(first, second)
    assert view.baselines == [0.051]
    drawn = figures.figure(figures.pictures(view)[0], view, LIGHT)
    for axes in drawn.axes:
        assert "commonest token 0.051" in [text.get_text() for text in axes.texts]
        assert axes.get_ylim()[0] < 0.051


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments and what the error must say, each in a folder with one good log."""
    (folder / "empty.txt").write_text("")
    (folder / "words.txt").write_text("no event in here\n")
    (folder / "binary.bin").write_bytes(bytes(range(256)))
    (folder / "start.txt").write_text(mllog_line("run_start", None, 1) + "\n")
    good = str(folder / "good")
    return {
        "missing": (["absent.txt"], "cannot read absent.txt"),
        "empty": (["empty.txt"], "empty.txt: no :::MLLOG and no [PerfLog] line"),
        "no events": (["words.txt"], "words.txt: no :::MLLOG"),
        "binary": (["binary.bin"], "binary.bin: not a text file"),
        "mixed": ([good, "empty.txt"], "empty.txt: no :::MLLOG"),
        "no points": (["start.txt"], "start.txt: no evaluation and no training step"),
        "no log": ([], "LOG"),
        "ruleset": ([good, "--ruleset", "6.0.0"], "BERT left MLPerf Training"),
        "flag": ([good, "--rulset", "4.1.0"], "did you mean --ruleset?"),
    }


def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "good", 1)
    for name, (arguments, wanted) in bad_inputs(tmp_path).items():
        with pytest.raises(UserError) as raised:
            main([*arguments, "--output_dir", "out"])
        assert wanted in str(raised.value), name
        assert "\n" not in str(raised.value), name
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"cannot write to empty\.txt"):
        main(["good", "--output_dir", "empty.txt"])
    done = command("report", "absent.txt", "--output_dir", "out", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "Error: cannot read absent.txt (No such file or directory); pass a log"
    ]


def test_without_matplotlib_one_line_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=f"install it: {sys.executable} -m pip install matplotlib"):
        main([str(write_run(tmp_path / "run", 1)), "--output_dir", str(tmp_path / "out")])
