"""The ranks of a measurement: one bound process each, as a launch starts them."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from bert_pretraining.config import Resolved
from bert_pretraining.errors import TrainingError
from bert_pretraining.launch import result
from bert_pretraining.launch.hang import HangDetector
from bert_pretraining.launch.network import LOCAL_ADDRESS
from bert_pretraining.launch.plan import LaunchFlags, Plan, make_plan
from bert_pretraining.launch.port import free_port
from bert_pretraining.launch.processes import RankProcesses
from bert_pretraining.qualify import kept
from bert_pretraining.qualify.context import Context
from bert_pretraining.runtime import arithmetic, process_group, rank_reports, rank_variables
from bert_pretraining.runtime.parent import end_with_parent
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.runtime.process_memory import says_no_memory

COMMAND = "qualify-worker"  # of this package's own; see __main__.py
CPUS_VARIABLE = "BERT_PRETRAINING_CPUS"  # of a rank: the CPUs that it keeps to

EXIT_NO_MEMORY = 12  # of a rank that got no memory; as ENOMEM

Worker = Callable[[Context, Ranks, Mapping[str, object]], dict[str, object]]


class TooLate(TrainingError):
    """The ranks did not end in time; the message names those that the others waited for."""


class NoMemory(TrainingError):
    """A rank got no memory for what it was to do; the message names the rank."""


def run_ranks(
    context: Context,
    program: str,
    ranks: int,
    given: Mapping[str, object],
    limit: float,
    environment: Mapping[str, str] | None = None,
    shares: int | None = None,
) -> list[dict[str, object]]:
    """Run `program` on so many ranks of this machine, and return what each rank's call returned.

    Args:
        program: "module:function" of bert_pretraining.qualify; the function is a `Worker`.
        given: its last argument, as JSON.
        limit: seconds.
        environment: further variables of the ranks.
        shares: the machine's CPUs are dealt out as for so many ranks (default: for these).

    Raises:
        NoMemory: a rank got no memory.
        TooLate: the ranks did not end in time.
        TrainingError: a rank failed; the message names the first. `kept.kept_of_ranks` has what
            the ranks kept.
    """
    plan = _plan(context, shares or ranks)
    folder = context.folder / "stages" / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kept.forget_ranks(context)
    files = [folder / f"{rank}.json" for rank in range(ranks)]
    context_file = folder / "context.json"
    context.write(context_file)
    port, processes = free_port(0), []
    try:
        for rank in range(ranks):
            setup = plan.rank_setup(rank)
            command = [*setup["prefix"], sys.executable, "-m", "bert_pretraining", COMMAND]
            words = [program, str(context_file), json.dumps(dict(given)), str(files[rank])]
            words.append(str(os.getpid()))
            variables = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": LOCAL_ADDRESS, "MASTER_PORT": port,
                rank_reports.FOLDER_VARIABLE: folder,
                CPUS_VARIABLE: ",".join(map(str, setup["cpus"])), **plan.environment,
            }  # fmt: skip
            if setup["threads"]:
                variables["OMP_NUM_THREADS"] = setup["threads"]
            own = {name: str(value) for name, value in variables.items()}
            processes.append(
                subprocess.Popen(
                    [*command, *words],
                    env={**rank_variables.environment_without_rank(), **own, **(environment or {})},
                )
            )
        _wait(processes, RankProcesses(folder), context.device == "cpu", limit)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _wait(
    processes: list[subprocess.Popen], ranks: RankProcesses, on_cpu: bool, limit: float
) -> None:
    """Wait for the end of all; raise for the first that fails, and for the end of time."""
    deadline = time.monotonic() + limit
    while any(process.poll() is None for process in processes):
        if any(process.poll() not in (None, 0) for process in processes):
            time.sleep(0.2)  # the others, whose connections it held, report after it
            break
        if time.monotonic() > deadline:
            late = [str(rank) for rank, one in enumerate(processes) if one.poll() is None]
            waited_for = HangDetector(ranks, 0.0, on_cpu, False).waited_for()
            why = "".join(f"; rank {rank} {what}" for rank, what in sorted(waited_for.items()))
            raise TooLate(f"rank {', '.join(late)} did not end within {limit:g} s{why}")
        time.sleep(0.02)
    codes = {rank: one.poll() for rank, one in enumerate(processes) if one.poll() not in (None, 0)}
    if codes:
        how = result.explain(ranks.folder, codes)
        message = how.message.removesuffix("; all ranks were ended")
        raise (NoMemory if how.exit_code == EXIT_NO_MEMORY else TrainingError)(message, how.detail)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory, of a device or of the machine."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and says_no_memory(str(error))
    )


def _plan(context: Context, ranks: int) -> Plan:
    """How a launch would start so many ranks on this machine."""
    config = dataclasses.replace(
        context.config, nnodes=1, nproc_per_node=ranks, device=context.device
    )
    return make_plan(Resolved(config, "", {"nnodes": "flag"}), LaunchFlags(), [])


def main(arguments: list[str]) -> int:
    """The command COMMAND: one rank."""
    program, context_file, given, found_file, parent = arguments
    end_with_parent(int(parent))
    cpus = os.environ.pop(CPUS_VARIABLE, "")
    if cpus:
        os.sched_setaffinity(0, [int(cpu) for cpu in cpus.split(",")])
    rank = int(os.environ["RANK"])
    rank_reports.register(rank)
    rank_reports.show_stacks_on_request()
    context = Context.read(Path(context_file))
    module, _, function = program.partition(":")
    work: Worker = getattr(importlib.import_module(f"bert_pretraining.qualify.{module}"), function)
    try:
        if context.config.deterministic:
            arithmetic.use_deterministic_operators(context.device)
        ranks = process_group.start(context.device, context.config.dist_backend)
        arithmetic.set_tf32(ranks.device, context.config.allow_tf32)
        found = work(context, ranks, json.loads(given))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.print_exc()
        message = f"no memory: {(str(error).splitlines() or [type(error).__name__])[0]}"
        rank_reports.record_failure(rank, EXIT_NO_MEMORY, message, traceback.format_exc())
        rank_reports.leave(EXIT_NO_MEMORY)
    Path(found_file).write_text(json.dumps(found), encoding="utf-8")
    process_group.stop()
    return 0
