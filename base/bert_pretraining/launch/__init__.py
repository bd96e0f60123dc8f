"""`launch`: flags -> ranks and their CPUs -> torchrun -> one trainer a rank.

`plan` decides everything, `supervise` runs it, `rank` is what each process does before it
becomes a trainer, `report` says why a launch failed.
"""

from bert_pretraining.launch.plan import (
    LaunchFlags,
    Plan,
    add_launch_flags,
    describe,
    make_plan,
    split_flags,
)
from bert_pretraining.launch.rank import run_rank
from bert_pretraining.launch.supervise import run

__all__ = [
    "LaunchFlags",
    "Plan",
    "add_launch_flags",
    "describe",
    "make_plan",
    "run",
    "run_rank",
    "split_flags",
]
