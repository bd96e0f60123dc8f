"""Bind and train one rank that another launcher has started."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import NoReturn

from bert_pretraining.config import Resolved
from bert_pretraining.launch.checks import check_loopback
from bert_pretraining.launch.cluster import ExternalRank, check_size
from bert_pretraining.launch.plan import DEFAULT_PORT, LaunchFlags, Plan
from bert_pretraining.launch.rank import EXIT_ZERO_FLAG, become_trainer
from bert_pretraining.runtime import rank_variables


def join(flags: LaunchFlags, resolved: Resolved, started: ExternalRank) -> LaunchFlags:
    """The flags, with the machine's number and what the other launcher says of where ranks meet.

    Raises UserError if it has started another number of ranks than the configuration wants, or if
    MASTER_PORT is no port.
    """
    check_size(started, resolved.config.nnodes, resolved.config.nproc_per_node)
    node_rank = started.rank // started.local_world_size
    port = rank_variables.port(os.environ) or flags.master_port or DEFAULT_PORT
    return dataclasses.replace(
        flags, node_rank=node_rank, master_addr=started.master_addr, master_port=port
    )


def run_external_rank(plan: Plan, started: ExternalRank) -> NoReturn:
    """Replace this process with its trainer, whose exit code goes to the other launcher."""
    os.environ.update(
        {
            **plan.environment,
            "RANK": str(started.rank),
            "WORLD_SIZE": str(started.world_size),
            "LOCAL_RANK": str(started.local_rank),
            "LOCAL_WORLD_SIZE": str(started.local_world_size),
            "MASTER_ADDR": plan.flags.master_addr,
            "MASTER_PORT": str(plan.flags.master_port),
        }
    )
    check_loopback(plan.flags.master_addr)
    if started.local_rank == 0:
        print(f"Started by {started.launcher}: no launcher of its own")
        plan.print_bindings(sys.stdout)
    flag = [EXIT_ZERO_FLAG] if plan.flags.exit_zero_without_target else []
    become_trainer(plan.rank_setup(started.local_rank), [*plan.trainer_flags, *flag])
