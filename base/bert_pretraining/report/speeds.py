"""How fast runs were, and why: the table of speed, and what pictures of a step draw."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from bert_pretraining.logs.reading.runs import Run
from bert_pretraining.logs.sinks import PARTS, Speed

COLUMNS = (
    "Run", "Tokens/s", "TFLOP/s", "Matrix rate", "Share", "Peak memory", "p_whole", "p_train",
    "p_core", "Wait for data", "Slowest rank",
)  # fmt: skip
RIGHT_ALIGNED = frozenset(COLUMNS[1:])
CAPTION = (
    "Tokens without padding. TFLOP/s of the model's matrix products. Matrix rate: TFLOP/s of large "
    "products of matrices, measured on all ranks at once before training; share: how much of that "
    "rate the model's products reached. p_whole, p_train, p_core: sequences/s of the whole run, "
    "without evaluations, and without waiting for data, too. Wait for data: its share of a step. "
    "Slowest rank: how much longer its own work in a step takes than the median rank's. Of a run "
    "that has no end, the medians of its logged steps."
)


def speeds(run: Run) -> list[Speed]:
    """The figures of speed to summarize: of the whole run, or else of each logged step."""
    if run.speed is not None:
        return [run.speed]
    return [point.speed for point in run.training if point.speed is not None]


def has_speed(run: Run) -> bool:
    """Whether the log has any figure of the table of speed."""
    return bool(speeds(run)) or run.throughputs is not None


def typical(run: Run, figure: Callable[[Speed], float | None]) -> float | None:
    """One figure of a run, as the median where there are several; None where there is none."""
    known = [value for each in speeds(run) if (value := figure(each)) is not None]
    return statistics.median(known) if known else None


def part_seconds(run: Run) -> dict[str, float]:
    """The seconds of a step by PARTS; {} where the log does not have them."""
    found = {
        part: typical(run, lambda speed, part=part: speed.seconds and speed.seconds[part])
        for part in PARTS
    }
    return {} if None in found.values() else found


def has_ranks(run: Run) -> bool:
    """Whether the log compares several ranks."""
    ends = [(each.fastest, each.slowest) for each in speeds(run)]
    return any(fast and slow and fast.rank != slow.rank for fast, slow in ends)


def excess(speed: Speed) -> float | None:
    """How much longer the slowest rank's own work takes, as a share of the median rank's."""
    if speed.slowest is None or not speed.median_seconds:
        return None
    return speed.slowest.seconds / speed.median_seconds - 1


def slowest_rank(found: Sequence[Speed]) -> int | None:
    """The rank that was the slowest most often."""
    ranks = [each.slowest.rank for each in found if each.slowest]
    return statistics.mode(ranks) if ranks else None


def cells(run: Run) -> tuple[str, ...]:
    """One run's row, a cell for each of COLUMNS; "-" for what its log does not say."""
    peak = typical(run, lambda speed: speed.peak_memory)
    parts, rate = part_seconds(run), run.matrix_rate
    slow = typical(run, excess) if has_ranks(run) else None
    return (
        run.name,
        _rate(typical(run, lambda speed: speed.tokens_per_second)),
        _rate(typical(run, lambda speed: speed.flop_per_second / 1e12)),
        "-" if rate is None else f"{_rate(rate.flop_per_second / 1e12)} {rate.dtype}",
        _cell(typical(run, lambda speed: speed.matrix_share), ".1%"),
        "-" if peak is None else f"{peak / 2**30:.2f} GiB",
        *(_rate(value) for value in run.throughputs or (None, None, None)),
        _cell(parts["data"] / sum(parts.values()) if any(parts.values()) else None, ".1%"),
        "-" if slow is None else f"{slowest_rank(speeds(run))}: +{slow:.1%}",
    )


def _cell(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def _rate(value: float | None) -> str:
    """Whole numbers of a fast run, three digits of a slow one."""
    return _cell(value, ",.0f" if value is not None and value >= 100 else ".3g")


def table(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """The rows of the runs whose logs have such figures."""
    return [cells(run) for run in runs if has_speed(run)]
