"""The pictures of a qualification's page, from the figures of its stages.

Each maker takes from the figures what its picture draws; where a figure is missing, it leaves the
picture out. A panel draws what its maker took, and nothing else, so that a picture whose data are
the same need not be drawn again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bert_pretraining.logs.sinks import PARTS
from bert_pretraining.qualify import roofline
from bert_pretraining.qualify.record import Qualification
from bert_pretraining.report.picture import Panel, Picture
from bert_pretraining.report.step import PART_NAMES, unit_of
from bert_pretraining.report.style import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE = (11.6, 3.6)
ROW_INCHES, MORE_INCHES = 0.34, 1.9  # of a picture of bars: a row, and what is around them
MOST_DEVICES = 6  # lines in a panel of sensors
TEMPERATURE, CLOCK = 2, 3  # places in a point of `Sensors.figures`
WATTS = 1


@dataclass(frozen=True)
class Sketch:
    """A picture, and the data that its panels draw."""

    picture: Picture
    data: Mapping[str, Any]


def sketches(done: Qualification) -> list[Sketch]:
    """The pictures for which there are figures, in the order of the page."""
    found = []
    for make in (roofline_picture, speeds, parts, scaling, all_reduce, endurance, learning):
        with contextlib.suppress(KeyError):  # a figure is missing
            found.append(make(done))
    return [sketch for sketch in found if sketch is not None]


def figures_of(done: Qualification, stage: str) -> Mapping[str, Any]:
    """The figures of a stage; empty where it did not run."""
    found = done.stage(stage)
    return {} if found is None else found.figures


def by_number(found: object) -> dict[int, Mapping[str, Any]]:
    """The figures of batch sizes or numbers of ranks, in ascending order."""
    if not isinstance(found, Mapping):
        return {}
    return {int(number): found[number] for number in sorted(found, key=int)}


def roofline_picture(done: Qualification) -> Sketch | None:
    """What the parts of a step reach, against the measured limits."""
    data = roofline.data_of(figures_of(done, "limits"), figures_of(done, "step"))
    if data is None:
        return None
    caption = (
        "The roofs are the rates measured here, of a copy within the memory and of the best "
        "product, on all ranks at once. Points are products of the model's shapes; their bytes "
        "are counted as if each matrix was moved once."
    )
    if data["steps"]:
        caption = (
            f"Left: {caption[0].lower()}{caption[1:]} The bytes that a step moves are not "
            "measured, so what it reaches is a line. Right: the model's operations by the time of "
            "the whole step, and by that of forward and backward alone."
        )
    rows = len(roofline.rows(data))
    size = (WIDE[0], max(WIDE[1], ROW_INCHES * rows + MORE_INCHES))
    panels = (roofline.roof, roofline.reached) if data["steps"] else (roofline.roof,)
    return Sketch(Picture("roofline", "Roofline", caption, panels, size), data)


def speeds(done: Qualification) -> Sketch | None:
    """Throughput and step time by batch size."""
    step = figures_of(done, "step")
    by_size = by_number(step.get("by_batch_size"))
    if len(by_size) < 2:
        return None
    data = {
        "sizes": list(by_size),
        "rates": [one["sequences/s"] for one in by_size.values()],
        "seconds": [
            [one["step_seconds_min"], one["step_seconds_median"], one["step_seconds_max"]]
            for one in by_size.values()
        ],
        "precision": step.get("precision", ""),
        "best": step.get("best_batch_size"),
        "others": {
            name: one["sequences/s"] for name, one in (step.get("by_precision") or {}).items()
        },
    }
    caption = (
        "Sequences a second over all ranks at the median step; bars reach from the fastest to the "
        "slowest step."
    )
    return Sketch(Picture("speed", "Speed", caption, (_rates, _step_seconds), WIDE), data)


def _rates(axes: Axes, data: Mapping[str, Any], theme: Theme) -> None:
    label = f"{data['precision']}, the run's" if data["others"] else data["precision"]
    axes.plot(data["sizes"], data["rates"], "-o", color=theme.series[0], linewidth=2, label=label)
    for (name, rate), color, mark in zip(
        data["others"].items(), theme.series[1:], "s^D", strict=False
    ):
        axes.plot([data["best"]], [rate], mark, color=color, markersize=7, label=name)
    axes.set_title("Throughput by batch size")
    axes.set_ylabel("Sequences/s")
    axes.set_ylim(0, 1.12 * max([*data["rates"], *data["others"].values()]))
    _powers(axes, data["sizes"], "Batch size (sequences a rank)")


def _step_seconds(axes: Axes, data: Mapping[str, Any], theme: Theme) -> None:
    unit, name = unit_of(max(high for _, _, high in data["seconds"]))
    columns = zip(*data["seconds"], strict=True)
    low, middle, high = ([unit * one for one in column] for column in columns)
    reach = [
        [center - end for center, end in zip(middle, low, strict=True)],
        [end - center for center, end in zip(middle, high, strict=True)],
    ]
    axes.errorbar(data["sizes"], middle, yerr=reach, fmt="-o", color=theme.series[0], linewidth=2,
                  capsize=4, ecolor=theme.muted)  # fmt: skip
    axes.set_title("Step time by batch size")
    axes.set_ylabel(f"Time of a step ({name})")
    axes.set_ylim(0, 1.08 * max(high))
    _powers(axes, data["sizes"], "Batch size (sequences a rank)")


def _powers(axes: Axes, numbers: list[int], label: str) -> None:
    """A logarithmic axis with these numbers alone."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.minorticks_off()
    axes.set_xlabel(label)


def parts(done: Qualification) -> Sketch | None:
    """A step by part, for each batch size and for each number of ranks."""
    data = {
        "sizes": _seconds_by_part(figures_of(done, "step").get("by_batch_size")),
        "ranks": _seconds_by_part(figures_of(done, "scaling").get("by_ranks")),
    }
    panels: list[Panel] = [_parts_by_size] if data["sizes"] else []
    panels += [_parts_by_ranks] if data["ranks"] else []
    if not panels:
        return None
    rows = max(len(data["sizes"]), len(data["ranks"]), 2)
    size = (WIDE[0], ROW_INCHES * rows + MORE_INCHES)
    caption = "Shares of the step, as the mean over the ranks; on the right the step's time."
    picture = Picture("parts", "Where a step's time goes", caption, tuple(panels), size)
    return Sketch(picture, data)


def _seconds_by_part(found: object) -> dict[int, dict[str, float]]:
    """Number -> part -> seconds; of those that know it."""
    known = {
        number: {part: one.get(f"seconds_{part}") or 0.0 for part in PARTS}
        for number, one in by_number(found).items()
        if one.get("seconds_forward_backward") is not None
    }
    return {number: seconds for number, seconds in known.items() if sum(seconds.values()) > 0}


def _parts_by_size(axes: Axes, data: Mapping[str, Any], theme: Theme) -> None:
    _part_rows(axes, data["sizes"], theme)
    axes.set_title("By batch size")
    axes.set_ylabel("Sequences a rank")


def _parts_by_ranks(axes: Axes, data: Mapping[str, Any], theme: Theme) -> None:
    _part_rows(axes, data["ranks"], theme)
    axes.set_title("By number of ranks")
    axes.set_ylabel("Ranks")


def _part_rows(axes: Axes, found: Mapping[int, Mapping[str, float]], theme: Theme) -> None:
    """A stacked bar for each number, from the top."""
    totals = [sum(seconds.values()) for seconds in found.values()]
    left = [0.0] * len(found)
    for part, color in zip(PARTS, theme.series, strict=False):
        widths = [
            100 * one[part] / total for one, total in zip(found.values(), totals, strict=True)
        ]
        axes.barh(range(len(found)), widths, 0.66, left, color=color, label=PART_NAMES[part])
        left = [start + width for start, width in zip(left, widths, strict=True)]
    unit, name = unit_of(max(totals))
    for row, total in enumerate(totals):
        axes.text(1.015, row, f"{total * unit:.3g} {name}", va="center", fontsize=9.5,
                  transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_yticks(range(len(found)), [f"{number:,}" for number in found])
    axes.set_ylim(max(len(found), 2) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("Share of the step (%)")
    axes.grid(False, axis="y")


def scaling(done: Qualification) -> Sketch | None:
    """Throughput and efficiency by ranks."""
    by_ranks = by_number(figures_of(done, "scaling").get("by_ranks"))
    whole = {count: one for count, one in by_ranks.items() if one.get("efficiency") is not None}
    if len(whole) < 2:
        return None
    data = {
        "ranks": list(whole),
        "rates": [one["sequences/s"] for one in whole.values()],
        "efficiencies": [one["efficiency"] for one in whole.values()],
    }
    caption = (
        "Efficiency: the throughput by that of as many times one rank alone. Ranks on a CPU share "
        "its memory's rate."
        if done.machine.get("device_type") == "cpu"
        else "Efficiency: the throughput by that of as many times one rank alone."
    )
    return Sketch(Picture("scaling", "Scaling", caption, (_scaled, _efficiency), WIDE), data)


def _scaled(axes: Axes, data: Mapping[str, Any], theme: Theme) -> None:
    first, alone = data["ranks"][0], data["rates"][0]
    ideal = [alone * count / first for count in data["ranks"]]
    axes.plot(data["ranks"], ideal, color=theme.reference, linestyle=(0, (5, 3)), label="ideal")
    axes.plot(data["ranks"], data["rates"], "-o", color=theme.series[0], linewidth=2,
              label="measured")  # fmt: skip
    axes.set_title("Throughput by ranks")
    axes.set_ylabel("Sequences/s")
    axes.set_ylim(0, 1.08 * max(*ideal, *data["rates"]))
    axes.set_xticks(data["ranks"], [f"{count:,}" for count in data["ranks"]])
    axes.set_xlim(left=0)
    axes.set_xlabel("Ranks (one a device)")


def _efficiency(axes: Axes, data: Mapping[str, Any], theme: Theme) -> None:
    heights = [100 * one for one in data["efficiencies"]]
    bars = axes.bar(range(len(heights)), heights, 0.6, color=theme.series[0])
    axes.bar_label(bars, [f"{height:.0f}%" for height in heights], padding=3, color=theme.text)
    axes.set_xticks(range(len(heights)), [f"{count:,}" for count in data["ranks"]])
    axes.set_xlim(-0.8, max(len(heights), 3) - 0.2)
    axes.set_ylim(0, 1.15 * max(heights))
    axes.set_title("Efficiency by ranks")
    axes.set_ylabel("Efficiency (%)")
    axes.set_xlabel("Ranks (one a device)")
    axes.grid(False, axis="x")


def all_reduce(done: Qualification) -> Sketch | None:
    """Bandwidth and time of all-reduce by message size."""
    found = by_number(figures_of(done, "limits").get("all_reduce"))
    if len(found) < 2:
        return None
    data = {
        "sizes": list(found),
        "rates": [one["bus_gb/s"] for one in found.values()],
        "seconds": [one["seconds"] for one in found.values()],
    }
    caption = (
        "Bus bandwidth: what each rank's link must carry, however the sum is made: "
        "bytes * 2 (N - 1) / N / seconds."
    )
    return Sketch(Picture("all_reduce", "All-reduce", caption, (_bus, _reduction), WIDE), data)


def _bus(axes: Axes, data: Mapping[str, Any], theme: Theme) -> None:
    axes.plot(data["sizes"], data["rates"], "-o", color=theme.series[0], linewidth=2)
    axes.set_title("Bus bandwidth by message size")
    axes.set_ylabel("Bus bandwidth (GB/s)")
    axes.set_ylim(0, 1.12 * max(data["rates"]))
    _powers(axes, data["sizes"], "Message (MB)")


def _reduction(axes: Axes, data: Mapping[str, Any], theme: Theme) -> None:
    unit, name = unit_of(max(data["seconds"]))
    axes.plot(data["sizes"], [unit * one for one in data["seconds"]], "-o", color=theme.series[0],
              linewidth=2)  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title("Time by message size")
    axes.set_ylabel(f"Time of an all-reduce ({name})")
    _powers(axes, data["sizes"], "Message (MB)")


def endurance(done: Qualification) -> Sketch | None:
    """The step time over time; temperature and clock beside it, else power, where it was read."""
    figures = figures_of(done, "endurance")
    if len(figures.get("points") or []) < 2:
        return None
    sensors = [one for one in figures.get("sensors") or [] if len(one.get("points", [])) > 1]
    data = {
        "points": figures["points"],
        "thirds": [figures.get(f"step_seconds_{which}_third") for which in ("first", "last")],
        "sensors": {one["device"]: one["points"] for one in sensors[:MOST_DEVICES]},
    }
    panels: list[Panel] = [_over_time]
    panels += [panel for panel, place in ((_temperature, TEMPERATURE), (_clock, CLOCK))
               if _has(data["sensors"], place)]  # fmt: skip
    if len(panels) == 1 and sensors:
        panels.append(_power)
    caption = "Each point is the mean of about a second, or of one step if that takes longer."
    if len(sensors) > MOST_DEVICES:
        caption += f" Of {len(sensors)} devices the first {MOST_DEVICES} are drawn."
    picture = Picture("endurance", "Step time over time", caption, tuple(panels), WIDE)
    return Sketch(picture, data)


def _has(sensors: Mapping[str, list], place: int) -> bool:
    return any(point[place] is not None for points in sensors.values() for point in points)


def _over_time(axes: Axes, data: Mapping[str, Any], theme: Theme) -> None:
    points = data["points"]
    highest = max(seconds for _, seconds in points)
    (unit, name), (clock, clock_name) = unit_of(highest), _clock_of(points[-1][0])
    axes.plot([at / clock for at, _ in points], [unit * seconds for _, seconds in points],
              color=theme.series[0], linewidth=1.5, marker="o" if len(points) < 80 else "",
              markersize=4, label="steps")  # fmt: skip
    end = points[-1][0] / clock
    for seconds, (start, stop), which in zip(
        data["thirds"], ((0, end / 3), (2 * end / 3, end)), ("first", "last"), strict=True
    ):
        if seconds is not None:
            color, label = theme.series[1 if which == "first" else 2], f"median, {which} third"
            axes.plot([start, stop], [unit * seconds] * 2, color=color, linewidth=3.5, alpha=0.7,
                      label=f"{label}: {unit * seconds:.4g} {name}")  # fmt: skip
    axes.set_ylim(0, 1.12 * unit * highest)
    axes.set_title("Step time")
    axes.set_ylabel(f"Time of a step ({name})")
    axes.set_xlabel(f"Time ({clock_name})")
    axes.set_xlim(left=0)


def _clock_of(seconds: float) -> tuple[float, str]:
    return (60.0, "min") if seconds > 180 else (1.0, "s")


def _sensor_lines(axes: Axes, data: Mapping[str, Any], theme: Theme, place: int) -> None:
    clock, name = _clock_of(data["points"][-1][0])
    for (device, points), color in zip(data["sensors"].items(), theme.series, strict=False):
        known = [(point[0] / clock, point[place]) for point in points if point[place] is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=color, linewidth=1.5, label=device)
    axes.set_xlabel(f"Time ({name})")
    axes.set_xlim(left=0)


def _temperature(axes: Axes, data: Mapping[str, Any], theme: Theme) -> None:
    _sensor_lines(axes, data, theme, TEMPERATURE)
    axes.set_title("Temperature")
    axes.set_ylabel("Temperature (degrees Celsius)")


def _clock(axes: Axes, data: Mapping[str, Any], theme: Theme) -> None:
    _sensor_lines(axes, data, theme, CLOCK)
    axes.set_title("Clock")
    axes.set_ylabel("Clock (MHz)")
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])


def _power(axes: Axes, data: Mapping[str, Any], theme: Theme) -> None:
    _sensor_lines(axes, data, theme, WATTS)
    axes.set_title("Power")
    axes.set_ylabel("Power (watts)")
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])


def learning(done: Qualification) -> Sketch | None:
    """The accuracy of the mini data set by steps."""
    figures = figures_of(done, "learning")
    if not figures.get("curve"):
        return None
    data = {
        "curve": [[0, figures["start_accuracy"]], *figures["curve"]],
        "target": figures.get("target_accuracy"),
        "batch_size": figures["batch_size"],
    }
    caption = "Accuracy of masked words on the mini data set's evaluation sequences."
    return Sketch(Picture("learning", "Learning", caption, (_accuracy,), WIDE), data)


def _accuracy(axes: Axes, data: Mapping[str, Any], theme: Theme) -> None:
    axes.plot(*zip(*data["curve"], strict=True), "-o", color=theme.series[0], linewidth=2,
              markersize=4)  # fmt: skip
    if data["target"] is not None:
        axes.axhline(data["target"], color=theme.target, linewidth=1.2, linestyle=(0, (5, 3)))
        axes.annotate(f"target {data['target']:g}", (0.0, data["target"]),
                      xycoords=("axes fraction", "data"), xytext=(6, 4),
                      textcoords="offset points", color=theme.target)  # fmt: skip
    axes.set_title("MLM accuracy by steps")
    axes.set_ylabel("MLM accuracy")
    axes.set_xlabel(f"Steps ({data['batch_size']} sequences each)")
    axes.set_xlim(left=0)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.08 * (high - low))
