"""What a rank's process does before it becomes a trainer: it registers and binds itself."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import NoReturn, TypedDict

from bert_pretraining.errors import UserError
from bert_pretraining.runtime import rank_reports
from bert_pretraining.runtime.parent import end_with_parent


class RankSetup(TypedDict):
    """How a rank is bound.

    prefix: the numactl command that the trainer's command is put behind; may be empty.
    cpus: the CPUs that the process keeps to; may be empty.
    threads: the value for OMP_NUM_THREADS; None leaves the user's value.
    """

    prefix: list[str]
    cpus: list[int]
    threads: int | None


SETUP_VARIABLE = "BERT_PRETRAINING_RANK_SETUP"
EXIT_ZERO_FLAG = "--exit_zero_without_target"


def trainer_command(command: str, flags: list[str]) -> list[str]:
    """The command line of `train` or `rank`, with this Python."""
    return [sys.executable, "-u", "-m", "bert_pretraining", command, *flags]


def run_rank(arguments: list[str]) -> NoReturn:
    """Become the bound trainer of this local rank: torchrun's agent runs this once for each."""
    if SETUP_VARIABLE not in os.environ:
        raise UserError("'rank' is a command of the launcher's own", "use launch, or train")
    setup = json.loads(os.environ[SETUP_VARIABLE])
    end_with_parent(setup["launcher"])
    if setup["one_stream"]:
        os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
    # Exec keeps the process id, so the launcher's signals reach the trainer.
    stopped_by = rank_reports.register(int(os.environ["RANK"]))
    if stopped_by is not None:
        signal.signal(stopped_by, signal.SIG_DFL)
        os.kill(os.getpid(), stopped_by)
    become_trainer(setup["ranks"][int(os.environ["LOCAL_RANK"])], arguments)


def become_trainer(setup: RankSetup, arguments: list[str]) -> NoReturn:
    """Bind this process, and replace it with the trainer."""
    if setup["threads"]:
        os.environ["OMP_NUM_THREADS"] = str(setup["threads"])
    if setup["cpus"]:
        os.sched_setaffinity(0, setup["cpus"])
    command = [*setup["prefix"], *trainer_command("train", arguments)]
    os.execvp(command[0], command)
