"""What is normal? Published speeds of the same device, beside the measured one.

`published.py` has the figures. The band of what is normal are the published speeds of like
systems; where there is one system, its speed less the widest spread of like ones.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import NamedTuple

from bert_pretraining.bench.workload import BERT_LARGE
from bert_pretraining.qualify.published import Row, find
from bert_pretraining.qualify.record import Qualification


class Compared(NamedTuple):
    """lines: for people. figures: one mapping for each published speed, of a device:
    `device`, `devices`, `system`, `round`, `source`, `batch_size`, `precision`, `packed`,
    `published_sequences/s`, `lowest_sequences/s`, `highest_sequences/s` (the band),
    `measured_sequences/s`, `share` (measured by published; missing for another model),
    `is_below_band`, `differs` (texts)."""

    lines: list[str]
    figures: list[dict[str, object]]


def compare(done: Qualification) -> Compared:
    """Set the stage `step`'s best speed beside the published ones of this device."""
    stage = done.stage("step")
    rate = stage.figures.get("sequences/s") if stage is not None else None
    if not isinstance(rate, int | float):
        return Compared(["the stage step has no speed: nothing to compare"], [])
    device = str(done.machine["device"])
    name = str(done.machine["cpu"]) if done.machine["device_type"] == "cpu" else device
    ranks = int(done.settings["ranks"])
    found = find(name, ranks)
    if not found:
        return Compared([f"no speed of {name} was published: compared with nothing"], [])
    lines, figures = [], []
    for row in found:
        line, of_row = _beside(row, done, rate / ranks, stage.figures)
        lines.append(line)
        figures.append(of_row)
    return Compared(lines, figures)


def _beside(
    row: Row, done: Qualification, rate: float, step: dict[str, object]
) -> tuple[str, dict[str, object]]:
    """The line and the figures of one published speed. rate: measured, of a device."""
    differs = _differences(row, done, step)
    figures: dict[str, object] = {
        **{name: value for name, value in asdict(row).items() if name not in _OTHERWISE},
        "published_sequences/s": row.sequences_per_second,
        "lowest_sequences/s": row.lower_bound,
        "highest_sequences/s": row.sequences_per_second,
        "measured_sequences/s": rate,
        "differs": differs,
    }
    count = f"{row.devices} x " if row.devices else ""
    published = f"{count}{row.device}: {row.sequences_per_second:g} sequences/s a device"
    if row.lowest is not None:
        published = (
            f"{count}{row.device}: {row.lowest:g} to {row.sequences_per_second:g} sequences/s a "
            "device"
        )
    layers = int(done.settings["layers"])
    if layers != BERT_LARGE.num_hidden_layers:
        line = (
            f"{published} ({row.origin}); not compared: measured with {layers} of "
            f"{BERT_LARGE.num_hidden_layers} layers"
        )
        return line, figures
    share = rate / row.sequences_per_second
    is_below = rate < row.lower_bound
    figures |= {"share": share, "is_below_band": is_below}
    place = "in the band of like machines"
    if is_below:
        place = f"{1.0 - rate / row.lower_bound:.0%} below the band of like machines"
    elif rate > row.sequences_per_second:
        place = "above it"
    line = (
        f"{published} ({row.origin}); measured {rate:.4g}, {share:.0%} of it, {place}; what "
        f"differs: {'; '.join(differs)}"
    )
    return line, figures


# Are named differently in the figures, or are of a whole training.
_OTHERWISE = ("names", "sequences_per_second", "lowest", "minutes")


def _differences(row: Row, done: Qualification, step: dict[str, object]) -> list[str]:
    """What is not the same here and there; what is not known of the published one is told."""
    found = []
    ranks = int(done.settings["ranks"])
    if row.devices is None:
        found.append(f"devices: not known, here {ranks}")
    elif row.devices != ranks:
        found.append(f"devices: {row.devices}, here {ranks}")
    precision = step.get("precision") or done.settings.get("precision") or "the default"
    if row.precision != precision:
        found.append(f"precision: {row.precision or 'not known'}, here {precision}")
    size = step.get("best_batch_size")
    if row.device_batch_size is None or row.device_batch_size != size:
        known = "not known" if row.device_batch_size is None else f"{row.device_batch_size:g}"
        found.append(f"sequences an update and device: {known}, here {size or 'not known'}")
    if row.packed is not True:
        known = "padded" if row.packed is False else "padded or packed: not known"
        found.append(f"{known}, here without padding")
    found.append("a whole training with evaluations, here updates on made-up sequences")
    return found
