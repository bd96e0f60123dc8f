"""The panels of `power.csv`: watts, temperature, and where a device was held back."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bert_pretraining.errors import UserError
from bert_pretraining.logs.power_file import COLUMNS, NAMES, SEPARATOR
from bert_pretraining.logs.reading.runs import Run
from bert_pretraining.report import curves, drawing
from bert_pretraining.report.curves import Scale
from bert_pretraining.report.picture import Picture
from bert_pretraining.report.style import Theme
from bert_pretraining.report.view import View
from bert_pretraining.runtime.power_nvml import POWER_CAP, SLOWDOWNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CAPTION = (
    "What the counters inside the machines counted: no power supplies, fans or networks. Shaded: "
    "a device was slowed down, or held back by its limit of power."
)
MOST_POINTS = 400  # a longer run is drawn in means of as many spans of time


@dataclass(frozen=True)
class Samples:
    """The samples of a run, over all its machines, in equal spans of time.

    seconds: (N,) float64, the middle of each span since the first sample. watts: of each group of
    devices, (N,) float64. temperature: (N,) float64, of the hottest device; nan if none tells it.
    slowed, capped: (N,) bool, whether any device was.
    """

    seconds: np.ndarray
    watts: dict[str, np.ndarray]
    temperature: np.ndarray
    slowed: np.ndarray
    capped: np.ndarray


def samples_of(folder: Path) -> Samples | None:
    """What the files in a run's folder hold; None without any sample.

    Raises:
        UserError: a line, unless it is the last, is not as `PowerFile` writes it.
    """
    stats = [(path, path.stat()) for path in sorted(folder.glob(NAMES))]
    return _read(tuple((path, found.st_mtime_ns, found.st_size) for path, found in stats))


@functools.lru_cache(maxsize=64)
def _read(files: tuple[tuple[Path, int, int], ...]) -> Samples | None:
    """The samples of these files, one of each machine, as (path, time of change, size)."""
    # The first sample has no power yet.
    found = [(n, row) for n, (path, *_) in enumerate(files) for row in _rows(path) if row[2]]
    if not found:
        return None
    rows = [row for _, row in found]
    devices = [(machine, row[1]) for machine, row in found]
    times = np.array([float(row[0]) for row in rows])
    watts = np.array([float(row[2]) for row in rows])
    first, last = times.min(), times.max()
    period = float(np.median(np.diff(np.unique(times)))) if last > first else 1.0
    spans = int(np.clip((last - first) / max(period, 1e-3) + 1, 1, MOST_POINTS))
    width = max(last - first, 1e-3) / spans
    place = np.minimum(((times - first) / width).astype(int), spans - 1)
    groups: dict[str, np.ndarray] = {}
    for device in dict.fromkeys(devices):
        own = np.array([each == device for each in devices])
        group = _group(device[1])
        groups[group] = groups.get(group, 0.0) + _mean(place[own], watts[own], spans)
    temperature = np.full(spans, np.nan)
    for at, row in zip(place, rows, strict=True):
        if row[4]:
            temperature[at] = np.fmax(temperature[at], float(row[4]))
    held = [set(row[7].split(SEPARATOR)) for row in rows]
    return Samples(
        (np.arange(spans) + 0.5) * width,
        groups,
        _filled(temperature),
        _any(place, [not each.isdisjoint(SLOWDOWNS) for each in held], spans),
        _any(place, [POWER_CAP in each for each in held], spans),
    )


def pictures(view: View) -> list[Picture]:
    """The picture of power, and of temperature where it is known; none without samples."""
    found = [each for each in map(_samples, view.runs) if each is not None]
    if not found:
        return []
    hot = any(np.isfinite(each.temperature).any() for each in found)
    return [Picture("power", "Power", CAPTION, (power, temperature) if hot else (power,))]


def power(axes: Axes, view: View, theme: Theme) -> None:
    """Watts against time: of one run those of each group of devices, of several each run's sum."""
    alone, scale = len(view.runs) == 1, _scale(view)
    for style in drawing.styles(view, theme):
        named = False
        for samples in filter(None, map(_samples, style.series.runs)):
            time = samples.seconds / scale.divisor
            if alone:
                for index, (group, watts) in enumerate(samples.watts.items()):
                    color = theme.series[index % len(theme.series)]
                    axes.plot(time, watts, color=color, linewidth=1.8, label=group)
            else:
                total = np.sum(list(samples.watts.values()), axis=0)
                label = None if named else style.label
                axes.plot(time, total, **style.look, linewidth=1.6, label=label)
            named = True
    if alone:
        _shade(axes, _samples(view.runs[0]), theme, scale)
    axes.set_title("Power" if alone else "Power of all counted devices")
    axes.set_ylabel("Watts")
    axes.set_ylim(0, 1.08 * max(axes.get_ylim()[1], 1e-3))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _from_zero(axes, scale)


def temperature(axes: Axes, view: View, theme: Theme) -> None:
    """The temperature of the hottest device against time."""
    scale = _scale(view)
    for style in drawing.styles(view, theme):
        for samples in filter(None, map(_samples, style.series.runs)):
            time = samples.seconds / scale.divisor
            axes.plot(time, samples.temperature, **style.look, linewidth=1.8)
    if len(view.runs) == 1:
        _shade(axes, _samples(view.runs[0]), theme, scale)
    axes.set_title("Temperature of the hottest GPU")
    axes.set_ylabel("Degrees Celsius")
    _from_zero(axes, scale)


def _shade(axes: Axes, samples: Samples, theme: Theme, scale: Scale) -> None:
    kinds = (
        (samples.capped & ~samples.slowed, theme.reference, "held by its limit of power"),
        (samples.slowed, theme.series[1], "slowed down by heat or hardware"),
    )
    middles = samples.seconds / scale.divisor
    half = middles[0]
    for held, color, label in kinds:
        edges = np.flatnonzero(np.diff(np.concatenate([[False], held, [False]]).astype(int)))
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            axes.axvspan(
                middles[begin] - half, middles[end - 1] + half,
                color=color, alpha=0.22, linewidth=0, zorder=0.5, label=label,
            )  # fmt: skip


def _scale(view: View) -> Scale:
    """The unit of time in which every run's samples are drawn."""
    found = [each for each in map(_samples, view.runs) if each is not None]
    return curves.time_scale(max(each.seconds[-1] for each in found))


def _from_zero(axes: Axes, scale: Scale) -> None:
    axes.set_xlim(left=0)
    axes.set_xlabel(scale.label.replace("run start", "the first sample"))


def _samples(run: Run) -> Samples | None:
    return samples_of(run.files[0].parent)


def _rows(path: Path) -> list[list[str]]:
    """The lines of a file below its heading; a last one that is not whole yet is left out."""
    try:
        lines = path.read_text(errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror})", "mend that, or move the file away"
        ) from error
    whole = [line for line in lines if line.endswith("\n")]
    rows = list(csv.reader(whole))
    for number, row in enumerate(rows, 1):
        is_good = row == list(COLUMNS) if number == 1 else _is_sample(row)
        if not is_good:
            raise UserError(
                f"{path} line {number}: {','.join(row)!r} is no sample with {len(COLUMNS)} fields",
                "move the file away, or write it again by a run",
            )
    return rows[1:]


def _is_sample(row: list[str]) -> bool:
    if len(row) != len(COLUMNS):
        return False
    try:
        [float(value) for value in (row[0], *(each for each in row[2:5] if each))]
    except ValueError:
        return False
    return True


def _group(device: str) -> str:
    """The devices that are drawn as one line."""
    if device.startswith("GPU"):
        return "GPUs"
    return "memory" if device.endswith("dram") else "CPU packages"


def _mean(place: np.ndarray, values: np.ndarray, spans: int) -> np.ndarray:
    """The mean of the values of each span; between those of its neighbours where it has none."""
    number = np.bincount(place, minlength=spans)
    total = np.bincount(place, values, minlength=spans)
    return _filled(np.divide(total, number, out=np.full(spans, np.nan), where=number > 0))


def _filled(values: np.ndarray) -> np.ndarray:
    """nan replaced by what lies on the straight line between its neighbours."""
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        return values
    return np.interp(np.arange(len(values)), known, values[known])


def _any(place: np.ndarray, values: list[bool], spans: int) -> np.ndarray:
    return np.bincount(place, np.array(values, float), minlength=spans) > 0
