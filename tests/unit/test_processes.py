"""Several processes that an error, a signal or Ctrl-C ends at once and without a traceback."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bert_pretraining.errors import UserError
from bert_pretraining.preparation.processes import run_in_processes
from helpers import ROOT

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from bert_pretraining.preparation.processes import run_in_processes

def work(number):
    Path(f"pid-{number}.new").write_text(str(os.getpid()))
    os.rename(f"pid-{number}.new", f"pid-{number}")
    time.sleep(600)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: None)  # of those that come late
    try:
        run_in_processes(work, {number: (number,) for number in range(4)}, 2, print)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def twice(number: int) -> int:
    return 2 * number


def refuse(number: int) -> int:
    if number == 0:
        raise UserError("number 0", "pass another")
    time.sleep(600)
    return 0


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_with_their_keys() -> None:
    found: dict[str, int] = {}
    run_in_processes(twice, {"a": (1,), "b": (2,), "c": (3,)}, 2, found.__setitem__)
    assert found == {"a": 2, "b": 4, "c": 6}
    assert multiprocessing.active_children() == []


def test_an_error_ends_the_others() -> None:
    with pytest.raises(UserError, match="number 0; pass another"):
        run_in_processes(refuse, {number: (number,) for number in (1, 0)}, 2, print)
    assert multiprocessing.active_children() == []


def test_a_process_that_is_killed_is_one_line() -> None:
    with pytest.raises(UserError, match="was killed, most likely because memory ran out; pass a s"):
        run_in_processes(die, {0: (0,)}, 1, print)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 600
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "times", "whole_group", "code"),
    [
        (signal.SIGINT, 1, True, 130),
        (signal.SIGINT, 5, True, 130),  # the finger stays on Ctrl-C
        (signal.SIGKILL, 1, False, -signal.SIGKILL),
    ],
)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_signals_leave_nothing_behind(
    tmp_path: Path, number: signal.Signals, times: int, whole_group: bool, code: int
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, "program.py"], cwd=tmp_path, start_new_session=True,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "base")},
    )  # fmt: skip
    try:
        pid_files = [tmp_path / f"pid-{index}" for index in (0, 1)]
        deadline = time.monotonic() + 600
        while not all(path.exists() for path in pid_files):
            assert time.monotonic() < deadline, "the processes did not start"
            time.sleep(0.02)
        pids = [int(path.read_text()) for path in pid_files]
        for _ in range(times):
            if process.poll() is None:
                (os.killpg if whole_group else os.kill)(process.pid, number)
        errors = process.communicate(timeout=600)[1]
        assert process.returncode == code
        assert "Traceback" not in errors
        wait_until_gone(pids)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
