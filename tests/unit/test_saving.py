"""The parts of saving and stopping: the writer, the order of files, the lock, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from bert_pretraining.checkpoint import CheckpointWriter, newest_first
from bert_pretraining.checkpoint import save as saving
from bert_pretraining.errors import UserError
from bert_pretraining.runtime import signals
from bert_pretraining.runtime.lock import FolderLock
from bert_pretraining.runtime.signals import StopRequest
from helpers import ROOT

CONTENT = {"model": {"w": torch.ones(3)}, "optimizer": {}, "state": {"global_steps": 1}}


def test_the_newest_run_comes_first_and_in_it_the_highest_step(tmp_path: Path) -> None:
    names = [
        "run-20260102-000000/model.ckpt-9.pt",
        "run-20260102-000000/model.ckpt-10.pt",
        "run-20260101-235959/model.ckpt-500.pt",
        "model.ckpt-7000.pt",
    ]
    others = ["run-20260102-000000/model.ckpt-11.pt.partial", "model.ckpt-28252.apex.pt"]
    for name in [*names, *others]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = [names[1], names[0], names[2], names[3]]
    assert newest_first(tmp_path) == [tmp_path / name for name in expected]
    assert newest_first(tmp_path / "absent") == []


def test_one_file_at_a_time_is_written_and_the_oldest_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way, most = [], []
    write = saving.save_checkpoint
    gate = threading.Event()

    def slow(path: Path, **content: dict) -> None:
        under_way.append(path)
        most.append(len(under_way))
        gate.wait(600)
        write(path, **content)
        under_way.remove(path)

    monkeypatch.setattr(saving, "save_checkpoint", slow)
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.write(1, CONTENT)
    said: list[str] = []
    writer.report(said.append)
    assert said == []  # training goes on meanwhile
    gate.set()
    for step in (2, 3, 10):
        writer.write(step, CONTENT)
    writer.report(said.append, wait=True)
    assert max(most) == 1
    assert said == [f"Checkpoint: {tmp_path}/model.ckpt-{step}.pt" for step in (1, 2, 3, 10)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.ckpt-10.pt", "model.ckpt-3.pt"
    ]  # fmt: skip


def test_a_file_that_cannot_be_written_leaves_the_others_alone(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.write(1, CONTENT)
    writer.report(lambda _: None, wait=True)
    before = (tmp_path / "model.ckpt-1.pt").read_bytes()
    (tmp_path / "model.ckpt-2.pt").mkdir()  # in the way
    said: list[str] = []
    writer.write(2, CONTENT)
    writer.report(said.append, wait=True)
    assert said == [
        f"Warning: no checkpoint was written: {tmp_path}/model.ckpt-2.pt: Is a directory"
    ]
    assert (tmp_path / "model.ckpt-1.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_an_old_file_that_cannot_be_removed_takes_nothing_from_the_new_one(tmp_path: Path) -> None:
    old = tmp_path / "model.ckpt-1.pt"
    old.mkdir()  # cannot be unlinked
    (tmp_path / "model.ckpt-2.pt").touch()
    writer = CheckpointWriter(tmp_path, keep=1)
    said: list[str] = []
    writer.write(3, CONTENT)
    writer.report(said.append, wait=True)
    assert said == [
        f"Checkpoint: {tmp_path}/model.ckpt-3.pt",
        f"Warning: the old checkpoint {old} could not be removed: Is a directory",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [old.name, "model.ckpt-3.pt"]


def test_a_lock_is_held_until_its_holder_is_gone(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from bert_pretraining.runtime.lock import FolderLock\n"
        "lock = FolderLock(pathlib.Path(sys.argv[1]))\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "new")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "base")},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by another run .process {holder.pid} on "):
        FolderLock(tmp_path / "new")
    holder.kill()
    holder.wait()
    FolderLock(tmp_path / "new").release()
    FolderLock(tmp_path / "new").release()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot write to output_dir {tmp_path}/file/out .Not a d"):
        FolderLock(tmp_path / "file" / "out")


def test_a_signal_ends_what_waits_and_is_remembered_in_a_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signals, "SECONDS_OF_ONE_SIGNAL", 600.0)  # a busy machine sends slowly
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
        os.kill(os.getpid(), signal.SIGTERM)  # passed on by a launcher: the same one
    assert signal.getsignal(signal.SIGTERM) == before
    stop = StopRequest()
    with pytest.raises(KeyboardInterrupt, match="SIGUSR1"), stop.listening():
        os.kill(os.getpid(), signal.SIGUSR1)


def test_a_second_signal_ends_the_process() -> None:
    program = (
        "import os, signal\n"
        "from bert_pretraining.runtime.signals import StopRequest\n"
        "stop = StopRequest()\n"
        "with stop.listening(), stop.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT / "base")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGINT
    assert done.stdout == ""


def test_a_run_that_has_ended_ignores_signals_where_others_wait_for_it() -> None:
    """A rank that ended by an error does not: the launcher may end it."""
    program = (
        "import os, signal\n"
        "from bert_pretraining.runtime.signals import ASKING, StopRequest\n"
        "try:\n"
        "    with StopRequest().listening(ignore_afterwards=True):\n"
        "        raise ValueError\n"
        "except ValueError:\n"
        "    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL\n"
        "with StopRequest().listening(ignore_afterwards=True):\n"
        "    pass\n"
        "for number in ASKING:\n"
        "    os.kill(os.getpid(), number)\n"
        "print('still here')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT / "base")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "still here\n", "")
