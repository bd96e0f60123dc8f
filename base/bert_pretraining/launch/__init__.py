"""`launch`: from flags to one bound trainer process a rank.

`plan` decides everything and starts nothing. `supervise` starts the ranks with torchrun's agent
and watches them; `rank` is what each process does before it becomes a trainer; `result` says why
an attempt failed. `cluster` reads the cluster environment. Where another launcher has started the
ranks already, `external` takes the place of `supervise`. `cpu_instead` refuses a run that would
leave an accelerator unused.
"""

from bert_pretraining.launch.cluster import ExternalRank, external_rank
from bert_pretraining.launch.external import join, run_external_rank
from bert_pretraining.launch.plan import (
    EXIT_ZERO_HELP,
    STARTED_VARIABLE,
    LaunchFlags,
    Plan,
    add_launch_flags,
    describe,
    make_plan,
    split_flags,
)
from bert_pretraining.launch.rank import EXIT_ZERO_FLAG, run_rank
from bert_pretraining.launch.supervise import run

__all__ = [
    "EXIT_ZERO_FLAG",
    "EXIT_ZERO_HELP",
    "STARTED_VARIABLE",
    "ExternalRank",
    "LaunchFlags",
    "Plan",
    "add_launch_flags",
    "describe",
    "external_rank",
    "join",
    "make_plan",
    "run",
    "run_external_rank",
    "run_rank",
    "split_flags",
]
