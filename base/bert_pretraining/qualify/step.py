"""How fast is BERT-large?

Figures (rates are sums over the ranks, at the median step time):
    precision, layers, ranks            of the measured updates
    best_batch_size, sequences/s        of the batch size with the highest rate
    largest_batch_size                  that fitted into the memory, of those tried
    too_large_batch_size                the first that did not fit; missing if all did
    by_batch_size                       size -> figures of `Steps.figures` and `throughputs`,
                                        evaluation_sequences/s
    by_precision                        precision -> the same at the best size; not with --quick
    other_programs_cpus                 of the ranks' CPUs, used by others meanwhile

There is no loader of shards here: batches are ready in main memory. So p_core lacks only what the
device waited for their copies. The stage `learning` trains with a loader.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from bert_pretraining.errors import TrainingError
from bert_pretraining.kernels import DTYPES
from bert_pretraining.qualify import measuring, other_programs
from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.kept import keep_figures
from bert_pretraining.qualify.measuring import DIFFERENCE, Steps
from bert_pretraining.qualify.record import FAIL, NOTE, PASS, Finding
from bert_pretraining.qualify.stages import Tell, ranks_limit
from bert_pretraining.qualify.workers import NoMemory, TooLate, run_ranks
from bert_pretraining.qualify.workload import Workload
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.runtime.words import counted

PROGRAM = "step:measure"
NOTICE = "Notice: "  # begins a line of the run about what it does in another way
OF_EVALUATIONS = ("p_train", "p_whole", "p_core", "evaluation_sequences/s")  # of `measured`
TOLD = ("precision", "notices")  # of `measured`; they stand elsewhere
NO_TIME = "the stage's time was nearly over"
OTHER_PRECISIONS = ("bf16", "fp32")
LEAST_UPDATES = 5
SECONDS, QUICK_SECONDS = 10.0, 2.0
# Of the ranks' processes for one batch size: after it, a rank that hangs is looked for.
RANK_SECONDS, QUICK_CPU_RANK_SECONDS = 600.0, 120.0


def run(context: Context, tell: Tell) -> Finding:
    """Measure the update at each batch size, on all ranks."""
    figures: dict[str, object] = {"layers": context.layers, "ranks": context.ranks}
    notes: list[str] = []
    by_size: dict[str, dict[str, object]] = {}
    figures["by_batch_size"] = by_size
    used = []
    last_start = time.monotonic() + ranks_limit("step", context) - _rank_seconds(context)
    for size in sorted(context.batch_sizes):
        if by_size and time.monotonic() > last_start:
            notes.append(f"{counted(size, 'sequence')} a rank and more were not tried: {NO_TIME}")
            break
        tell(f"step: {counted(size, 'sequence')} a rank")
        try:
            found = measured(context, size)
        except NoMemory as error:
            figures["too_large_batch_size"] = size
            notes.append(f"{counted(size, 'sequence')} a rank do not fit into the memory ({error})")
            break
        except TrainingError as error:
            print(error.detail)
            reason = f"{counted(size, 'sequence')} a rank: {error}"
            return Finding(FAIL, reason, figures, notes, isinstance(error, TooLate))
        figures["precision"] = found.pop("precision")
        notes += [line for line in found.pop("notices", ()) if line not in notes]
        used.append(found.pop("other_programs_cpus"))
        by_size[str(size)] = found
        _add_best(figures)
        keep_figures(context, "step", figures, notes)
    if not by_size:
        return Finding(FAIL, f"{notes[0]}; pass a smaller --num_layers", figures)
    figures["other_programs_cpus"] = max((one for one in used if one is not None), default=None)
    if not context.quick and time.monotonic() > last_start:
        notes.append(f"other precisions were not tried: {NO_TIME}")
    elif not context.quick:
        best = figures["best_batch_size"]
        figures["by_precision"] = _other_precisions(context, best, figures, notes, tell)
    return _judged(context, figures, notes)


def _add_best(figures: dict) -> None:
    """The figures of the batch size with the highest rate, of those measured."""
    by_size = figures["by_batch_size"]
    best = max(by_size, key=lambda size: by_size[size]["sequences/s"])
    figures["best_batch_size"], figures["largest_batch_size"] = int(best), max(map(int, by_size))
    figures["sequences/s"] = by_size[best]["sequences/s"]


def _other_precisions(
    context: Context, size: int, figures: dict, notes: list[str], tell: Tell
) -> dict[str, dict[str, object]]:
    """The figures of the precisions that the run does not use, where the device has them."""
    found = {}
    for precision in OTHER_PRECISIONS:
        if precision == figures["precision"]:
            continue
        tell(f"step: {counted(size, 'sequence')} a rank in {precision}")
        try:
            one = measured(context, size, precision)
        except TrainingError as error:
            print(error.detail)
            notes.append(f"{precision} at {counted(size, 'sequence')} a rank: {error}")
            continue
        if one["precision"] == precision:
            found[precision] = {name: value for name, value in one.items() if name not in TOLD}
            keep_figures(context, "step", {**figures, "by_precision": found}, notes)
        else:
            notes.append(f"{precision}: this device does not compute in it")
    return found


def _judged(context: Context, figures: dict, notes: list[str]) -> Finding:
    best = figures["by_batch_size"][str(figures["best_batch_size"])]
    share = best.get("matrix_share")
    reason = (
        f"{best['sequences/s']:.4g} sequences/s at {figures['best_batch_size']} a rank, "
        f"{counted(context.ranks, 'rank')}, {figures['precision']}; "
        f"{best['tflop/s']:.3g} TFLOP/s"
        + (f", {share:.0%} of the measured matrix rate" if share else "")
    )
    faults = []
    for size, found in figures["by_batch_size"].items():
        at = f"at {size} a rank"
        faults += [f"{words} {at}" for words in slow_words(found)]
        if found["step_spread_share"] > DIFFERENCE:
            faults.append(f"step times spread by {found['step_spread_share']:.0%} {at}")
    busy = other_programs.busy_words(figures["other_programs_cpus"], context.ranks)
    if busy and (faults or context.device == "cpu"):
        faults.append(busy)
    if not faults:
        return Finding(PASS, reason, figures, notes)
    return Finding(NOTE, f"{reason}; {faults[0]}", figures, [*faults[1:], *notes])


def slow_words(found: Mapping) -> list[str]:
    """A line for each rank that is slower than the others. found: of `Steps.figures`."""
    return [
        f"rank {one.rank} is {one.share:.0%} slower than the others ({one.own:.3g} s of its own "
        f"work a step, they {one.others:.3g} s): look at its clocks, temperature and CPUs"
        for one in measuring.slow_ranks(found.get("rank_own_seconds", []))
    ]


def measured(
    context: Context,
    size: int,
    precision: str = "",
    ranks: int = 0,
    seconds: float = 0.0,
    least: int = LEAST_UPDATES,
    evaluates: bool = True,
) -> dict[str, object]:
    """Measure the update on so many ranks (default: all), and return its figures.

    Among them are "notices", lines that a run would print.

    precision: another one than the run's. seconds: at least, as are `least` updates. evaluates:
    whether to measure an evaluation too, and the figures of `throughputs`.

    Raises NoMemory, or TrainingError where a rank fails or hangs.
    """
    count = ranks or context.ranks
    given = {
        "size": size,
        "precision": precision,
        "seconds": seconds or (QUICK_SECONDS if context.quick else SECONDS),
        "least": least,
        "evaluations": (1 if context.quick else 3) if evaluates else 0,
    }
    limit = _rank_seconds(context)
    found = run_ranks(context, PROGRAM, count, given, limit, shares=context.ranks)
    steps = Steps.of([one["blocks"] for one in found])
    first, figures = found[0], {}
    if evaluates:
        rate = first["evaluation"]
        figures = {
            **measuring.throughputs(steps, count * size, rate), "evaluation_sequences/s": rate
        }  # fmt: skip
    return {
        "precision": first["precision"],
        "notices": first["notices"],
        **steps.figures(count * size, first["matrix_rate"]),
        **figures,
        "other_programs_cpus": other_programs.others_used([one["cpu_time"] for one in found]),
    }


def measure(context: Context, ranks: Ranks, given: Mapping[str, object]) -> dict[str, object]:
    """One rank's part: updates, timed, and an evaluation."""
    size, precision = given["size"], given["precision"]
    if precision and not _has(ranks, precision):
        precision = "fp32"
    work = Workload(context, ranks, size, **({"precision": precision} if precision else {}))
    cpu_time = other_programs.CpuTime()
    blocks = measuring.steady_blocks(work, ranks, given["seconds"], given["least"])
    passed = cpu_time.passed()
    rate, batches = work.training.matrix_rate, given["evaluations"]
    return {
        "precision": work.training.precision,
        "notices": [line for line in work.said if line.startswith(NOTICE)],
        "matrix_rate": rate and rate.flop_per_second,
        "blocks": measuring.as_json(blocks),
        "evaluation": measuring.evaluation_rate(work, ranks, size, batches) if batches else None,
        "cpu_time": passed,
    }


def _rank_seconds(context: Context) -> float:
    return QUICK_CPU_RANK_SECONDS if context.quick and context.device == "cpu" else RANK_SECONDS


def _has(ranks: Ranks, precision: str) -> bool:
    dtype = DTYPES[precision]
    emulated = precision == "bf16" and devices.emulates_bf16(ranks.device)
    return devices.supports(ranks.device, dtype) and not emulated


def best_batch_size(context: Context) -> int:
    """The best size that this qualification's stage `step` found; else the first to be tried."""
    best = _found(context).get("best_batch_size")
    return best if best in context.batch_sizes else context.batch_sizes[0]


def measured_before(context: Context, size: int) -> dict[str, object] | None:
    """The figures of training with this size in this qualification's stage `step`, by the names of
    `measured`; None where there are none. other_programs_cpus: of all sizes."""
    figures = _found(context)
    found = figures.get("by_batch_size", {}).get(str(size))
    if found is None:
        return None
    kept = {name: value for name, value in found.items() if name not in OF_EVALUATIONS}
    return {**kept, **{name: figures.get(name) for name in ("precision", "other_programs_cpus")}}


def _found(context: Context) -> dict:
    """The stage's figures in this qualification; {} where it has not run with this model on as
    many ranks."""
    file = context.folder / "stages" / "step.json"
    try:
        figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
        alike = (figures["layers"], figures["ranks"]) == (context.layers, context.ranks)
    except (OSError, ValueError, KeyError):
        return {}
    return figures if alike else {}
