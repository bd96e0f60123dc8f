"""Tables of text, their columns aligned to the right, and sentences in lines.

Sentences fill lines of 100 characters, or those of a narrower terminal. A table of rows leaves out
columns there; other tables have the width that their cells need.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

from bert_pretraining.report.view import duration
from bert_pretraining.runtime import screen
from bert_pretraining.scaling.forecast import Row
from bert_pretraining.scaling.rank_parts import Sourced

COLUMNS, FEWEST = 100, 40  # of a line; in a narrower terminal than FEWEST, lines break
ABSENT = "-"
HEAD = (
    "Ranks", "Batch", "Global", "Step", "Compute", "Exchange", "Optim.", "Seq/s",
    "vs 1 rank", "vs machine", "GiB", "Target",
)  # fmt: skip
# Which columns a narrow terminal does without, the first one first.
SPARE = ("Compute", "Optim.", "Exchange", "Wait", "Global", "GiB", "vs machine", "Batch")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first row is the head; every column is as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def of_rows(rows: Sequence[Row], machine: float) -> str:
    """What each row gives. machine: sequences a second of a rank on one whole machine."""
    has_wait = any(row.step.waiting for row in rows)
    table = [_head(has_wait), *(_cells(row, machine, has_wait) for row in rows)]
    if not screen.is_watched(sys.stdout):
        return aligned(_with_short_head(table))
    return fitted(table, max(FEWEST, screen.columns(sys.stdout)))


def _with_short_head(table: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """The table, whose head has two lines: the last word of a name, and above it the others."""
    head, *rows = table
    above, _, last = zip(*(name.rpartition(" ") for name in head), strict=True)
    return [above, last, *rows]


def fitted(table: Sequence[Sequence[str]], width: int) -> str:
    """`aligned`, without as many columns of SPARE as it takes to be no wider; a line names them."""
    left_out: list[str] = []
    while True:
        kept = [at for at, name in enumerate(table[0]) if name not in left_out]
        found = aligned(_with_short_head([[row[at] for at in kept] for row in table]))
        spare = [name for name in SPARE if name in table[0] and name not in left_out]
        if max(map(len, found.splitlines())) <= width or not spare:
            break
        left_out.append(spare[0])
    if not left_out:
        return found
    told = f"(for a wider terminal: {', '.join(name for name in table[0] if name in left_out)})"
    return f"{found}\n{wrapped(told)}"


def _head(has_wait: bool) -> list[str]:
    at = HEAD.index("Exchange")
    return [*HEAD[:at], *(["Wait"] if has_wait else []), *HEAD[at:]]


def _cells(row: Row, machine: float, has_wait: bool) -> list[str]:
    step = row.step
    return [
        f"{row.ranks:,}",
        f"{row.batch:,}",
        f"{row.global_batch:,}",
        milliseconds(step.seconds),
        milliseconds(step.compute),
        *([f"{step.waiting / step.seconds:.1%}"] if has_wait else []),
        milliseconds(step.exposed + step.publish),
        milliseconds(step.optimizer),
        number(row.rate),
        f"{row.efficiency:.0%}",
        f"{row.rate / row.ranks / machine:.0%}",
        f"{row.memory.total / 2**30:.3g}",
        duration(row.run.seconds) if row.run else ABSENT,
    ]


def sources(entries: Sequence[tuple[str, str, str]]) -> str:
    """Name, value and source of each number that goes in; long sources are wrapped."""
    names = max(len(name) for name, _, _ in entries)
    values = max(len(value) for _, value, _ in entries)
    lines, above = [], ""
    for name, value, source in entries:
        told, above = "the same" if source == above else source, source
        first = f"  {name:<{names}}  {value:>{values}}  "
        rest = " " * len(first)
        width = max(columns(), len(first) + FEWEST // 2)
        lines.append(
            textwrap.fill(
                told, width, initial_indent=first, subsequent_indent=rest,
                break_on_hyphens=False, break_long_words=False,
            )
        )  # fmt: skip
    return "\n".join(lines)


def wrapped(text: str, indent: str = "") -> str:
    """A sentence in lines of at most `columns()`. indent: of the second and later ones."""
    return textwrap.fill(
        text, columns(), subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def columns() -> int:
    """Of a line: fewer than COLUMNS where people read it in a narrower terminal."""
    if not screen.is_watched(sys.stdout):
        return COLUMNS
    return max(FEWEST, min(COLUMNS, screen.columns(sys.stdout)))


def milliseconds(seconds: float) -> str:
    """As text: at most two digits after the point."""
    value = 1e3 * seconds
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def number(value: float) -> str:
    """With four digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def part(name: str, of: Sourced) -> tuple[str, str, str]:
    """An entry of `sources` for a part in seconds."""
    return name, f"{milliseconds(of.value)} ms", of.source
