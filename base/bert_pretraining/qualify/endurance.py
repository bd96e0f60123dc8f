"""Does the speed last? Steady steps at the best batch size, for `--minutes`.

Figures:
    batch_size, updates, seconds
    sequences/s                     over all ranks, at the median of the points
    points                          [seconds since the start, seconds of a step], each the mean of
                                    about a second, or of one step or MOST_UNREAD steps; at most
                                    MOST_POINTS
    step_seconds_first_third, step_seconds_last_third   medians of the points
    drift_share                     how much longer a step takes in the last third; null if there
                                    are fewer than LEAST_POINTS
    slowest_step_seconds, slowest_at_seconds            the slowest point
    sensors                         of each device that can be read, see `Sensors.figures`
    other_programs_cpus             [first, middle, last third]: of the ranks' CPUs, used by others
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

from bert_pretraining.errors import TrainingError
from bert_pretraining.qualify import other_programs
from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.kept import keep_of_rank, kept_of_ranks
from bert_pretraining.qualify.measuring import Marks, measured_block
from bert_pretraining.qualify.other_programs import CpuTime
from bert_pretraining.qualify.record import FAIL, NOTE, PASS, Finding
from bert_pretraining.qualify.sensors import Sensors
from bert_pretraining.qualify.stages import Tell, ranks_limit
from bert_pretraining.qualify.step import best_batch_size
from bert_pretraining.qualify.workers import TooLate, run_ranks
from bert_pretraining.qualify.workload import Workload
from bert_pretraining.runtime import process_group
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.runtime.words import counted, plural

PROGRAM = "endurance:measure"
MOST_POINTS = 600
LEAST_POINTS = 6  # fewer tell nothing of a drift
MOST_TIMES = 4  # as long as was asked for, to get them
NOTED, FAILED = 0.05, 0.20  # drift of the step time
KEEP_SECONDS = 10.0  # between two times that what was found so far is kept
MOST_UNREAD = 50  # updates between two readings: their batches are kept until then


def run(context: Context, tell: Tell) -> Finding:
    """Train for the time that was asked for, on all ranks."""
    size, seconds = best_batch_size(context), 60.0 * context.minutes
    tell(
        f"endurance: {context.minutes:g} {plural(context.minutes, 'minute')} at "
        f"{counted(size, 'sequence')} a rank"
    )
    given = {"size": size, "seconds": seconds}
    try:
        found = run_ranks(context, PROGRAM, context.ranks, given, ranks_limit("endurance", context))
    except TrainingError as error:
        print(error.detail)
        so_far, is_late = kept_of_ranks(context), isinstance(error, TooLate)
        reason = f"the steps fail: {error}"
        if not so_far:
            return Finding(FAIL, reason, {"batch_size": size}, is_late=is_late)
        known = judged(context, size, so_far)
        reason, is_late = f"{reason}; until then {known.reason}", is_late and known.verdict != FAIL
        return Finding(FAIL, reason, known.figures, known.notes, is_late)
    return judged(context, size, found)


def measure(context: Context, ranks: Ranks, given: Mapping[str, object]) -> dict[str, object]:
    """One rank's part: updates until the time is over on a rank, and there are enough points."""
    seconds = given["seconds"]
    work = Workload(context, ranks, given["size"])
    marks = Marks(ranks.device)
    measured_block(work, marks, 1)
    warm = measured_block(work, marks, 1 if ranks.device.type == "cpu" else 3)
    rows = process_group.gather_rows([statistics.median(warm.seconds)], ranks.device)
    count = min(max(1, round(1.0 / max(row[0] for row in rows))), MOST_UNREAD)
    sensors = Sensors(ranks.device, ranks.is_main)
    points, cpu_times, cpu_time = [], [], CpuTime()
    started = time.perf_counter()
    sensors.read(0.0)
    passed, next_kept = 0.0, 0.0

    def found() -> dict[str, object]:
        return {
            "points": points,
            "updates": count * len(points),
            "cpu_times": cpu_times,
            "sensors": sensors.figures(),
            "unread": sensors.reason,
        }

    while passed < seconds or (len(points) < LEAST_POINTS and passed < MOST_TIMES * seconds):
        block = measured_block(work, marks, count)
        at = time.perf_counter() - started
        sensors.read(at)
        points.append([at, statistics.mean(block.seconds)])
        rows = process_group.gather_rows([at], ranks.device)
        passed = max(row[0] for row in rows)
        if len(cpu_times) < 3 and passed >= (len(cpu_times) + 1) * seconds / 3:
            cpu_times.append(cpu_time.passed())
            cpu_time = CpuTime()
        if at >= next_kept:
            next_kept = at + KEEP_SECONDS
            keep_of_rank(context, ranks.rank, found())
    return found()


def judged(context: Context, size: int, ranks: Sequence[Mapping]) -> Finding:
    """The verdict on what `measure` returned on each rank."""
    first = ranks[0]
    points = first["points"]
    early, late = thirds(points)
    drift = late / early - 1.0 if len(points) >= LEAST_POINTS else None
    slowest = max(points, key=lambda point: point[1])
    figures: dict[str, object] = {
        "batch_size": size,
        "updates": first["updates"],
        "seconds": points[-1][0],
        "sequences/s": context.ranks * size / statistics.median(one for _, one in points),
        "points": thinned(points, MOST_POINTS),
        "step_seconds_first_third": early,
        "step_seconds_last_third": late,
        "drift_share": drift,
        "slowest_step_seconds": slowest[1],
        "slowest_at_seconds": slowest[0],
        "sensors": [one for rank in ranks for one in rank["sensors"]],
        "other_programs_cpus": [
            other_programs.others_used(times)
            for times in zip(*(rank["cpu_times"] for rank in ranks), strict=False)
        ],
    }
    told = "too few to tell of a drift" if drift is None else f"{drift:+.1%}"
    reason = (
        f"{first['updates']} steps in {points[-1][0]:.0f} s; a step takes {early:.4g} s at first "
        f"and {late:.4g} s at last ({told}); the slowest {slowest[1]:.4g} s after "
        f"{slowest[0]:.0f} s"
    )
    hottest = [one["temperature_celsius_max"] for one in figures["sensors"] if _has_heat(one)]
    reason += f"; at most {max(hottest)} degrees Celsius" if hottest else ""
    notes = list(dict.fromkeys(f"not read: {rank['unread']}" for rank in ranks if rank["unread"]))
    verdict, faults = _faults(context, drift, figures)
    if faults:
        reason += f"; {faults[0]}"
    return Finding(verdict, reason, figures, [*faults[1:], *notes])


def _has_heat(sensor: Mapping) -> bool:
    return "temperature_celsius_max" in sensor


def _faults(context: Context, drift: float | None, figures: Mapping) -> tuple[str, list[str]]:
    """The verdict, and what is wrong."""
    known = [used for used in figures["other_programs_cpus"] if used is not None]
    busy = other_programs.busy_words(max(known, default=None), context.ranks)
    verdict, faults, drift = PASS, [], drift or 0.0
    if drift > FAILED and not (busy and context.device == "cpu"):
        verdict = FAIL
    if abs(drift) > NOTED:
        faults.append(
            "steps get slower: look at temperature, clocks and cooling"
            if drift > 0
            else "steps get faster: something else had the device at first; try again"
        )
    for one in figures["sensors"]:
        faults += [
            f"{one['device']} was slowed down by {reason} in {share:.0%} of the readings"
            for reason, share in one["throttled"].items()
        ]
    broken, worn = memory_faults(figures["sensors"])
    faults = [*broken, *faults, *worn]
    if broken:
        verdict = FAIL
    if busy and context.device == "cpu":
        faults.insert(0, busy)  # the likely cause
    elif busy and faults:
        faults.append(busy)
    return (NOTE if faults and verdict == PASS else verdict), faults


def memory_faults(sensors: Sequence[Mapping]) -> tuple[list[str], list[str]]:
    """What ECC found in the devices' memories meanwhile: what is a fail, and what is a note."""
    broken, worn = [], []
    for one in sensors:
        errors, device = one.get("memory_errors", {}), one["device"]
        if errors.get("uncorrected"):
            broken.append(
                f"{device} had {_number(errors, 'uncorrected')} meanwhile: "
                "do not train on it; reset it, and replace it if they come again"
            )
        if errors.get("remap_failed"):
            broken.append(f"{device} has no spare rows left for those that are bad: replace it")
        if errors.get("uncorrected_before"):
            worn.append(
                f"{device} had {_number(errors, 'uncorrected_before')} since its driver was loaded"
            )
        if errors.get("corrected"):
            worn.append(
                f"{device} had {_number(errors, 'corrected')} meanwhile: they do no harm, unless "
                "they become many"
            )
        if errors.get("rows_pending"):
            worn.append(
                f"{device} has bad memory that a reset takes out of use: reset it while nothing "
                "runs there"
            )
    return broken, worn


def _number(errors: Mapping, name: str) -> str:
    """ "1 uncorrected memory error (ECC), before" """
    kind, _, when = name.partition("_")
    count = errors[name]
    words = f"{counted(count, f'{kind} memory error')} (ECC)"
    return f"{words} {when}," if when else words


def thirds(points: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The median step time of the first and of the last third of the time, in seconds."""
    whole = points[-1][0]
    early = [seconds for at, seconds in points if at <= whole / 3] or [points[0][1]]
    late = [seconds for at, seconds in points if at > 2 * whole / 3]
    return statistics.median(early), statistics.median(late)


def thinned(points: Sequence[Sequence[float]], most: int) -> list[list[float]]:
    """At most `most` points: means of neighbours. The times are those of the last of each."""
    step = -(-len(points) // most)
    groups = [points[start : start + step] for start in range(0, len(points), step)]
    return [[group[-1][0], statistics.mean(one for _, one in group)] for group in groups]
