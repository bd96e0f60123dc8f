"""What a rank's process does before it becomes a trainer: bind itself, register itself."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import NoReturn, TypedDict

from bert_pretraining.runtime import rank_reports


class Place(TypedDict):
    """How a rank is bound: numactl's words or CPUs to keep to; threads, None for the user's."""

    prefix: list[str]
    cpus: list[int]
    threads: int | None


PLACES_VARIABLE = "BERT_PRETRAINING_PLACES"
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG in <sys/prctl.h>; it survives exec


def trainer_command(command: str, flags: list[str]) -> list[str]:
    """`train`, or `rank`, as a command line of this Python."""
    return [sys.executable, "-u", "-m", "bert_pretraining", command, *flags]


def run_rank(arguments: list[str]) -> NoReturn:
    """Become this local rank's bound trainer (torchrun starts one of these a rank)."""
    places = json.loads(os.environ[PLACES_VARIABLE])
    _end_with_the_launcher(places["launcher"])
    if places["one_stream"]:
        os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
    # Exec keeps the process id, so that signals find the trainer under it.
    stopped_by = rank_reports.register(int(os.environ["RANK"]))
    if stopped_by is not None:
        signal.signal(stopped_by, signal.SIG_DFL)
        os.kill(os.getpid(), stopped_by)
    become_trainer(places["ranks"][int(os.environ["LOCAL_RANK"])], arguments)


def become_trainer(place: Place, arguments: list[str]) -> NoReturn:
    """Bind this process, and exec the trainer in its place."""
    if place["threads"]:
        os.environ["OMP_NUM_THREADS"] = str(place["threads"])
    if place["cpus"]:
        os.sched_setaffinity(0, place["cpus"])
    command = [*place["prefix"], *trainer_command("train", arguments)]
    os.execvp(command[0], command)


def _end_with_the_launcher(launcher: int) -> None:
    """Ask Linux to end this rank when the launcher dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
    if os.getppid() != launcher:  # it died before the line above
        os._exit(1)
