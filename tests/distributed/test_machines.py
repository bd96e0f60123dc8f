"""Several launchers of one job, on this machine: why one ends is said by all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bert_pretraining.errors import EXIT_CONVERGED, EXIT_CRASH, EXIT_USAGE
from bert_pretraining.launch.rendezvous import Rendezvous, RendezvousSettings
from helpers import run_port
from launching import Launch, assert_gone, end_all, wait_until


@pytest.fixture(autouse=True)
def leave_nothing_behind() -> Iterator[None]:
    yield
    end_all()


def launch_both(data: Path, here: Path, program: str, *flags: object) -> list[Launch]:
    port = run_port()
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
    (first_code, first_errors), (second_code, second_errors) = first.end(), second.end()
    assert (first_code, second_code) == (EXIT_CRASH, EXIT_CRASH)
    assert second_errors.splitlines()[-1].startswith("Error: rank 1 was killed by SIGKILL")
    assert first_errors.splitlines()[-1].startswith(
        f"Error: machine 1 ({os.uname().nodename}) ended: rank 1 was killed by SIGKILL"
    )
    assert_gone(pids)


def test_both_machines_restart(mini_data: Path, tmp_path: Path) -> None:
    program = (
        "attempt = int(os.environ[rank_reports.ATTEMPT_VARIABLE])\n"
        "if rank == 1 and attempt == 0:\n"
        "    rank_reports.record_failure(rank, 1, 'OSError: gone', 'Traceback\\n')\n"
        "    os._exit(1)\n"
        "while attempt == 0:\n    time.sleep(0.01)\n"
        "rank_reports.record_finish(rank, 0)\n"
    )
    launches = launch_both(mini_data, tmp_path, program, "--max_restarts", 1)
    for launch in launches:
        code, errors = launch.end()
        assert code == EXIT_CONVERGED, errors
        assert "OSError: gone" in errors
        assert "Restart 1 of 1" in errors


def test_no_machine_is_lost_before_the_first_contact() -> None:
    rendezvous = Rendezvous(RendezvousSettings("127.0.0.1", 1, 1, 3, 0, timeout=1e9), {})
    assert rendezvous.fault(1e8) is None


def test_a_second_launcher_of_one_machine_leaves_the_job_alone() -> None:
    port = run_port()
    here, again = (
        Rendezvous(RendezvousSettings("127.0.0.1", port, 0, 2, 0, 60.0), {}) for _ in range(2)
    )
    here.start()
    wait_until(lambda: "machine 1 of 2" in here.awaited(), here.awaited)
    again.start()
    now = time.monotonic()
    wait_until(lambda: again.fault(now) is not None, again.awaited)
    assert again.fault(now).exit_code == EXIT_USAGE
    assert "is --node_rank 0 of the job at 127.0.0.1" in again.fault(now).message
    assert here.fault(now) is None
    here.close()
