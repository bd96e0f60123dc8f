"""What do more ranks give? 1, 2, 4 and so on, each with the same batch (weak scaling).

A rank has as many CPUs as when all ranks run. With --quick the figures of all ranks are those of
the stage `step`, where it has run, to save time. On a CPU the ranks share the memory's bandwidth,
and so the efficiency is lower there by nature.

Figures:
    batch_size          of a rank
    by_ranks            number of ranks -> sequences/s, efficiency (against as many times one rank),
                        seconds_reduction (of a step: what backward does not hide), and the other
                        figures of `Steps.figures`
    efficiency          of all ranks; missing with one
    other_programs_cpus     of the ranks' CPUs, used by others meanwhile
"""

from __future__ import annotations

from bert_pretraining.errors import TrainingError
from bert_pretraining.qualify import other_programs, step
from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.kept import keep_figures
from bert_pretraining.qualify.record import FAIL, NOTE, PASS, Finding
from bert_pretraining.qualify.stages import Tell
from bert_pretraining.qualify.workers import TooLate

LEAST, LEAST_ON_CPU = 0.80, 0.60  # efficiency below which there is something to look into
MOST = 1.10  # above it, the time of one rank is in doubt
QUICK_SECONDS, QUICK_UPDATES = 1.0, 3


def run(context: Context, tell: Tell) -> Finding:
    """Measure the update on 1, 2, 4 and so on of the ranks."""
    if context.ranks == 1:
        return Finding(PASS, "one device: nothing to scale")
    size = step.best_batch_size(context)
    by_ranks: dict[str, dict[str, object]] = {}
    figures: dict[str, object] = {"batch_size": size, "by_ranks": by_ranks}
    least = QUICK_UPDATES if context.quick else step.LEAST_UPDATES
    for count in counts(context.ranks):
        tell(f"scaling: {count} of {context.ranks} ranks")
        is_known = context.quick and count == context.ranks
        known = step.measured_before(context, size) if is_known else None
        try:
            found = known or step.measured(
                context, size, ranks=count, seconds=QUICK_SECONDS if context.quick else 0.0,
                least=least, evaluates=False,
            )  # fmt: skip
        except TrainingError as error:
            print(error.detail)
            reason = f"with {count} of {context.ranks} ranks: {error}"
            return Finding(FAIL, reason, figures, is_late=isinstance(error, TooLate))
        by_ranks[str(count)] = {n: value for n, value in found.items() if n != "notices"}
        _add_efficiencies(by_ranks)
        keep_figures(context, "scaling", figures)
    return judged(context, figures)


def counts(ranks: int) -> list[int]:
    """1, 2, 4, ... and all."""
    powers = [2**power for power in range(ranks.bit_length()) if 2**power < ranks]
    return [*powers, ranks]


def _add_efficiencies(by_ranks: dict[str, dict]) -> None:
    alone = by_ranks["1"]["sequences/s"]
    for count, found in by_ranks.items():
        found["efficiency"] = found["sequences/s"] / (int(count) * alone)


def judged(context: Context, figures: dict) -> Finding:
    """The verdict on the figures of all counts, to which the efficiencies are added."""
    by_ranks = figures["by_ranks"]
    _add_efficiencies(by_ranks)
    whole = by_ranks[str(context.ranks)]
    figures["efficiency"] = whole["efficiency"]
    used = [found["other_programs_cpus"] for found in by_ranks.values()]
    figures["other_programs_cpus"] = max((one for one in used if one is not None), default=None)
    told = ", ".join(f"{count}: {found['efficiency']:.0%}" for count, found in by_ranks.items())
    waited = whole.get("seconds_reduction")
    reason = f"{whole['sequences/s']:.4g} sequences/s on {context.ranks} ranks; efficiency {told}"
    if waited is not None:
        share = waited / whole["step_seconds_median"]
        reason += f"; {share:.0%} of a step waits for gradients of other ranks"
    faults = step.slow_words(whole)
    on_cpu = context.device == "cpu"
    least = LEAST_ON_CPU if on_cpu else LEAST
    for count, found in by_ranks.items():
        if found["efficiency"] < least:
            why = "look at the stage limits: all-reduce, and rates of all ranks at once"
            faults.append(
                f"{count} ranks give {found['efficiency']:.0%} of {count} times one rank, less "
                f"than {least:.0%}: {why}"
            )
    best = max(found["efficiency"] for found in by_ranks.values())
    if best > MOST:
        faults.append(f"an efficiency of {best:.0%}: the one rank alone was disturbed; try again")
    busy = other_programs.busy_words(figures["other_programs_cpus"], context.ranks)
    if busy and (faults or on_cpu):
        faults.append(busy)
    if not faults:
        return Finding(PASS, reason, figures)
    return Finding(NOTE, f"{reason}; {faults[0]}", figures, faults[1:])
