"""The stages of a qualification, in their order."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.record import Finding

Tell = Callable[[str], None]  # is called with a line of progress

FOR_A_VERDICT = 20.0  # seconds


@dataclass(frozen=True)
class Stage:
    """name: its word on the command line and in files. asks: what it answers, one line. seconds:
    its time limit; quick_seconds: that of --quick on a CPU. Both are several times what an idle
    machine takes. On another device a first start proves and compiles kernels, with --quick too."""

    name: str
    asks: str
    seconds: float
    quick_seconds: float

    def limit(self, context: Context) -> float:
        """Seconds after which the stage is ended."""
        if context.quick and context.device == "cpu":
            return self.quick_seconds
        extra = 60 * context.minutes if self.name == "endurance" else 0.0
        return self.seconds + extra

    def run(self, context: Context, tell: Tell) -> Finding:
        """Run it in this process."""
        module = importlib.import_module(f"bert_pretraining.qualify.{self.name}")
        return module.run(context, tell)


def limit_of(name: str, context: Context) -> float:
    """Seconds after which the stage of this name is ended."""
    return next(stage for stage in STAGES if stage.name == name).limit(context)


def ranks_limit(name: str, context: Context) -> float:
    """Seconds for the ranks of a stage: some remain to find out which one hangs."""
    return limit_of(name, context) - FOR_A_VERDICT


STAGES = (
    Stage("machine", "Can a run start here?", 120, 40),
    Stage("software", "Is the software complete, and does it fit together?", 120, 40),
    Stage("kernels", "Does every kernel compute what it should?", 900, 300),
    Stage("determinism", "Does a step give the same bits, again and on all ranks?", 900, 300),
    Stage("limits", "What can the device, its memory and its links do?", 300, 150),
    Stage("step", "How fast is BERT-large?", 1800, 150),
    Stage("scaling", "What do more ranks give?", 1800, 180),
    Stage("endurance", "Does the speed last?", 300, 150),
    Stage("learning", "Does it learn?", 1200, 180),
)
