"""The model held against published results: fitted to one machine, it predicts the larger ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bert_pretraining.logs.result_tables import table
from bert_pretraining.qualify.published import Row, rows
from bert_pretraining.scaling import known_devices
from bert_pretraining.scaling.messages import Messages
from bert_pretraining.scaling.step import Asked, step_of
from bert_pretraining.scaling.tables import ABSENT, number
from bert_pretraining.scaling.training_run import Targets, run_of

MADE = "Made with --spread 0: no rank waits for a slower one. Minutes are without start-up."


@dataclass(frozen=True)
class Held:
    """One published result and what the model says of it.

    from_one, from_two: sequences a second of a device, fitted to the result of 8 devices, and to
    that and the one of 4; None where the fit would use fewer results than that. fitted: by name,
    whether this result went into the fit. minutes: to the target by the reference's mean of
    sequences; None where it is not known.
    """

    row: Row
    from_one: float
    from_two: float | None
    is_in_one: bool
    is_in_two: bool
    minutes: float | None


def held(targets: Targets) -> list[Held]:
    """All results of devices that the model knows, with a known batch."""
    return [one for name in known_devices.names() for one in _of_device(name, targets)]


def _of_device(name: str, targets: Targets) -> Iterator[Held]:
    used, messages = known_devices.one_machine(name), known_devices.submitted_messages()
    one = known_devices.calibrated(name, used[:1])
    two = known_devices.calibrated(name, used[:2]) if len(used) > 1 else None
    all_rows = [row for row in rows() if row.device == name and row.batch_size and row.devices]
    if len(all_rows) == 1:  # nothing to predict
        return
    for row in sorted(all_rows, key=lambda row: row.devices):
        yield Held(
            row,
            _rate(one, messages, row),
            None if two is None else _rate(two, messages, row),
            row in used[:1],
            row in used[:2],
            _minutes(two or one, messages, row, targets),
        )


def _rate(asked: Asked, messages: Messages, row: Row) -> float:
    batch = row.device_batch_size
    return batch / step_of(asked, messages, row.devices, batch).seconds


def _minutes(asked: Asked, messages: Messages, row: Row, targets: Targets) -> float | None:
    samples = targets.samples(row.batch_size)
    if samples is None or row.minutes is None:
        return None
    step = step_of(asked, messages, row.devices, row.device_batch_size)
    return run_of(samples, row.batch_size, step.seconds, 0.0).seconds / 60


def markdown(found: list[Held]) -> str:
    """The table of docs/scaling.md."""
    head = [
        "Device", "Ranks", "Batch", "Published", "Fit to 8", "Error", "Fit to 4, 8", "Error",
        "Minutes", "Model's",
    ]  # fmt: skip
    return table([head, *map(_cells, found)])


def _cells(one: Held) -> list[str]:
    row = one.row
    return [
        row.device,
        f"{row.devices:,}",
        f"{row.device_batch_size:g}",
        number(row.sequences_per_second),
        *_beside(one.from_one, row, one.is_in_one),
        *(_beside(one.from_two, row, one.is_in_two) if one.from_two else (ABSENT, ABSENT)),
        f"{row.minutes:.2f}" if row.minutes else ABSENT,
        f"{one.minutes:.2f}" if one.minutes else ABSENT,
    ]


def _beside(rate: float, row: Row, is_fitted: bool) -> tuple[str, str]:
    error = rate / row.sequences_per_second - 1.0
    return number(rate), "fitted" if is_fitted else f"{error:+.0%}"


def to_json(one: Held) -> dict[str, object]:
    """The figures of one result."""
    row = one.row
    return {
        "device": row.device,
        "ranks": row.devices,
        "batch_a_rank": row.device_batch_size,
        "source": f"{row.origin}; {row.source}",
        "published_sequences/s": row.sequences_per_second,
        "fit_to_8_sequences/s": one.from_one,
        "fit_to_4_and_8_sequences/s": one.from_two,
        "is_in_fit_to_8": one.is_in_one,
        "is_in_fit_to_4_and_8": one.is_in_two,
        "published_minutes": row.minutes,
        "minutes": one.minutes,
    }
