"""Under a launcher that has started the ranks already: bind this one, and train."""

from __future__ import annotations

import dataclasses
import os
from typing import NoReturn

from bert_pretraining.config import Resolved
from bert_pretraining.launch.cluster import Placed, check_size
from bert_pretraining.launch.plan import DEFAULT_PORT, LaunchFlags, Plan
from bert_pretraining.launch.rank import become_trainer


def join(flags: LaunchFlags, resolved: Resolved, placed: Placed) -> LaunchFlags:
    """The flags with the machine's number and the address that the other launcher gives.

    UserError if it has started another number of ranks than the configuration wants.
    """
    check_size(placed, resolved.config.nnodes, resolved.config.nproc_per_node)
    node_rank = placed.rank // placed.local_world_size
    return dataclasses.replace(flags, node_rank=node_rank, master_addr=placed.master_addr)


def run_placed(plan: Plan, placed: Placed) -> NoReturn:
    """Become this rank's trainer; its exit code goes to the other launcher."""
    port = os.environ.get("MASTER_PORT") or plan.flags.master_port or DEFAULT_PORT
    os.environ.update(
        {
            **plan.environment,
            "RANK": str(placed.rank),
            "WORLD_SIZE": str(placed.world_size),
            "LOCAL_RANK": str(placed.local_rank),
            "LOCAL_WORLD_SIZE": str(placed.local_world_size),
            "MASTER_ADDR": plan.flags.master_addr,
            "MASTER_PORT": str(port),
        }
    )
    if placed.local_rank == 0:
        print(f"Started by {placed.launcher}: no launcher of its own\n{plan.table()}", flush=True)
    become_trainer(plan.place(placed.local_rank), plan.trainer_flags)
