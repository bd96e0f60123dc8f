"""Several launchers of one job, on this machine: why one ends is said by all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bert_pretraining.errors import EXIT_CONVERGED, EXIT_CRASH, EXIT_USAGE
from bert_pretraining.launch.port import free_port
from bert_pretraining.launch.rendezvous import LONGEST_SILENCE, Meeting, Neighbours, Report
from launching import Launch, assert_gone, end_all, wait_until


@pytest.fixture(autouse=True)
def leave_nothing_behind() -> Iterator[None]:
    yield
    end_all()


def launch_both(data: Path, here: Path, program: str, *flags: object) -> list[Launch]:
    port = free_port(0)
    launches = []
    for node in range(2):
        folder = here / f"machine{node}"
        folder.mkdir()
        launches.append(
            Launch(
                folder, data, program, "--nnodes", 2, "--node_rank", node, "--master_addr",
                "127.0.0.2", "--master_port", port, *flags, ranks=1,
            )
        )  # fmt: skip
    return launches


def test_a_rank_killed_on_one_machine_ends_both(mini_data: Path, tmp_path: Path) -> None:
    program = "tell(f'rank{rank}')\nwhile True:\n    time.sleep(0.01)\n"
    first, second = launch_both(mini_data, tmp_path, program)
    pids = first.wait_for("rank0") + second.wait_for("rank1")
    os.kill(int(pids[1]), signal.SIGKILL)
    killed = time.monotonic()
    (first_code, first_errors), (second_code, second_errors) = first.end(), second.end()
    assert time.monotonic() - killed < 15
    assert (first_code, second_code) == (EXIT_CRASH, EXIT_CRASH)
    assert second_errors.splitlines()[-1].startswith("Error: rank 1 was killed by SIGKILL")
    assert first_errors.splitlines()[-1].startswith(
        f"Error: machine 1 ({os.uname().nodename}) ended: rank 1 was killed by SIGKILL"
    )
    assert_gone(pids)


def test_both_machines_restart(mini_data: Path, tmp_path: Path) -> None:
    program = (
        "attempts = len(list(here.glob(f'rank{rank}.*')))\n"
        "tell(f'rank{rank}.{attempts}')\n"
        "if rank == 1 and attempts == 0:\n"
        "    rank_reports.record_failure(rank, 1, 'OSError: gone', 'Traceback\\n')\n"
        "    os._exit(1)\n"
        "while attempts == 0:\n    time.sleep(0.01)\n"
        "rank_reports.record_finish(rank, 0)\n"
    )
    launches = launch_both(mini_data, tmp_path, program, "--max_restarts", 1)
    for launch in launches:
        code, errors = launch.end()
        assert code == EXIT_CONVERGED, errors
        assert "OSError: gone" in errors
        assert "Restart 1 of 1" in errors


def test_which_end_came_first() -> None:
    killed = Report(False, 20.0, 1, "rank 9 was killed")
    lost = Report(True, 10.0, 0, "connection closed")
    assert min([lost, killed]) is killed, "clocks differ, and a loss may be a consequence"


def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    neighbours = Neighbours(Meeting("127.0.0.1", 1, 1, 3, 0, timeout=1e9), {})
    assert neighbours.fault(1e8) is None, "no contact yet"
    monkeypatch.setattr(neighbours, "_last_round", 100.0)
    monkeypatch.setattr(neighbours, "_heard", {0: (b"x", 100.0), 2: (b"y", 90.0)})
    assert neighbours.fault(100.0 + LONGEST_SILENCE / 2) is None
    silent = neighbours.fault(90.5 + LONGEST_SILENCE)
    assert silent.message.startswith("machine 2 has not been heard of")
    silent = neighbours.fault(100.5 + LONGEST_SILENCE)
    assert silent.message.startswith("machine 0 has not been heard of")
    monkeypatch.setattr(neighbours, "_heard", {2: (b"finished", 90.0)})
    assert neighbours.fault(90.5 + LONGEST_SILENCE) is None


def test_a_second_launcher_of_one_machine_leaves_the_job_alone() -> None:
    port = free_port(0)
    here, again = (Neighbours(Meeting("127.0.0.1", port, 0, 2, 0, 60.0), {}) for _ in range(2))
    here.start()
    wait_until(lambda: "machine 1 of 2" in here.awaited(), here.awaited)
    again.start()
    now = time.monotonic()
    wait_until(lambda: again.fault(now) is not None, again.awaited)
    assert again.fault(now).exit_code == EXIT_USAGE
    assert "is --node_rank 0 of the job at 127.0.0.1" in again.fault(now).message
    assert here.fault(now) is None
    here.close(finished=False)
