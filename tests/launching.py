"""The real launcher with small programs in the trainers' place, so that they do as told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from helpers import ROOT

TIMEOUT = 300.0  # seconds; on an idle machine every wait takes a few

# Every Python reads sitecustomize at its start: a rank's trainer becomes the test's program.
# On a busy machine a launcher sees signals late, and its ranks write their stacks late.
_REPLACE_TRAINER = """
import os, sys
if sys.orig_argv[1:4] == ["-m", "bert_pretraining", "launch"]:
    from bert_pretraining.launch import hang, supervise

    supervise.SECONDS_OF_ONE_SIGNAL = 60.0
    if os.environ.get("TEST_RANKS_ANSWER"):
        hang.SECONDS_TO_ANSWER = 60.0
if sys.orig_argv[2:5] == ["-m", "bert_pretraining", "train"]:
    rank = int(os.environ["RANK"])
    with open(os.environ["TEST_PROGRAM"]) as file:
        exec(compile(file.read(), "trainer", "exec"))
    os._exit(0)
"""


_started: list[Launch] = []


def end_all() -> None:
    """Leave nothing behind, also where a test has failed: ranks end with their launcher."""
    while _started:
        launch = _started.pop()
        launch.process.kill()
        launch.process.wait()


def in_the_trainers_place(here: Path, program: str) -> dict[str, str]:
    """The environment in which each rank runs `program`; it knows `rank` and the folder `here`."""
    (here / "sitecustomize.py").write_text(_REPLACE_TRAINER)
    (here / "program.py").write_text(
        "import os, signal, sys, time, pathlib\n"
        "from bert_pretraining.runtime import rank_reports\n"
        "here = pathlib.Path(os.environ['TEST_HERE'])\n"
        "def tell(name, text=''):\n"
        "    (here / f'{name}.partial').write_text(text or str(os.getpid()))\n"
        "    os.replace(here / f'{name}.partial', here / name)\n" + program
    )
    return {
        **os.environ,
        "PYTHONPATH": f"{here}:{ROOT / 'base'}",
        "TEST_PROGRAM": str(here / "program.py"),
        "TEST_HERE": str(here),
    }


class Launch:
    """A running launcher whose ranks run `program`; it knows `rank` and the folder `here`."""

    def __init__(self, here: Path, data: Path, program: str, *flags: object, ranks: int = 2):
        self.here = here
        environment = in_the_trainers_place(here, program)
        words = ["--name", "mini", "--config", "CPUx1x2", "--device", "cpu", "--data_dir", data,
                 "--nproc_per_node", ranks, *flags]  # fmt: skip
        self.errors = here / "errors.txt"
        with self.errors.open("w") as errors, (here / "output.txt").open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bert_pretraining", "launch", *map(str, words)],
                env=environment, stdout=output, stderr=errors, cwd=here, start_new_session=True,
            )  # fmt: skip

        _started.append(self)

    def wait_for(self, *names: str) -> list[str]:
        """What the programs told under these names, once they have."""
        wait_until(lambda: all((self.here / name).exists() for name in names), self.error_text)
        return [(self.here / name).read_text() for name in names]

    def send(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def end(self) -> tuple[int, str]:
        """The launcher's exit code and what it wrote on stderr."""
        code = self.process.wait(TIMEOUT)
        return code, self.error_text()

    def error_text(self) -> str:
        return self.errors.read_text()


def wait_until(what: Callable[[], bool], describe: Callable[[], str]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not what():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.05)


def is_gone(pid: str) -> bool:
    """Whether a process has ended (what waits to be reaped has)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def assert_gone(pids: list[str]) -> None:
    wait_until(lambda: all(map(is_gone, pids)), lambda: f"one of {pids} was left behind")
