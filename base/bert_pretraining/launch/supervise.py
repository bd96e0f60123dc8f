"""Run a plan: start the ranks, pass signals on, notice failures and hangs, restart.

The launcher's main thread only watches; torchrun's agent starts the ranks in a thread.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bert_pretraining.errors import (
    EXIT_CONVERGED,
    EXIT_NOT_CONVERGED,
    EXIT_STOPPED,
    EXIT_USAGE,
    UserError,
)
from bert_pretraining.launch import hang, network
from bert_pretraining.launch.plan import DEFAULT_PORT, Plan
from bert_pretraining.launch.port import free_port
from bert_pretraining.launch.processes import RankProcesses
from bert_pretraining.launch.rank import PLACES_VARIABLE
from bert_pretraining.launch.report import Ending, explain
from bert_pretraining.runtime import consistency, rank_reports

if TYPE_CHECKING:
    from bert_pretraining.launch.rendezvous import Neighbours

FINISHED = (EXIT_CONVERGED, EXIT_NOT_CONVERGED, EXIT_STOPPED)
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LOOK_EVERY = 0.1  # seconds between two looks at the ranks
# How long the others may take to end after one has failed, before they are killed. A rank
# that waits in a collective operation never comes to handle the SIGTERM that torchrun sends.
SECONDS_TO_END = 5.0
SECONDS_TO_TELL = 10.0  # how long a machine that cannot even start waits to tell the others
NOTICE_AFTER = 10.0  # seconds of waiting for other machines
# `timeout` and srun signal a process and its group: the same signal within this time is one.
SECONDS_OF_ONE_SIGNAL = 1.0


def run(plan: Plan, check: Callable[[], None] = lambda: None) -> int:
    """Start the ranks, wait for them, and return what they earned.

    check: raises UserError for what would stop every rank of this machine. Returns 128 + the
    signal's number where a signal ended them.
    """
    several = plan.resolved.config.nnodes > 1
    if several:
        _check_address(plan)
        os.environ.update(plan.environment)  # before torch, which reads its log level at once
    fault = _fault(plan, check)
    if fault is not None and not several:
        raise fault
    with _collected_signals() as received:
        for attempt in range(plan.flags.max_restarts + 1):
            port = _master_port(plan, attempt)
            log_paths = _log_paths(plan) if fault is None else {}
            if attempt == 0 and fault is None:
                print(plan.table(), flush=True)
            with tempfile.TemporaryDirectory(prefix="bert_pretraining_") as folder:
                job = _Attempt(plan, Path(folder), log_paths, received, attempt)
                ending = job.run(port) if fault is None else job.refuse(port, fault)
            if ending.message:
                print(ending.text(log_paths), file=sys.stderr, flush=True)
            if not ending.may_restart or attempt == plan.flags.max_restarts:
                break
            print(f"Restart {attempt + 1} of {plan.flags.max_restarts}", file=sys.stderr)
    return ending.exit_code


class _Attempt:
    """One start of all ranks of this machine, and the watch over them."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        log_paths: dict[int, Path],
        received: collections.deque[tuple[int, float]],
        attempt: int,
    ) -> None:
        self._plan = plan
        self._attempt = attempt
        self._folder = folder
        self._log_paths = log_paths
        self._received = received
        self._ranks = RankProcesses(folder)
        self._watch = hang.Watch(self._ranks, plan.flags.hang_timeout)
        self._stopped_by: int | None = None  # the signal that was passed on
        self._signalled_at = 0.0
        self._failed_at: float | None = None
        self._killed: frozenset[int] = frozenset()
        self._verdict: Ending | None = None  # what this launcher ended the ranks for
        self._neighbours: Neighbours | None = None
        self._killed_at: float | None = None
        self._notice_at = 0.0

    def run(self, port: int) -> Ending:
        """Until all ranks have ended. port: where they meet, on machine 0."""
        self._meet_neighbours(port)
        while not self._all_are_here():
            time.sleep(LOOK_EVERY)
            self._pass_signals_on()
            self._judge(time.monotonic())
        if self._verdict is not None:
            return self._tell_neighbours(self._verdict)

        from bert_pretraining.launch.agent import Agent

        agent = Agent(self._plan, port, self._folder, self._log_paths)
        with _environment(self._variables()):
            agent.start()
            while agent.is_alive() and not self._gave_up():
                agent.join(LOOK_EVERY)
                self._pass_signals_on()
                self._end_what_is_left()
                self._judge(time.monotonic())
        if agent.exit_codes:
            self._ranks.kill()  # what a failed rank had started
        ending = self._tell_neighbours(self._ending(agent.exit_codes, agent.error))
        # torchrun's store listens at the master port until it is collected.
        del agent
        gc.collect()
        return ending

    def refuse(self, port: int, fault: UserError) -> Ending:
        """Start nothing, and tell the other machines why."""
        self._meet_neighbours(port)
        if self._neighbours is not None:
            self._neighbours.wait_for_all(SECONDS_TO_TELL)
        return self._tell_neighbours(Ending(EXIT_USAGE, str(fault)))

    def _meet_neighbours(self, port: int) -> None:
        flags, config = self._plan.flags, self._plan.resolved.config
        if config.nnodes == 1:
            return
        from bert_pretraining.launch.rendezvous import Meeting, Neighbours

        timeout = flags.rendezvous_timeout
        meeting = Meeting(
            flags.master_addr, port, flags.node_rank, config.nnodes, self._attempt, timeout
        )
        self._neighbours = Neighbours(meeting, consistency.describe(dataclasses.asdict(config)))
        self._neighbours.start()
        self._notice_at = time.monotonic() + NOTICE_AFTER

    def _all_are_here(self) -> bool:
        """Whether the ranks may start, or never will."""
        if self._neighbours is None or self._neighbours.met or self._verdict is not None:
            return True
        if time.monotonic() > self._notice_at:
            self._notice_at = float("inf")
            print(f"Waiting for {self._neighbours.awaited()}", file=sys.stderr, flush=True)
        return False

    def _variables(self) -> dict[str, str]:
        plan = self._plan
        ranks = [plan.place(local_rank) for local_rank in range(len(plan.bindings))]
        places = {"launcher": os.getpid(), "one_stream": bool(self._log_paths), "ranks": ranks}
        return {
            **plan.environment,
            rank_reports.FOLDER_VARIABLE: str(self._folder),
            rank_reports.ATTEMPT_VARIABLE: str(self._attempt),
            PLACES_VARIABLE: json.dumps(places),
        }

    def _pass_signals_on(self) -> None:
        while self._received:
            signum, at = self._received.popleft()
            if self._stopped_by is None:
                self._stopped_by, self._signalled_at = signum, at
                # SIGHUP, the terminal is gone, is no signal that trainers know.
                passed = signal.SIGTERM if signum == signal.SIGHUP else signum
                rank_reports.ask_to_stop(self._folder, passed)
                self._ranks.send(passed)
                if not rank_reports.read_processes(self._folder):
                    self._leave(signum)
            elif signum != self._stopped_by or at - self._signalled_at > SECONDS_OF_ONE_SIGNAL:
                self._kill()
                self._leave(signum)

    def _leave(self, signum: int) -> None:
        """End this process, whose thread may wait for other machines for minutes.

        Ranks that are just being started end with it, see `rank`.
        """
        print(_ended_by(signum), file=sys.stderr, flush=True)
        sys.stdout.flush()
        if self._neighbours is not None:
            told = Ending(128 + signum, _ended_by(signum), by_signal=True)
            self._neighbours.conclude(False, told)
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(128 + signum)

    def _end_what_is_left(self) -> None:
        """Kill the ranks that outlive a failed one for too long."""
        now = time.monotonic()
        if self._failed_at is None and self._ranks.one_has_failed():
            self._failed_at = now
        if self._failed_at is not None and now - self._failed_at > SECONDS_TO_END:
            self._kill()

    def _judge(self, now: float) -> None:
        """End ranks that hang, and those of a job that has ended on another machine."""
        if self._verdict is not None or self._failed_at is not None:
            return
        self._verdict = self._watch.look(now)
        if self._verdict is None and self._neighbours is not None:
            self._verdict = self._neighbours.fault(now)
        if self._verdict is not None:
            self._kill()
            self._killed_at = now

    def _gave_up(self) -> bool:
        """torchrun's agent may wait for machines that are gone, long after its ranks ended."""
        return self._killed_at is not None and time.monotonic() - self._killed_at > SECONDS_TO_END

    def _tell_neighbours(self, ending: Ending) -> Ending:
        """The ending, with the first cause of all where that is on another machine."""
        if self._neighbours is None:
            return ending
        if ending.node is not None:
            self._neighbours.linger()
        elif ending.exit_code not in FINISHED:
            told = (
                ending
                if ending.message
                else Ending(ending.exit_code, _ended_by(ending.exit_code - 128))
            )
            # A traceback may be of a connection that another machine's end has cut.
            first = self._neighbours.conclude(bool(ending.detail), told)
            if first is not None and ending is not self._verdict:
                here = f"Error here: {ending.message}\n" if ending.message else ""
                ending = dataclasses.replace(first, detail=f"{ending.detail}{here}")
        self._neighbours.close(finished=ending.exit_code in FINISHED)
        return ending

    def _kill(self) -> None:
        self._killed |= self._ranks.living().keys()
        self._ranks.kill()

    def _ending(self, exit_codes: dict[int, int], error: Exception | None) -> Ending:
        if self._verdict is not None:
            return self._verdict
        if error is not None:
            raise error
        if exit_codes and self._stopped_by is not None:
            # Ranks that do not handle the signal end by it, each in its own way.
            passed = signal.SIGTERM if self._stopped_by == signal.SIGHUP else self._stopped_by
            if not {-passed, 128 + passed}.isdisjoint(exit_codes.values()):
                print(_ended_by(self._stopped_by), file=sys.stderr, flush=True)
                return Ending(128 + self._stopped_by, by_signal=True)
        if exit_codes:
            return explain(self._folder, exit_codes, self._killed)
        earned = rank_reports.read_finish(self._folder)
        if earned is None:
            raise RuntimeError("the ranks ended without saying how")
        return Ending(earned)


def _ended_by(signum: int) -> str:
    return f"Ended by {signal.Signals(signum).name}"


@contextlib.contextmanager
def _collected_signals() -> Iterator[collections.deque[tuple[int, float]]]:
    """The signals that this process gets meanwhile, each with its time (monotonic, s).

    One that is ignored (as nohup has SIGHUP ignored) stays so.
    """
    received: collections.deque[tuple[int, float]] = collections.deque()
    before = {}
    for signum in PASSED_ON:
        if signal.getsignal(signum) != signal.SIG_IGN:
            before[signum] = signal.signal(
                signum, lambda number, _: received.append((number, time.monotonic()))
            )
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables for the ranks; this process is none, its errors go to the terminal."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in (rank_reports.FOLDER_VARIABLE, rank_reports.ATTEMPT_VARIABLE, PLACES_VARIABLE):
            del os.environ[name]


def _check_address(plan: Plan) -> None:
    """UserError if the name of machine 0 is not known here."""
    address = plan.flags.master_addr
    if not network.is_known(address):
        raise UserError(
            f"--master_addr {address}: this machine ({os.uname().nodename}) does not know that "
            "name; pass machine 0's address ('ip addr' or 'hostname -I' there)"
        )
    if plan.flags.node_rank == 0 and not network.is_here(address):
        print(
            f"Notice: --master_addr {address} is no address of this machine "
            f"({os.uname().nodename}), which is --node_rank 0",
            file=sys.stderr,
        )


def _fault(plan: Plan, check: Callable[[], None]) -> UserError | None:
    """Why no rank of this machine could train."""
    try:
        check()
        _check_gpus(plan)
    except UserError as error:
        return error
    return None


def _check_gpus(plan: Plan) -> None:
    """UserError if there are GPUs to train on, but fewer than ranks."""
    import torch

    settings = plan.resolved.config
    wanted = settings.nproc_per_node
    found = 0 if settings.device == "cpu" else torch.cuda.device_count()
    if 0 < found < wanted:
        raise UserError(
            f"--config {settings.config} wants {wanted} GPUs, and this machine has {found}: pass "
            f"--nproc_per_node {found}, with --gradient_accumulation_steps "
            f"{settings.gradient_accumulation_steps * -(-wanted // found)} to keep the update's "
            "size, or --device cpu"
        )


def _log_paths(plan: Plan) -> dict[int, Path]:
    """Rank -> a file in --log_dir that does not exist yet; nothing without --log_dir."""
    if not plan.flags.log_dir:
        return {}
    directory = Path(plan.flags.log_dir).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --log_dir {directory} ({error.strerror})") from error
    ranks = range(plan.first_rank, plan.first_rank + len(plan.bindings))
    # Logs of an earlier run or attempt stay: rank_0.log, rank_0.1.log, rank_0.2.log, ...
    number = 0
    while True:
        middle = f".{number}" if number else ""
        paths = {rank: directory / f"rank_{rank}{middle}.log" for rank in ranks}
        if not any(path.exists() for path in paths.values()):
            return paths
        number += 1


def _master_port(plan: Plan, attempt: int) -> int:
    """A port that is free here, or on machine 0 if that is another one.

    Of several machines each restart takes the next port: at the last one's, a machine that
    is quick would still meet the attempt that has failed.
    """
    flags = plan.flags
    if plan.resolved.config.nnodes == 1:
        return free_port(flags.master_port or 0)
    wanted = (flags.master_port or DEFAULT_PORT) + attempt
    return free_port(wanted) if flags.node_rank == 0 else wanted
