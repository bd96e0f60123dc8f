"""Run a plan: start the ranks, forward signals, notice failures and hangs, restart.

The launcher's main thread only watches. torchrun's agent starts the ranks, in another thread.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import importlib
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
from bert_pretraining.launch import checks, hang
from bert_pretraining.launch.plan import DEFAULT_PORT, Plan
from bert_pretraining.launch.port import free_port
from bert_pretraining.launch.processes import RankProcesses
from bert_pretraining.launch.rank import SETUP_VARIABLE
from bert_pretraining.launch.result import AttemptResult, explain, timed_out
from bert_pretraining.runtime import consistency, rank_reports, screen

if TYPE_CHECKING:
    from bert_pretraining.launch.rendezvous import Rendezvous

FINISHED = (EXIT_CONVERGED, EXIT_NOT_CONVERGED, EXIT_STOPPED)
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
CHECK_INTERVAL = 0.1  # seconds between two checks of the ranks
# Seconds that the other ranks have to end after one has failed; then they are killed. A rank that
# waits in a collective cannot handle the SIGTERM that torchrun sends.
SECONDS_TO_END = 5.0
SECONDS_TO_REPORT = 10.0  # how long a machine that cannot start waits for the others, to report
NOTICE_AFTER = 10.0  # seconds of waiting for other machines, until a notice says so
# `timeout` and srun signal a process and also its group. The same signal within this time (in
# seconds) counts once.
SECONDS_OF_ONE_SIGNAL = 1.0


def run(plan: Plan, check: Callable[[], None] = lambda: None) -> int:
    """Start the ranks, wait for them, and return the exit code of the run.

    Returns 128 + the signal's number if a signal ended the ranks.

    check: raises UserError for an error in the input that every rank of this machine would meet.
    """
    several = plan.resolved.config.nnodes > 1
    if several:
        checks.check_address(plan)
        if plan.flags.node_rank == 0:  # it keeps the store
            config = plan.resolved.config
            checks.allow_connections(config.nnodes, config.world_size)
        os.environ.update(plan.environment)  # torch reads its log level when it is imported
    fault = checks.fault(plan, check)
    if fault is not None and not several:
        raise fault
    with _collected_signals() as received:
        if fault is None and not several:
            # It imports torch, seconds in which another program could take a port that was chosen.
            importlib.import_module("bert_pretraining.launch.agent")
        for attempt in range(plan.flags.max_restarts + 1):
            port = _master_port(plan, attempt)
            log_paths = _log_paths(plan) if fault is None else {}
            if attempt == 0 and fault is None:
                plan.print_bindings(sys.stdout)
            with tempfile.TemporaryDirectory(prefix="bert_pretraining_") as folder:
                job = _Attempt(plan, Path(folder), log_paths, received, attempt)
                result = job.run(port) if fault is None else job.refuse(port, fault)
            if result.message:
                print(result.text(log_paths), file=sys.stderr, flush=True)
            if not result.may_restart or attempt == plan.flags.max_restarts:
                break
            print(f"Restart {attempt + 1} of {plan.flags.max_restarts}", file=sys.stderr)
    return result.exit_code


class _Attempt:
    """One start of all ranks of this machine, and their supervision."""

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
        self._stopped_by: int | None = None  # the signal that was forwarded
        self._signalled_at = 0.0
        self._failed_at: float | None = None
        self._waited_for: dict[int, str] = {}  # ranks for which one that failed has waited in vain
        self._killed: frozenset[int] = frozenset()
        self._decided: AttemptResult | None = None  # why this launcher ended the ranks
        self._rendezvous: Rendezvous | None = None
        self._killed_at: float | None = None
        self._notice_at = 0.0

    def run(self, port: int) -> AttemptResult:
        """Start the ranks and wait until all have ended. port: of the rendezvous, on machine 0."""
        self._start_rendezvous(port)
        self._hang_detector = hang.HangDetector(
            self._ranks,
            self._plan.flags.hang_timeout,
            checks.computes_on_cpu(self._plan),
            several_machines=self._rendezvous is not None,
            crowding=checks.crowding(self._plan),
        )
        while not self._rendezvous_is_over():
            time.sleep(CHECK_INTERVAL)
            self._forward_signals()
            self._check_ranks(time.monotonic())
        if self._decided is not None:
            return self._report_to_others(self._decided)

        from bert_pretraining.launch.agent import Agent

        agent = Agent(self._plan, port, self._folder, self._log_paths)
        with _environment(self._variables()):
            agent.start()
            while agent.is_alive() and not self._agent_is_overdue():
                agent.join(CHECK_INTERVAL)
                self._forward_signals()
                self._kill_after_a_failure()
                self._check_ranks(time.monotonic())
        if agent.exit_codes:
            self._ranks.kill()  # also the processes that a failed rank has started
        screen.clean()
        result = self._report_to_others(self._own_result(agent.exit_codes, agent.error))
        # torchrun's store listens at the master port until it is garbage-collected.
        del agent
        gc.collect()
        return result

    def refuse(self, port: int, fault: UserError) -> AttemptResult:
        """Start no rank, and tell the other machines why."""
        self._start_rendezvous(port)
        if self._rendezvous is not None:
            self._rendezvous.wait_for_all(SECONDS_TO_REPORT)
        return self._report_to_others(AttemptResult(EXIT_USAGE, str(fault)))

    def _start_rendezvous(self, port: int) -> None:
        flags, config = self._plan.flags, self._plan.resolved.config
        if config.nnodes == 1:
            return
        from bert_pretraining.launch.rendezvous import Rendezvous, RendezvousSettings

        timeout = flags.rendezvous_timeout
        settings = RendezvousSettings(
            flags.master_addr, port, flags.node_rank, config.nnodes, self._attempt, timeout
        )
        self._rendezvous = Rendezvous(settings, consistency.describe(dataclasses.asdict(config)))
        self._rendezvous.start()
        self._notice_at = time.monotonic() + NOTICE_AFTER

    def _rendezvous_is_over(self) -> bool:
        """Whether the ranks may start now, or must not start at all."""
        if self._rendezvous is None or self._rendezvous.complete or self._decided is not None:
            return True
        if time.monotonic() > self._notice_at:
            self._notice_at = float("inf")
            print(f"Waiting for {self._rendezvous.awaited()}", file=sys.stderr, flush=True)
        return False

    def _variables(self) -> dict[str, str]:
        plan = self._plan
        ranks = [plan.rank_setup(local_rank) for local_rank in range(len(plan.bindings))]
        setup = {"launcher": os.getpid(), "one_stream": bool(self._log_paths), "ranks": ranks}
        return {
            **plan.environment,
            rank_reports.FOLDER_VARIABLE: str(self._folder),
            rank_reports.ATTEMPT_VARIABLE: str(self._attempt),
            SETUP_VARIABLE: json.dumps(setup),
        }

    def _forward_signals(self) -> None:
        while self._received:
            signum, at = self._received.popleft()
            hang_up = signum == signal.SIGHUP  # counts once, and never as a second signal
            if self._stopped_by is None or (self._stopped_by == signal.SIGHUP and not hang_up):
                self._stopped_by, self._signalled_at = signum, at
                rank_reports.ask_to_stop(self._folder, signum)
                self._ranks.send(signum)
                if not rank_reports.read_processes(self._folder):
                    self._leave(signum)
            elif not hang_up and (
                signum != self._stopped_by or at - self._signalled_at > SECONDS_OF_ONE_SIGNAL
            ):
                self._kill()
                self._leave(signum)

    def _leave(self, signum: int) -> None:
        """End this process now: the agent's thread may wait for other machines for minutes.

        Ranks that are being started end together with this process, see `rank`.
        """
        screen.clean()
        print(_ended_by(signum), file=sys.stderr, flush=True)
        sys.stdout.flush()
        if self._rendezvous is not None:
            result = AttemptResult(128 + signum, _ended_by(signum), by_signal=True)
            self._rendezvous.conclude(False, result)
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(128 + signum)

    def _kill_after_a_failure(self) -> None:
        """Kill the ranks that still run SECONDS_TO_END after one has failed."""
        now = time.monotonic()
        if self._failed_at is None and self._ranks.one_has_failed():
            self._failed_at = now
            if any(map(timed_out, rank_reports.read_failures(self._folder))):
                self._waited_for = self._hang_detector.waited_for()
        if self._failed_at is not None and now - self._failed_at > SECONDS_TO_END:
            self._kill()

    def _check_ranks(self, now: float) -> None:
        """Kill the ranks if one hangs, or if the job has ended on another machine."""
        self._hang_detector.look_at_the_clock(now)
        if self._decided is not None or self._failed_at is not None:
            return
        self._decided = self._hang_detector.check(now)
        if self._decided is None and self._rendezvous is not None:
            self._decided = self._rendezvous.fault(now)
        if self._decided is not None:
            self._kill()
            self._killed_at = now

    def _agent_is_overdue(self) -> bool:
        """Whether the agent still waits for lost machines long after its ranks were killed."""
        return self._killed_at is not None and time.monotonic() - self._killed_at > SECONDS_TO_END

    def _report_to_others(self, result: AttemptResult) -> AttemptResult:
        """Report this result; return it, or that of another machine if it is the first cause."""
        if self._rendezvous is None:
            return result
        if result.node is not None:
            result = self._rendezvous.settle(result)
        elif result.exit_code not in FINISHED:
            reported = (
                result
                if result.message
                else AttemptResult(result.exit_code, _ended_by(result.exit_code - 128))
            )
            # A traceback may come from a connection that was lost when another machine ended.
            first = self._rendezvous.conclude(
                bool(result.detail) and not result.is_certain, reported
            )
            if first is not None and result is not self._decided:
                here = f"Error here: {result.message}\n" if result.message else ""
                result = dataclasses.replace(first, detail=f"{result.detail}{here}")
        self._rendezvous.close()
        return result

    def _kill(self) -> None:
        self._killed |= self._ranks.living().keys()
        self._ranks.kill()

    def _own_result(self, exit_codes: dict[int, int], error: Exception | None) -> AttemptResult:
        if self._decided is not None:
            return self._decided
        if error is not None:
            raise error
        if exit_codes and self._stopped_by is not None:
            # Ranks that do not handle the signal are ended by it.
            by_it = {-self._stopped_by, 128 + self._stopped_by}
            if not by_it.isdisjoint(exit_codes.values()):
                print(_ended_by(self._stopped_by), file=sys.stderr, flush=True)
                return AttemptResult(128 + self._stopped_by, by_signal=True)
        if exit_codes:
            return explain(self._folder, exit_codes, self._killed, self._waited_for)
        earned = rank_reports.read_finish(self._folder)
        if earned is None:
            raise RuntimeError("the ranks ended without a report")
        return AttemptResult(earned)


def _ended_by(signum: int) -> str:
    return f"Ended by {signal.Signals(signum).name}"


@contextlib.contextmanager
def _collected_signals() -> Iterator[collections.deque[tuple[int, float]]]:
    """Collect the signals that this process gets, each with its monotonic time in seconds.

    A signal that is ignored (nohup ignores SIGHUP) stays ignored.
    """
    received: collections.deque[tuple[int, float]] = collections.deque()
    before = {}
    for signum in FORWARDED:
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
    """Set the ranks' variables; remove those that would make this process report as a rank."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in (rank_reports.FOLDER_VARIABLE, rank_reports.ATTEMPT_VARIABLE, SETUP_VARIABLE):
            del os.environ[name]


def _log_paths(plan: Plan) -> dict[int, Path]:
    """Rank -> a new file in --log_dir; empty without --log_dir."""
    if not plan.flags.log_dir:
        return {}
    directory = Path(plan.flags.log_dir).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to --log_dir {directory} ({error.strerror})", "pass another --log_dir"
        ) from error
    ranks = range(plan.first_rank, plan.first_rank + len(plan.bindings))
    # Logs of an earlier run or attempt are kept: rank_0.log, rank_0.1.log, rank_0.2.log, ...
    number = 0
    while True:
        middle = f".{number}" if number else ""
        paths = {rank: directory / f"rank_{rank}{middle}.log" for rank in ranks}
        if not any(path.exists() for path in paths.values()):
            return paths
        number += 1


def _master_port(plan: Plan, attempt: int) -> int:
    """The port of the rendezvous. On machine 0, and with one machine, it is checked to be free.

    With several machines, each restart takes the next port: on the old one, a fast machine
    could still connect to the attempt that has failed.
    """
    flags = plan.flags
    if plan.resolved.config.nnodes == 1:
        return free_port(flags.master_port or 0)
    wanted = (flags.master_port or DEFAULT_PORT) + attempt
    return free_port(wanted) if flags.node_rank == 0 else wanted
