"""The report's picture of `power.csv`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bert_pretraining.errors import UserError
from bert_pretraining.logs.line_file import LineFile
from bert_pretraining.logs.power_file import PowerFile
from bert_pretraining.logs.reading.loading import load_runs
from bert_pretraining.report import compare
from bert_pretraining.report.style import LIGHT, settings
from bert_pretraining.report.view import View
from bert_pretraining.runtime.power import State
from log_files import write_run

pytest.importorskip("matplotlib", reason="the report needs matplotlib")
from matplotlib import rc_context
from matplotlib.figure import Figure

from bert_pretraining.report import figures, power

STARTED = 1_700_000_000.0
SLOW, CAPPED = ("power_cap", "hardware_heat"), ("power_cap",)


def write(path: Path, devices: dict[str, float], reasons: dict[int, tuple[str, ...]]) -> None:
    """Samples of ten seconds: each device's watts, and the reasons by the second."""
    file = PowerFile(LineFile(path))
    for second in range(11):
        for number, (device, watts) in enumerate(devices.items()):
            state = State()
            if device.startswith("GPU"):
                state = State(60 + second + number, 1700, 99, reasons.get(second, ()))
            told = None if second == 0 else watts
            file.write(STARTED + second, device, told, watts * second, state)
    file.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two machines, the first with two GPUs."""
    write_run(tmp_path / "run", 1)
    first = {"GPU 0": 500.0, "GPU 1": 600.0, "package-0": 150.0, "package-0 dram": 20.0}
    write(tmp_path / "run/power.csv", first, {4: CAPPED, 5: SLOW, 6: SLOW, 8: CAPPED})
    write(tmp_path / "run/power-second.csv", {"GPU 0": 400.0, "package-0": 100.0}, {})
    return tmp_path / "run"


def view_of(*folders: Path) -> View:
    runs = load_runs(folders)
    return View(tuple(compare.series_of(runs)), tuple(compare.references(runs, "4.1.0")))


@pytest.fixture
def drawn() -> Iterator[Figure]:
    with rc_context(settings(LIGHT)):
        yield Figure((10, 4))


def test_devices_of_a_kind_add_up_over_machines(folder: Path) -> None:
    found = power.samples_of(folder)
    assert {group: set(watts) for group, watts in found.watts.items()} == {
        "GPUs": {1500.0}, "CPU packages": {250.0}, "memory": {20.0},
    }  # fmt: skip
    assert found.seconds[0] < found.seconds[-1] < 10
    assert list(found.temperature) == list(np.arange(62.0, 72.0))  # of the hotter GPU
    assert list(np.flatnonzero(found.slowed)) == [4, 5]  # the first sample has no power
    assert list(np.flatnonzero(found.capped)) == [3, 4, 5, 7]


def test_one_run_has_a_line_for_each_kind_and_its_slow_spans(folder: Path, drawn: Figure) -> None:
    view = view_of(folder)
    assert power.pictures(view)[0].panels == (power.power, power.temperature)
    left, right = drawn.subplots(1, 2)
    power.power(left, view, LIGHT)
    power.temperature(right, view, LIGHT)
    labels = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    assert list(labels) == [
        "GPUs", "CPU packages", "memory", "held by its limit of power",
        "slowed down by heat or hardware",
    ]  # fmt: skip
    assert len(left.patches) == 3  # twice held, once slowed down
    assert left.get_ylim()[0] == 0 and left.get_ylim()[1] > 1500
    assert left.get_xlabel() == "Time since the first sample (seconds)"
    (line,) = right.get_lines()
    assert max(line.get_ydata()) == 71.0


def test_several_runs_are_drawn_by_their_sums(folder: Path, tmp_path: Path, drawn: Figure) -> None:
    write_run(tmp_path / "other", 2, platform="another")
    write(tmp_path / "other/power.csv", {"package-0": 90.0}, {})
    axes = drawn.subplots()
    power.power(axes, view_of(folder, tmp_path / "other"), LIGHT)
    assert sorted(set(line.get_ydata()) == {90.0} for line in axes.get_lines()) == [False, True]
    assert max(axes.get_lines()[0].get_ydata()) in (1770.0, 90.0)


def test_a_run_without_samples_has_no_such_picture(tmp_path: Path, folder: Path) -> None:
    write_run(tmp_path / "none", 2)
    assert power.pictures(view_of(tmp_path / "none")) == []
    names = [picture.name for picture in figures.pictures(view_of(folder))]
    assert names[-1] == "power"


def test_a_line_that_is_not_whole_yet_is_left_out(folder: Path) -> None:
    before = power.samples_of(folder)
    with (folder / "power.csv").open("a") as file:
        file.write("17000000")
    after = power.samples_of(folder)
    assert after.watts.keys() == before.watts.keys() and len(after.seconds) == len(before.seconds)


def test_a_file_of_something_else_is_one_line(folder: Path) -> None:
    path = folder / "power.csv"
    with path.open("a") as file:
        file.write("hello\n")
    with pytest.raises(UserError, match=r"power.csv line 46: 'hello' is no sample with 8 fields"):
        power.samples_of(folder)


def test_a_long_run_is_drawn_with_few_points(tmp_path: Path) -> None:
    file = PowerFile(LineFile(tmp_path / "power.csv"))
    for second in range(5000):
        file.write(STARTED + second, "package-0", second % 2 * 100.0, 0.0, State())
    file.close()
    found = power.samples_of(tmp_path)
    assert len(found.seconds) == power.MOST_POINTS
    assert np.mean(found.watts["CPU packages"]) == pytest.approx(50.0, abs=1.0)
