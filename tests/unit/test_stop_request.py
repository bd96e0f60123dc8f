"""Which signals, and which losses of the output, stop a run."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bert_pretraining.errors import UserError
from bert_pretraining.runtime import signals
from bert_pretraining.runtime.output import OutputLost
from bert_pretraining.runtime.signals import StopRequest
from helpers import ROOT

PIPE = OutputLost(OSError(errno.EPIPE, "Broken pipe"))
FULL = OutputLost(OSError(errno.ENOSPC, "No space left on device"))


@pytest.fixture
def hang_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SIGHUP as a terminal's programs have it; the tests' own handling afterwards."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    monkeypatch.setattr(signals, "SECONDS_OF_ONE_SIGNAL", 600.0)  # a busy machine sends slowly
    yield
    signal.signal(signal.SIGHUP, before)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_hang_up_stops_a_run_and_is_no_second_signal(hang_up: None) -> None:
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        send(signal.SIGHUP)
        assert stop.received == "SIGHUP"
        send(signal.SIGTERM)  # as torchrun or systemd does beside it
        send(signal.SIGHUP)
        assert stop.received == "SIGHUP"
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_second_signal_ends_the_process(hang_up: None) -> None:
    program = (
        "import os, signal\n"
        "from bert_pretraining.runtime.signals import StopRequest\n"
        "stop = StopRequest()\n"
        "with stop.listening(), stop.deferred():\n"
        "    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):\n"
        "        print(stop.received, flush=True)\n"
        "        os.kill(os.getpid(), number)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "base")},
    )  # fmt: skip
    assert done.returncode == -signal.SIGINT
    assert done.stdout.split() == ["None", "SIGHUP", "SIGHUP"]


@pytest.mark.parametrize(
    ("number", "rank", "told"),
    [
        (signal.SIGINT, "0", "Stopping after this update and saving; Ctrl-C again ends at once"),
        (
            signal.SIGTERM,
            "0",
            "SIGTERM: stopping after this update and saving; a second signal ends at once",
        ),
        (signal.SIGHUP, "0", "SIGHUP: stopping after this update and saving"),
        (signal.SIGINT, "1", ""),
    ],
)
def test_a_run_answers_the_signal_once(
    hang_up: None,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    rank: str,
    told: str,
) -> None:
    monkeypatch.setenv("RANK", rank)
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        send(number)
        send(number)  # the launcher's, which forwards what the terminal sent to the ranks too
        send(signal.SIGHUP)
    assert capfd.readouterr().err == (f"{told}\n" if told else "")


def test_a_signal_before_training_is_not_answered(capfd: pytest.CaptureFixture[str]) -> None:
    """It ends the run at once, and nothing is saved."""
    with pytest.raises(KeyboardInterrupt), StopRequest().listening():
        send(signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_nohup_keeps_a_run_alive(hang_up: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        send(signal.SIGHUP)
        stop.output_lost(PIPE)
    assert not stop.asked


def test_a_reader_that_is_gone_is_a_hang_up(
    hang_up: None, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = StopRequest()
    stop.output_lost(PIPE)
    stop.output_lost(PIPE)
    assert stop.received == "SIGHUP"
    assert stop.failure is None
    assert capsys.readouterr().err == "Notice: nobody reads stdout (Broken pipe): stopping\n"


def test_a_full_disk_is_an_error_to_end_with() -> None:
    stop = StopRequest()
    stop.output_lost(FULL)
    assert stop.received is None
    assert stop.asked
    stop.fail(UserError("a later fault", "mend it"))
    assert "No space left on device" in str(stop.failure)
