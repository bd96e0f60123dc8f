"""Does the same step give the same bits, again and on all ranks?

All ranks make the same few updates from the same weights, with the same sequences and dropout, in
several rounds. Everything that an update computes leaves a mark (`fingerprint.py`): weights,
outputs, losses, gradients. Marks must be equal in all rounds and on all ranks; the most frequent
ones count as right. Where they differ, the operators are repeated one by one
(`unsteady.py`). So three cases can be told apart: kernels that add in any order, which are named,
and the rounds are made once more with --deterministic; ranks that compute other bits than their
like; and a single update that differed, which no kernel explains: silent data corruption.

Figures: `rounds`, `steps`, `ranks`; `fingerprints`, step -> checksum of all of its marks, equal on
like machines with the same software; `loss`, `gradient_norm` of the last step; `unsteady`,
operator -> its first result that differs; `gradient_difference_share` and
`gradient_difference_bound` (see `unsteady.py`); `differences`, texts; `kernels`, lines;
`deterministic`, the same figures with --deterministic.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bert_pretraining.errors import TrainingError
from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.fingerprint import (
    OF_UPDATE,
    Mark,
    Marks,
    Start,
    add_weights,
    fingerprint,
)
from bert_pretraining.qualify.kept import keep_of_rank, kept_of_ranks
from bert_pretraining.qualify.record import FAIL, NOTE, PASS, Finding
from bert_pretraining.qualify.stages import Tell
from bert_pretraining.qualify.unsteady import gradient_difference, unsteady_operators
from bert_pretraining.qualify.workers import TooLate, run_ranks
from bert_pretraining.qualify.workload import Workload, made_up
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime import process_group
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.runtime.words import counted

SEED = 1
STEPS, QUICK_STEPS = 4, 1
ROUNDS = 5  # at least
QUICK_UPDATES = (
    3  # of each step, at least, over the rounds of all ranks: most of them must be right
)
MOST_SECONDS = 240.0  # of rounds
AGAIN_SECONDS = 30.0  # of the rounds with --deterministic
# For ranks to begin and to make the fewest rounds. On a device they prove and compile kernels too.
QUICK_START, START = 110.0, 200.0
KEPT = 4  # fingerprints of a step whose marks are kept
FP16_SCALE = 1024.0  # a dynamic scale would begin with updates that are skipped
END = "after the last step"


def run(context: Context, tell: Tell) -> Finding:
    """Compare rounds and ranks; where they differ, once more with --deterministic."""
    seconds = 0.0 if context.quick else min(60.0 * context.minutes, MOST_SECONDS)
    tell(f"determinism: the same steps again and again on {counted(context.ranks, 'rank')}")
    try:
        found = Found(run_rounds(context, seconds))
    except TrainingError as error:
        so_far, is_late = kept_of_ranks(context), isinstance(error, TooLate)
        if not so_far:
            return Finding(FAIL, f"the ranks cannot make a step: {error}", is_late=is_late)
        found = Found(so_far)
        known = found.finding(FAIL, f"the rounds fail: {error}; until then {found.told}")
        return dataclasses.replace(known, is_late=is_late and not found.differences)
    if not found.differences:
        return found.finding(PASS, f"equal bits in {found.extent}")
    if found.is_corruption:
        return found.finding(FAIL, f"{found.told}; {found.advice}")
    if found.is_beyond_rounding:
        why = "which rounding in any order does not explain"
        return found.finding(FAIL, f"{found.told}, {why}; {found.advice}")
    if context.config.deterministic:
        return found.finding(FAIL, f"{found.told}, though --deterministic was on; {found.advice}")
    tell("determinism: once more with --deterministic")
    config = dataclasses.replace(context.config, deterministic=True)
    try:
        other = dataclasses.replace(context, config=config)
        again = Found(run_rounds(other, min(seconds, AGAIN_SECONDS)))
    except TrainingError as error:
        text = f"{found.told}; --deterministic does not run here: {error}"
        return found.finding(NOTE, f"{text}; {found.advice}")
    figures = {"deterministic": again.figures()}
    if again.differences:
        text = f"{again.told}, though --deterministic was on; {again.advice}"
        return found.finding(FAIL, text, figures)
    text = f"{found.told}; with --deterministic the bits are equal: pass it where that matters"
    return found.finding(NOTE, text, figures)


def run_rounds(context: Context, seconds: float) -> list[dict[str, object]]:
    """What `measure` returned on each rank. seconds: of rounds, beyond those that must be."""
    given = {
        "batch_size": _batch_size(context),
        "steps": QUICK_STEPS if context.quick else STEPS,
        "rounds": _rounds(context),
        "seconds": seconds,
    }
    limit = seconds + (QUICK_START if context.quick and context.device == "cpu" else START)
    return run_ranks(context, "determinism:measure", context.ranks, given, limit)


def _batch_size(context: Context) -> int:
    if not context.quick:
        return context.batch_sizes[:2][-1]
    return 1 if context.device == "cpu" else context.batch_sizes[0]


def _rounds(context: Context) -> int:
    if context.quick and context.device == "cpu":
        return max(2, QUICK_UPDATES - context.ranks + 1)
    return ROUNDS


# ---- on a rank


def measure(context: Context, ranks: Ranks, given: Mapping[str, object]) -> dict[str, object]:
    """One rank's part: the rounds, and what explains a difference.

    Returns "rounds": of each round, each step's checksum; "marks": of each step, checksum -> marks,
    of a few checksums; "unsteady" and "gradient_difference", see `unsteady.py`; "like": what must
    be equal for two ranks to be alike; "said": what the run's parts are.
    """
    settings = {"loss_scale": context.config.loss_scale or FP16_SCALE}
    if context.config.resolved_precision != "fp16":
        settings = {}
    work = Workload(context, ranks, given["batch_size"], SEED, **settings)
    made = made_up(given["batch_size"], SEED, work.model, given["steps"])
    batches = [batch.to(ranks.device) for batch in made]
    start, record = Start(work), Record(len(batches))
    explained: dict[str, object] = {"unsteady": {}, "gradient_difference": None}
    described = {
        "like": [devices.name(ranks.device), torch.get_num_threads()], "said": work.said
    }  # fmt: skip
    deadline, rounds, is_over = time.monotonic() + given["seconds"], 0, False
    while rounds < given["rounds"] or not is_over:
        rounds += 1
        start.restore()
        for step, batch in enumerate(batches):
            record.add(step, fingerprint(work, batch, SEED + step))
        marks = Marks()
        add_weights(marks, work.training.module)
        record.add(len(batches), marks.read())
        keep_of_rank(context, ranks.rank, {**record.found(), **explained, **described})
        late = process_group.gather_rows([float(time.monotonic() > deadline)], ranks.device)
        is_over = any(row[0] for row in late)
    start.restore()
    differs = process_group.gather_rows([float(record.differs)], ranks.device)
    if any(row[0] for row in differs):
        explained["unsteady"] = unsteady_operators(work, batches[0], ranks.world_size)
        explained["gradient_difference"] = gradient_difference(work, batches[0])
    return {**record.found(), **explained, **described}


class Record:
    """One rank's fingerprints.

    rounds: of each round, each step's checksum. marks: of each step, checksum -> its marks.
    """

    def __init__(self, steps: int) -> None:
        self.rounds: list[list[str]] = []
        self.marks: list[dict[str, list[Mark]]] = [{} for _ in range(steps + 1)]

    def add(self, step: int, marks: list[Mark]) -> None:
        """Steps come in their order; the weights at the end of a round count as the last one."""
        if step == 0:
            self.rounds.append([])
        text = "\n".join(f"{mark.name} {mark.digest}" for mark in marks)
        checksum = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.rounds[-1].append(checksum)
        if len(self.marks[step]) < KEPT:
            self.marks[step].setdefault(checksum, marks)

    def found(self) -> dict[str, object]:
        """Its attributes, for `Found`."""
        return {"rounds": self.rounds, "marks": self.marks}

    @property
    def differs(self) -> bool:
        """Whether a round differs from the first."""
        return any(one != self.rounds[0] for one in self.rounds)


# ---- what the ranks found


@dataclass(frozen=True)
class Difference:
    """An update that differs from most others of its step.

    rank, round, step: counted from 0. place, name: of the first mark that differs. values: of this
    mark here, and in most others.
    """

    rank: int
    round: int
    step: int
    place: int
    name: str
    values: tuple[float | None, float | None] = (None, None)


class Found:
    """What the ranks' rounds show.

    Attributes:
        differences: the first one of each round and rank, that which arose first before others.
    """

    def __init__(self, ranks: Sequence[Mapping[str, object]]) -> None:
        self._ranks = ranks
        self._steps = len(ranks[0]["marks"])
        self._usual = [self._most_frequent(step) for step in range(self._steps)]
        found = [
            self._first(rank, number, checksums)
            for rank, one in enumerate(ranks)
            for number, checksums in enumerate(one["rounds"])
            if checksums != self._usual
        ]
        self.differences = sorted(found, key=lambda one: (one.step, one.place, one.round, one.rank))

    def _most_frequent(self, step: int) -> str:
        counts = Counter(row[step] for one in self._ranks for row in one["rounds"])
        return counts.most_common(1)[0][0]  # of equally frequent ones, the first: that of rank 0

    def _first(self, rank: int, number: int, checksums: list[str]) -> Difference:
        step = next(step for step in range(self._steps) if checksums[step] != self._usual[step])
        ours = self._marks(step, checksums[step])
        usual = self._marks(step, self._usual[step])
        for place, (mine, theirs) in enumerate(zip(ours, usual, strict=False)):
            if mine[:2] != theirs[:2]:
                return Difference(rank, number, step, place, mine[0], (mine[2], theirs[2]))
        # Its marks were not kept, because there were too many different ones.
        return Difference(rank, number, step, 10**6, "not known")

    def _marks(self, step: int, checksum: str) -> Sequence[Sequence]:
        kept = (one["marks"][step].get(checksum) for one in self._ranks)
        return next((marks for marks in kept if marks is not None), [])

    @property
    def num_rounds(self) -> int:
        return len(self._ranks[0]["rounds"])

    @property
    def extent(self) -> str:
        """How much was compared, for people."""
        steps = self._steps - 1
        told = f"{counted(self.num_rounds, 'round')} of {counted(steps, 'step')}"
        count = len(self._ranks)
        return f"{told} on {count} ranks" if count > 1 else told

    @property
    def unsteady(self) -> dict[str, str]:
        """Operator -> what differs, on any rank."""
        return {name: what for one in self._ranks for name, what in one["unsteady"].items()}

    @property
    def gradient_difference(self) -> float | None:
        shares = [one["gradient_difference"] for one in self._ranks if one["gradient_difference"]]
        return max((share["share_of_norm"] for share in shares), default=None)

    @property
    def gradient_bound(self) -> float | None:
        """That of the rank whose gradients differ most; it is the same on like ranks."""
        found = [one["gradient_difference"] for one in self._ranks if one["gradient_difference"]]
        worst = max(found, key=lambda one: one["share_of_norm"], default=None)
        return None if worst is None else worst["bound"]

    @property
    def is_beyond_rounding(self) -> bool:
        """Whether gradients differ by more than the order of sums explains."""
        return self.gradient_bound is not None and self.gradient_difference > self.gradient_bound

    @property
    def ranks_differ_always(self) -> list[int]:
        """The ranks that differ from rank 0 in every round, and never from themselves."""
        first = self._ranks[0]["rounds"]
        if any(row != one["rounds"][0] for one in self._ranks for row in one["rounds"]):
            return []
        return [rank for rank, one in enumerate(self._ranks) if one["rounds"][0] != first[0]]

    @property
    def is_corruption(self) -> bool:
        """Whether the order in which kernels add does not explain the differences.

        It explains them where an operator by itself differs; and where half of the updates or more
        differ, but only in what the ranks and the optimizer compute after the plain modules' marks.
        """
        if not self.differences:
            return False
        if self.ranks_differ_always:
            are_alike = len({tuple(one["like"]) for one in self._ranks}) == 1
            return are_alike and not self.unsteady
        if self._is_of_the_start:
            return True
        if self.unsteady:
            return False
        of_update = all(
            one.name.startswith((OF_UPDATE, "not known"))
            or one.step == self._steps - 1
            or (one.step > 0 and one.name.startswith("weight "))
            for one in self.differences
        )
        updates = self.num_rounds * len(self._ranks)
        return not (of_update and 2 * len(self.differences) >= updates)

    @property
    def _is_of_the_start(self) -> bool:
        """Whether a round began with other weights. They are copied, and no kernel adds there."""
        return any(one.step == 0 and one.name.startswith("weight ") for one in self.differences)

    @property
    def told(self) -> str:
        """What differs, where, and why if that is known."""
        if not self.differences:
            return f"equal bits in {self.extent}"
        if self.unsteady and not self.is_corruption:
            operators = ", ".join(f"{name} ({what})" for name, what in self.unsteady.items())
            told = f"{self.gradient_difference or 0.0:.1g} of their norms"
            if self.gradient_bound is not None:
                told += f" (bound {self.gradient_bound:.1g})"
            return (
                f"the bits of equal steps differ because of {operators}; gradients differ by at "
                f"most {told}"
            )
        apart = self.ranks_differ_always
        if apart:
            ranks = ", ".join(map(str, apart))
            return (
                f"rank{'s' if len(apart) > 1 else ''} {ranks} and rank 0 compute different bits in "
                f"every round: {self._where(self.differences[0])}"
            )
        return self._where(self.differences[0])

    def _where(self, one: Difference) -> str:
        step = END if one.step == self._steps - 1 else f"in step {one.step + 1}"
        values = ""
        if None not in one.values:
            values = f" ({one.values[0]:.9g} instead of {one.values[1]:.9g})"
        return (
            f"rank {one.rank} differs in round {one.round + 1} of {self.num_rounds} {step}: "
            f"first {one.name}{values}"
        )

    @property
    def advice(self) -> str:
        """What to try, as an order."""
        if self.unsteady and not self.is_corruption:
            return "choose another provider with --kernels.OPERATOR, or report it to the vendor"
        if self.ranks_differ_always and not self.is_corruption:
            return "the ranks' devices or thread numbers are not alike: give all ranks the same"
        return "do not train on that device before its memory and its cooling are tested"

    def figures(self) -> dict[str, object]:
        """See the module's docstring."""
        last = self._marks(self._steps - 2, self._usual[-2])
        values = {name: value for name, _, value in last}
        names = [f"step {step + 1}" for step in range(self._steps - 1)] + ["weights"]
        losses = [value for name, value in values.items() if name.startswith("loss ")]
        return {
            "rounds": self.num_rounds,
            "steps": self._steps - 1,
            "ranks": len(self._ranks),
            "fingerprints": dict(zip(names, self._usual, strict=True)),
            "loss": sum(losses),
            "gradient_norm": values.get(f"{OF_UPDATE}gradient norm"),
            "unsteady": self.unsteady,
            "gradient_difference_share": self.gradient_difference,
            "gradient_difference_bound": self.gradient_bound,
            "differences": [self._where(one) for one in self.differences[:20]],
            "kernels": [line for line in self._ranks[0]["said"] if "ernels" in line],
        }

    def finding(
        self, verdict: str, reason: str, more: Mapping[str, object] | None = None
    ) -> Finding:
        told_already = 0 if self.unsteady else 1
        notes = [self._where(one) for one in self.differences[told_already:5]]
        return Finding(verdict, reason, {**self.figures(), **(more or {})}, notes)
