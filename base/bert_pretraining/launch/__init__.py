"""`launch`: flags -> ranks and their CPUs -> torchrun -> one trainer a rank.

`plan` decides everything, `supervise` runs it, `rank` is what each process does before it
becomes a trainer, `report` says why a launch failed. Where another launcher has started the
ranks (`surroundings` tells), `joined` takes the place of `supervise`.
"""

from bert_pretraining.launch.cluster import placed_rank
from bert_pretraining.launch.joined import join, run_placed
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
    "join",
    "make_plan",
    "placed_rank",
    "run",
    "run_placed",
    "run_rank",
    "split_flags",
]
