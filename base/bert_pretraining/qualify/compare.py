"""`qualify compare A.json B.json ...`: every figure of some qualifications, and what changed.

The first is the one to compare with. Marked are: a rate that fell by 5% or more or a time that rose
as much, a judged figure that is missing or not finite, a kernel that is right no longer, a stage
that fails now, and fingerprints that differ on the same type of machine. `RULES` says which figures
are judged.

Machines, dates, drivers and versions may differ; other settings, and other stages, may not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from bert_pretraining import config as configuration
from bert_pretraining.errors import UserError
from bert_pretraining.qualify.record import (
    DAMAGES,
    FAIL,
    PASS,
    Qualification,
    StageResult,
    damaged,
    read,
)
from bert_pretraining.runtime import strict_json
from bert_pretraining.runtime.words import counted, plural

LIMIT = 0.05  # change of a rate or a time that is marked
RATE, TIME = "rate", "time"
# Patterns of figures' names -> what they are; the first that fits counts. A figure that none fits
# is shown, not judged.
RULES = (
    ("*other_programs*", None),
    ("*.sequences/s", RATE),
    ("*.evaluation_sequences/s", RATE),
    ("*.tokens/s", RATE),
    ("*.p_whole", RATE),
    ("*.p_train", RATE),
    ("*.p_core", RATE),
    ("*tflop/s*", RATE),
    ("limits.*gb/s*", RATE),
    ("*.step_seconds_median", TIME),
    ("limits.all_reduce.*.seconds", TIME),
    ("limits.all_reduce_latency_seconds", TIME),
    ("endurance.step_seconds_last_third", TIME),
    ("kernels.kernels.*.forward_backward_s", TIME),
)
# Figures measured at the batch size that was the best -> where that size stands. Times of a step at
# another size are not judged.
AT_BEST_SIZE = {
    "step.by_precision.": ("step", "best_batch_size"),
    "scaling.": ("scaling", "batch_size"),
    "endurance.": ("endurance", "batch_size"),
}
# Lists of points over time; two of them have no points in common.
NOT_COMPARED = ("endurance.points*", "endurance.sensors*", "learning.curve*")
MACHINE = ("device", "device_type", "cpu")  # of the same type, if these are equal
EXIT_MARKED = 1
TEXT = (
    "Compare qualifications: two machines, two dates, two drivers. Every figure with its change "
    "against the first file's. Exit code 1 if a rate fell by 5% or more, a time rose as much, a "
    "kernel was lost or a fingerprint changed; 2 for unlike runs; else 0."
)


@dataclass(frozen=True)
class Difference:
    """A figure in all files.

    values: one a file, None where it is missing. changes: of each against the first, as a share;
    None where it is no number. marks: one a file, what is wrong there, "" for nothing.
    """

    name: str
    values: list[object]
    changes: list[float | None]
    marks: list[str]


@dataclass
class Comparison:
    """What `compare` found. marked: a line for each mark. notes: what was not compared, and why."""

    figures: list[Difference]
    marked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Compare files, and print; return 1 if anything is marked, else 0."""
    parser = configuration.FlagParser(
        prog="python -m bert_pretraining qualify compare", allow_abbrev=False, description=TEXT
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="qualification.json, two or more")
    parser.add_argument(
        "--json", action="store_true", help="print the comparison as JSON (default: as text)"
    )
    values = parser.parse(arguments, intermixed=True)
    if len(values.files) < 2:
        raise UserError(
            f"compare needs two files or more, but there are {len(values.files)}",
            "pass a qualification.json for each qualification, the first to compare with",
        )
    done = [read(Path(name)) for name in values.files]
    try:
        require_alike(values.files, done)
        found = compare(values.files, done)
        text = describe(values.files, done, found)
    except DAMAGES as error:
        raise damaged(f"one of {', '.join(values.files)}", error) from error
    as_json = {"files": values.files, **asdict(found)}
    print(strict_json.dumps(as_json, indent=2) if values.json else text)
    return EXIT_MARKED if found.marked else 0


# ---- whether they may be compared


def require_alike(names: Sequence[str], done: Sequence[Qualification]) -> None:
    """UserError for a setting or a stage that one of them has otherwise than the first."""
    first = _conditions(done[0])
    for name, other in zip(names[1:], done[1:], strict=True):
        theirs = _conditions(other)
        for key in dict.fromkeys([*first, *theirs]):
            here, there = first.get(key, _text(None)), theirs.get(key, _text(None))
            if here != there:
                raise UserError(
                    f"unlike runs: {key} is {here} in {names[0]}, but {there} in {name}",
                    "qualify again with the same flags, and compare those",
                )


def _conditions(done: Qualification) -> dict[str, str]:
    """What must be equal, as text."""
    found = {f"setting {name}": _text(value) for name, value in sorted(done.settings.items())}
    found["the list of stages"] = ", ".join(stage.name for stage in done.stages)
    step = done.stage("step")
    if step is not None and "precision" in step.figures:
        found["the step's precision"] = str(step.figures["precision"])
    return found


# ---- the comparison


def compare(names: Sequence[str], done: Sequence[Qualification]) -> Comparison:
    """Compare qualifications with the first of them; they must be alike."""
    flat = [dict(flattened(one)) for one in done]
    found = Comparison([])
    moved = [_moved(done[0], one) for one in done]
    late = [tuple(f"{stage.name}." for stage in _not_judged(one)) for one in done]
    ordered = dict.fromkeys(name for one in flat for name in one)
    for name in ordered:
        values = [one.get(name) for one in flat]
        rule = rule_of(name)
        changes = [_change(values[0], value) for value in values]
        marks = [
            "" if rule == TIME and name.startswith(tuple(sizes)) else _mark(rule, values[0], *pair)
            for *pair, sizes in zip(values, changes, moved, strict=True)
        ]
        found.figures.append(Difference(name, values, changes, marks))
        for file, value, mark, stages in zip(names, values, marks, late, strict=True):
            if mark and not (value is None and name.startswith(stages)):  # told once, of the stage
                was, now = _number(values[0]), _number(value)
                found.marked.append(f"{file}: {name} {mark}: {now}, was {was}")
    found.notes += [
        f"{names[0]}: figures that its stage {stage.name} lacks, as it was not judged"
        for stage in _not_judged(done[0])
    ]
    for name, other, sizes in zip(names[1:], done[1:], moved[1:], strict=True):
        found.notes += [f"{name}: times of {which}*: {why}" for which, why in sizes.items()]
        found.marked += [f"{name}: {line}" for line in _lost(done[0], other)]
        marked, notes = _fingerprints(done[0], other)
        found.marked += [f"{name}: {line}" for line in marked]
        found.notes += [f"{name}: {line}" for line in notes]
    return found


def flattened(done: Qualification) -> Iterator[tuple[str, object]]:
    """STAGE.FIGURE... -> number, text or None; an entry of a list has its index as a name."""
    for stage in done.stages:
        yield f"{stage.name}.verdict", stage.verdict
        for name, value in _leaves(stage.name, stage.figures):
            if not any(fnmatchcase(name, pattern) for pattern in NOT_COMPARED):
                yield name, value


def _leaves(name: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(f"{name}.{index}", inner)
    else:
        yield name, value


def rule_of(name: str) -> str | None:
    """RATE or TIME for a figure that is judged; None for another."""
    return next((rule for pattern, rule in RULES if fnmatchcase(name, pattern)), None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _change(first: object, value: object) -> float | None:
    if not (_is_number(first) and _is_number(value)) or not first:
        return None
    return value / first - 1.0


def _mark(rule: str | None, first: object, value: object, change: float | None) -> str:
    """What is wrong with a figure; "" for nothing. The first file's own is never marked."""
    if rule is None or not _is_number(first):
        return ""
    if not _is_number(value):
        return "is not finite" if isinstance(value, float) else "is missing"
    worse = None if change is None else (-change if rule == RATE else change)
    if worse is not None and worse >= LIMIT - 1e-9:  # 95 of 100 is not rounded to less than 5%
        return f"{'fell' if rule == RATE else 'rose'} by {worse:.1%}"
    return ""


def _moved(first: Qualification, other: Qualification) -> dict[str, str]:
    """Beginning of figures' names of AT_BEST_SIZE -> what the other batch size is."""
    found = {}
    for beginning, (name, figure) in AT_BEST_SIZE.items():
        stages = first.stage(name), other.stage(name)
        was, now = (None if one is None else one.figures.get(figure) for one in stages)
        if None not in (was, now) and was != now:
            found[beginning] = (
                f"{counted(now, 'sequence')} a rank {plural(now, 'was')} the best, were {was}"
            )
    return found


def _not_judged(done: Qualification) -> list[StageResult]:
    """The stages that other programs made late, and whose last figures are missing for that."""
    return [stage for stage in done.stages if not stage.is_judged]


def _lost(first: Qualification, other: Qualification) -> Iterator[str]:
    """A line for each kernel that was right, and for each stage that did not fail."""
    before, after = _kernels(first), _kernels(other)
    late = [stage.name for stage in _not_judged(other)]
    for stage in _not_judged(other):
        yield f"the stage {stage.name} is {stage.reason}"
    for name, kernel in before.items():
        if kernel.get("verdict") != PASS:
            continue
        if name not in after and "kernels" not in late:
            yield f"the kernel {name} is lost: it is not there"
        elif name in after and after[name].get("verdict") != PASS:
            yield f"the kernel {name} is lost: {after[name].get('fault') or 'its proof failed'}"
    for stage in first.stages:
        now = other.stage(stage.name)
        if stage.verdict != FAIL and now is not None and now.verdict == FAIL:
            yield f"the stage {stage.name} fails: {now.reason}"


def _kernels(done: Qualification) -> Mapping[str, Mapping[str, object]]:
    stage = done.stage("kernels")
    return {} if stage is None else stage.figures.get("kernels", {})


def _fingerprints(first: Qualification, other: Qualification) -> tuple[list[str], list[str]]:
    """The lines that mark changed fingerprints, and those that say why none were compared."""
    before, after = ({} if one is None else one.figures for one in _determinism(first, other))
    if not before.get("fingerprints") or not after.get("fingerprints"):
        return [], []
    for name in MACHINE:
        if first.machine.get(name) != other.machine.get(name):
            return [], [
                f"fingerprints are not compared: {name} is {other.machine.get(name)}, was "
                f"{first.machine.get(name)}"
            ]
    if before.get("unsteady") or after.get("unsteady"):
        return [], ["fingerprints are not compared: kernels give other bits each time"]
    changed = [
        name
        for name, value in before["fingerprints"].items()
        if after["fingerprints"].get(name) != value
    ]
    if not changed:
        return [], []
    versions = [one.machine.get("versions", {}).get("torch") for one in (first, other)]
    why = "" if versions[0] == versions[1] else f"; torch is {versions[1]}, was {versions[0]}"
    return [f"the fingerprint of {', '.join(changed)} changed{why}"], []


def _determinism(*done: Qualification) -> list:
    return [one.stage("determinism") for one in done]


# ---- for people


def describe(names: Sequence[str], done: Sequence[Qualification], found: Comparison) -> str:
    """A table of all figures, and what is marked."""
    letters = [chr(ord("A") + index) if index < 26 else f"#{index}" for index in range(len(names))]
    lines = [
        f"{letter}  {name}: {one.machine.get('devices', 1)} x {one.machine.get('device')} on "
        f"{one.machine.get('host')}, {one.started}, "
        f"torch {one.machine.get('versions', {}).get('torch')}, verdict {one.verdict}"
        for letter, name, one in zip(letters, names, done, strict=True)
    ]
    rows = [["figure", letters[0], *(cell for one in letters[1:] for cell in (one, "change", ""))]]
    for figure in found.figures:
        if not _is_shown(figure):
            continue
        row = [figure.name, _number(figure.values[0])]
        for value, change, mark in zip(
            figure.values[1:], figure.changes[1:], figure.marks[1:], strict=True
        ):
            row += [_number(value), "" if change is None else f"{change:+.1%}", "!" if mark else ""]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines += ["", *table, ""]
    lines += [f"not compared: {note}" for note in found.notes]
    lines += [f"! {line}" for line in found.marked]
    count = len(found.marked)
    lines.append(f"Marked: {count}" if count else "Nothing is marked.")
    return "\n".join(lines)


def _is_shown(figure: Difference) -> bool:
    """All numbers; of texts those that differ."""
    if any(_is_number(value) for value in figure.values):
        return True
    return any(value != figure.values[0] for value in figure.values[1:])


def _number(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}"
    text = str(value)
    return text if len(text) <= 32 else text[:29] + "..."


def _text(value: object) -> str:
    return "by default" if value is None else json.dumps(value)
