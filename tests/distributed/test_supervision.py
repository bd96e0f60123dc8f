"""Real processes: failing, killed, signalled and hanging ranks end the job, and truthfully."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bert_pretraining.errors import EXIT_CONVERGED, EXIT_CRASH, EXIT_NOT_CONVERGED, EXIT_STOPPED
from helpers import run_port
from launching import Launch, assert_gone, end_all


@pytest.fixture(autouse=True)
def leave_nothing_behind() -> Iterator[None]:
    yield
    end_all()


# Until the test has ended it, a rank that a SIGTERM does not end; its child is in its session.
STUBBORN = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    tell(f"child{rank}")
    time.sleep(600)
    os._exit(0)
while not (here / f"child{rank}").exists():
    time.sleep(0.01)
tell(f"rank{rank}")
"""
FOREVER = "while True:\n    time.sleep(0.01)\n"


def test_the_first_failure_ends_all_and_is_shown_last(mini_data: Path, tmp_path: Path) -> None:
    program = STUBBORN + (
        "if rank == 1:\n"
        "    while not (here / 'rank0').exists():\n"
        "        time.sleep(0.01)\n"
        "    print('last words', file=sys.stderr, flush=True)\n"
        "    rank_reports.record_failure(rank, 1, 'ValueError: no luck', 'Traceback of it\\n')\n"
        "    tell('failed')\n"
        "    os._exit(1)\n"
    )
    launch = Launch(tmp_path, mini_data, program + FOREVER, "--log_dir", "logs")
    launch.wait_for("failed")
    code, errors = launch.end()
    assert code == EXIT_CRASH
    log = tmp_path / "logs" / "rank_1.log"
    assert errors.endswith(
        f"Traceback of it\nError: rank 1: ValueError: no luck (log of rank 1: {log})\n"
    )
    assert log.read_text() == "last words\n"
    assert "[rank 1] last words" in (tmp_path / "output.txt").read_text()
    assert_gone(launch.wait_for("rank0", "rank1", "child0", "child1"))


@pytest.mark.slow
def test_a_rank_killed_at_any_moment(mini_data: Path, tmp_path: Path) -> None:
    launch = Launch(tmp_path, mini_data, STUBBORN + FOREVER, ranks=3)
    pids = launch.wait_for("rank0", "rank1", "rank2")
    victim = random.randrange(3)
    time.sleep(random.random())
    os.kill(int(pids[victim]), signal.SIGKILL)
    code, errors = launch.end()
    assert code == EXIT_CRASH
    last = errors.splitlines()[-1]
    assert last.startswith(f"Error: rank {victim} was killed by SIGKILL")
    assert_gone(pids)


COUNTING = """
counts = {}
def count(number, frame):
    counts[number] = counts.get(number, 0) + 1
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, count)
tell(f"rank{rank}")
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_passed_on_once_and_ranks_may_finish(
    mini_data: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    program = COUNTING + (
        "while not counts:\n"
        "    time.sleep(0.01)\n"
        "time.sleep(0.3 + rank)  # saving takes its time, one rank longer than another\n"
        "tell(f'counts{rank}', repr({int(key): value for key, value in counts.items()}))\n"
        f"rank_reports.record_finish(rank, {EXIT_STOPPED})\n"
    )
    launch = Launch(tmp_path, mini_data, program, "--max_restarts", 3)
    launch.wait_for("rank0", "rank1")
    launch.send(signum)
    launch.send(signum)  # as `timeout` does it
    code, errors = launch.end()
    assert code == EXIT_STOPPED, errors
    assert launch.wait_for("counts0", "counts1") == [repr({int(signum): 1})] * 2


def test_a_second_signal_ends_everything_at_once(mini_data: Path, tmp_path: Path) -> None:
    program = COUNTING + (
        "while not counts:\n    time.sleep(0.01)\ntell(f'signalled{rank}')\n" + FOREVER
    )
    launch = Launch(tmp_path, mini_data, program, "--max_restarts", 3)
    pids = launch.wait_for("rank0", "rank1")
    launch.send(signal.SIGINT)
    launch.wait_for("signalled0", "signalled1")
    launch.send(signal.SIGTERM)
    code, errors = launch.end()
    assert (code, errors.splitlines()[-1]) == (128 + signal.SIGTERM, "Ended by SIGTERM")
    assert_gone(pids)


def test_ranks_that_know_no_signal_end_by_it(mini_data: Path, tmp_path: Path) -> None:
    launch = Launch(tmp_path, mini_data, "tell(f'rank{rank}')\n" + FOREVER, "--max_restarts", 3)
    pids = launch.wait_for("rank0", "rank1")
    launch.send(signal.SIGTERM)
    code, errors = launch.end()
    assert (code, errors.splitlines()[-1]) == (128 + signal.SIGTERM, "Ended by SIGTERM")
    assert_gone(pids)


def test_ranks_do_not_outlive_a_killed_launcher(mini_data: Path, tmp_path: Path) -> None:
    launch = Launch(tmp_path, mini_data, "tell(f'rank{rank}')\n" + FOREVER)
    pids = launch.wait_for("rank0", "rank1")
    launch.send(signal.SIGKILL)
    assert launch.end()[0] == -signal.SIGKILL
    assert_gone(pids)


def test_a_rank_that_hangs_is_found_and_every_stack_shown(
    mini_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_RANKS_ANSWER", "1")
    program = (
        "def read_a_dead_disk():\n"
        "    time.sleep(600)\n"
        "code = 'def wait_for_the_others():\\n    time.sleep(600)\\n'\n"
        "exec(compile(code, '/lib/torch/distributed/collectives.py', 'exec'))\n"
        "rank_reports.show_stacks_on_request()\n"
        "tell(f'rank{rank}')\n"
        "while rank == 0 and not (here / 'rank1').exists():\n"
        "    time.sleep(0.01)\n"
        "rank_reports.heartbeat()\n"  # only ranks that ever made progress are watched
        "read_a_dead_disk() if rank == 1 else wait_for_the_others()\n"
    )
    launch = Launch(tmp_path, mini_data, program, "--hang_timeout", 5)
    pids = launch.wait_for("rank0", "rank1")
    code, errors = launch.end()
    assert code == EXIT_CRASH
    last = errors.splitlines()[-1]
    assert last.startswith("Error: rank 1 made no progress for")
    assert "rank 1 is not in a collective: in trainer:" in last
    assert "read_a_dead_disk" in last
    first, second = errors.split("---- rank 1")
    assert "wait_for_the_others" in first
    assert "read_a_dead_disk" in second
    assert_gone(pids)


def test_a_stopped_rank_is_named_as_such(mini_data: Path, tmp_path: Path) -> None:
    program = (
        "rank_reports.show_stacks_on_request()\n"
        "rank_reports.heartbeat()\n"  # only ranks that ever made progress are watched
        "tell(f'rank{rank}')\n"
        "while True:\n    time.sleep(0.01)\n    rank_reports.heartbeat()\n"
    )
    launch = Launch(tmp_path, mini_data, program, "--hang_timeout", 10)
    pids = launch.wait_for("rank0", "rank1")
    os.kill(int(pids[0]), signal.SIGSTOP)
    code, errors = launch.end()
    assert code == EXIT_CRASH
    assert "Error: rank 0 made no progress for" in errors.splitlines()[-1]
    assert "rank 0 is stopped (state T)" in errors.splitlines()[-1]
    assert_gone(pids)


def test_restarts(mini_data: Path, tmp_path: Path) -> None:
    program = (
        "attempt = int(os.environ[rank_reports.ATTEMPT_VARIABLE])\n"
        "print(f'attempt {attempt}', flush=True)\n"
        "if rank == 1 and attempt < 2:\n"
        "    rank_reports.record_failure(rank, 1, 'OSError: gone', 'Traceback\\n')\n"
        "    os._exit(1)\n"
        "while attempt < 2:\n    time.sleep(0.01)\n"
        "rank_reports.record_finish(rank, 0)\n"
    )
    launch = Launch(
        tmp_path,
        mini_data,
        program,
        "--max_restarts",
        2,
        "--log_dir",
        "logs",
        "--master_port",
        run_port(),
    )
    code, errors = launch.end()
    assert code == EXIT_CONVERGED, errors
    assert errors.count("Error: rank 1: OSError: gone") == 2
    assert [line for line in errors.splitlines() if line.startswith("Restart")] == [
        "Restart 1 of 2",
        "Restart 2 of 2",
    ]
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert logs["rank_1.log"] == "attempt 0\n"
    assert logs["rank_1.1.log"] == "attempt 1\n"
    assert logs["rank_0.2.log"] == "attempt 2\n"
    assert len(logs) == 6


@pytest.mark.parametrize(
    ("flags", "expected"), [([], EXIT_NOT_CONVERGED), (["--exit_zero_without_target"], 0)]
)
def test_the_exit_code_without_the_target(
    mini_data: Path, tmp_path: Path, flags: list[str], expected: int
) -> None:
    program = f"rank_reports.record_finish(rank, {EXIT_NOT_CONVERGED})\n"
    code, errors = Launch(tmp_path, mini_data, program, *flags).end()
    assert code == expected, errors


# The trainer's command with a training that ends at once, on rank 0 a second later.
FINISHING = """
from bert_pretraining.commands.training import COMMANDS
from bert_pretraining.training import train

def end_training(resolved):
    if rank == 0:
        reports = pathlib.Path(os.environ[rank_reports.FOLDER_VARIABLE])
        while 1 not in rank_reports.finished_ranks(reports):
            time.sleep(0.01)
        time.sleep(1)
        pid = rank_reports.read_processes(reports)[1]
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        tell("rank1", "ended" if state == "Z" else "waits")
    return 0

train.main = end_training
COMMANDS["train"](sys.orig_argv[5:])
"""


def test_a_rank_that_has_finished_waits_for_the_others(mini_data: Path, tmp_path: Path) -> None:
    launch = Launch(tmp_path, mini_data, FINISHING)
    code, errors = launch.end()
    assert code == EXIT_CONVERGED, errors
    assert launch.wait_for("rank1") == ["waits"], "rank 0 might still read from it"


def test_bad_input_is_not_restarted(mini_data: Path, tmp_path: Path) -> None:
    program = (
        "tell(f'rank{rank}')\n"
        "rank_reports.record_failure(rank, 2, 'no such shard; pass another')\n"
        "os._exit(2)\n"
    )
    launch = Launch(tmp_path, mini_data, program, "--max_restarts", 3)
    code, errors = launch.end()
    assert code == 2
    assert errors.splitlines()[-1] == "Error: no such shard; pass another"
    assert "Restart" not in errors
