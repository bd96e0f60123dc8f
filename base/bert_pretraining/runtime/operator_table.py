"""The costliest operators of some steps, as a text: what a profile says without a viewer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch.autograd import DeviceType

MOST_ROWS = 30
WIDEST_NAME = 64  # characters; names of kernels can be ten times as long
MARKED = 7  # the scope of what record_function marks: a range, no operator
STEP = "ProfilerStep*"  # torch.profiler's own range around each step


class Event(Protocol):
    """All calls of one name, as torch.profiler sums them up. Times in microseconds.

    self_...: without what is called inside.
    """

    key: str
    scope: int
    device_type: DeviceType
    count: int
    cpu_time_total: float
    self_cpu_time_total: float
    self_device_time_total: float


def operator_table(events: Sequence[Event], steps: range, what: str) -> str:
    """The ranges, the operators by host time and by device time, and the device's kernels.

    steps: their numbers. what: the rank and its device, in words. All figures are of one step, as
    the mean over the steps.
    """
    host = [event for event in events if event.device_type == DeviceType.CPU]
    marked = {event.key: event for event in host if event.scope == MARKED}
    operators = [event for event in host if event.scope != MARKED]
    kernels = [
        event for event in events if event.device_type != DeviceType.CPU and event.key not in marked
    ]
    count = len(steps)
    whole = marked[STEP].cpu_time_total if STEP in marked else 0.0
    on_device = sum(event.self_device_time_total for event in kernels)
    head = [
        f"Profile of {named(steps)}, {what}",
        f"{_ms(whole, count)} ms a step by the host's clock, the profiler's own time included",
    ]
    if kernels:
        busy = f", {on_device / whole:.1%} of the step" if whole else ""
        head.append(f"{_ms(on_device, count)} ms a step of work on the device{busy}")
    head.append("Every figure is of one step, as the mean over the steps; times in milliseconds.")
    parts = [
        _table(
            "Ranges by the host's clock; one inside another counts in both",
            ("range", "calls", "ms", "share", "outside of operators"),
            [
                (*_row(event, event.cpu_time_total, whole, count),
                 _ms(event.self_cpu_time_total, count))
                for event in _costliest(list(marked.values()), "cpu_time_total")
            ],
        ),
        _table(
            "Operators by the host's time, without what they call",
            ("operator", "calls", "ms", "share"),
            _rows(operators, "self_cpu_time_total", count),
        ),
    ]  # fmt: skip
    launching = [event for event in operators if event.self_device_time_total > 0]
    if launching:
        parts.append(
            _table(
                "Operators by the device's time, without what they call",
                ("operator", "calls", "ms", "share"),
                _rows(launching, "self_device_time_total", count),
            )
        )
    if kernels:
        parts.append(
            _table(
                "Kernels and copies by the device's time",
                ("kernel", "calls", "ms", "share"),
                _rows(kernels, "self_device_time_total", count),
            )
        )
    return "\n\n".join(["\n".join(head), *parts]) + "\n"


def named(steps: range) -> str:
    """ "steps 10 to 14", or "step 10"."""
    first, last = steps.start, steps.stop - 1
    return f"steps {first} to {last}" if last > first else f"step {first}"


def _costliest(events: Sequence[Event], by: str) -> list[Event]:
    return sorted(events, key=lambda event: -getattr(event, by))[:MOST_ROWS]


def _rows(events: Sequence[Event], by: str, steps: int) -> list[tuple[str, ...]]:
    """One for each of the costliest, and what the others take together."""
    shown = _costliest(events, by)
    whole = sum(getattr(event, by) for event in events)
    rows = [_row(event, getattr(event, by), whole, steps) for event in shown]
    rest = whole - sum(getattr(event, by) for event in shown)
    if len(events) > len(shown):
        share = f"{rest / whole:.1%}" if whole else "-"
        rows.append((f"{len(events) - len(shown)} others", "", _ms(rest, steps), share))
    rows.append(("all", "", _ms(whole, steps), "100.0%" if whole else "-"))
    return rows


def _row(event: Event, time: float, whole: float, steps: int) -> tuple[str, ...]:
    name = event.key if len(event.key) <= WIDEST_NAME else f"{event.key[: WIDEST_NAME - 3]}..."
    return (
        name,
        f"{event.count / steps:.1f}",
        _ms(time, steps),
        f"{time / whole:.1%}" if whole else "-",
    )


def _ms(microseconds: float, steps: int) -> str:
    """Milliseconds of one step."""
    return f"{microseconds / 1000 / steps:.3f}"


def _table(title: str, names: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    """A text table: the first column to the left, the others to the right."""
    lines = [tuple(names), *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(names))]
    text = [
        "  ".join(
            part.rjust(width) if place else part.ljust(width)
            for place, (part, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([title, "-" * len(title), *text])
