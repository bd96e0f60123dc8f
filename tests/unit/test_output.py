"""Output that goes away: closed, full, without a reader, or of few characters."""

from __future__ import annotations

import errno
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bert_pretraining.logs.line_file import LineFile
from bert_pretraining.runtime import output
from helpers import ROOT, error_lines

FULL = "Error: cannot write to stdout (No space left on device); free disk space, or "
# Commands that only show something, with what they show first.
SHOWING = {
    "--help": "usage: ",
    "config list": "--name ",
    "config show --name mini --config CPUx1x1": "",
    "launch --name mini --config CPUx1x1 --dry_run": "",
    "doctor": "",
}
each_command = pytest.mark.parametrize("words", SHOWING)


def shell(script: str, cwd: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a Bash script in which "$@" is the command line; its status is the command's."""
    command = [sys.executable, "-m", "bert_pretraining", *words]
    return subprocess.run(
        ["bash", "-c", f"{script}; exit ${{PIPESTATUS[0]}}", "-", *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT / "base"), **environment},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
        check=False,
    )


def errors_of(done: subprocess.CompletedProcess) -> list[str]:
    """The lines of stderr without what depends on the machine."""
    return [line for line in error_lines(done.stderr) if not line.startswith("Note: ")]


@each_command
def test_a_full_disk_is_one_line(words: str, tmp_path: Path) -> None:
    done = shell('"$@" >/dev/full', tmp_path, *words.split())
    assert done.returncode == 2
    (line,) = errors_of(done)
    assert line.startswith(FULL)


@each_command
def test_a_reader_that_is_gone_ends_a_command_silently(words: str, tmp_path: Path) -> None:
    """The reader has ended before the command writes."""
    wait = "exec 3> >(exec true); wait $!; "
    done = shell(f'{wait}"$@" >&3', tmp_path, *words.split())
    assert done.returncode == 141, done.stderr
    assert errors_of(done) == []


@each_command
def test_a_closed_stream_changes_nothing(words: str, tmp_path: Path) -> None:
    usual = shell('"$@"', tmp_path, *words.split())
    assert usual.stdout.startswith(SHOWING[words])
    for closed in (">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"):
        done = shell(f'"$@" {closed}', tmp_path, *words.split())
        assert done.returncode == usual.returncode, closed
        assert "Traceback" not in done.stderr + done.stdout, closed


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}, b"D\\xe4\\u6570 \xff"),
        ({"PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}, b"D\xe4\\u6570 \xff"),
        (C_LOCALE, b"D\\xe4\\u6570 \xff"),
        ({"PYTHONUTF8": "1"}, "D\u00e4\u6570 ".encode() + b"\xff"),
    ],
    ids=["ascii", "latin-1", "C locale", "UTF-8"],
)
def test_any_path_is_shown_in_any_encoding(environment: dict[str, str], shown: bytes) -> None:
    """Also a byte that is no UTF-8."""
    text = "print('D\\u00e4\\u6570 \\udcff')\n"
    process = in_a_new_python(text, subprocess.PIPE, **environment)
    found, errors = process.communicate(timeout=600)
    assert (found, errors) == (shown + b"\n", b"")


def in_a_new_python(program: str, stdout: int, **environment: str) -> subprocess.Popen[bytes]:
    """A program that has called `output.prepare`."""
    start = "import sys\nfrom bert_pretraining.runtime import output\noutput.prepare()\n"
    return subprocess.Popen(
        [sys.executable, "-c", start + program],
        env={**os.environ, "PYTHONPATH": str(ROOT / "base"), **environment},
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


def test_a_terminal_that_is_gone_is_a_loss_reported_once() -> None:
    ours, its = pty.openpty()
    program = (
        "output.when_lost(lambda lost: print(lost.reason, lost.is_full, file=sys.stderr))\n"
        "sys.stdin.readline()\n"
        "for _ in range(3):\n    print('text', flush=True)\n"
    )
    process = in_a_new_python(program, its)
    os.close(its)
    os.close(ours)
    _, errors = process.communicate(b"go on\n", timeout=600)
    assert process.returncode == 0, errors
    assert errors.decode() == f"{os.strerror(errno.EIO)} False\n"


def test_a_pipe_that_does_not_block_gets_every_byte() -> None:
    """As where another program on the same terminal has made it so."""
    ours, its = os.pipe()
    os.set_blocking(its, False)
    process = in_a_new_python("print('x' * 1_000_000, flush=True)\n", its)
    os.close(its)
    read: list[bytes] = []
    with open(ours, "rb") as pipe:
        reader = threading.Thread(target=lambda: read.append(pipe.read()))
        reader.start()
        _, errors = process.communicate(timeout=600)
        reader.join()
    assert process.returncode == 0, errors
    assert len(read[0]) == 1_000_001


def test_streams_that_a_caller_has_replaced_stay(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    output.prepare()
    assert sys.stdout is before
    print("to the caller")
    assert capsys.readouterr().out == "to the caller\n"


def test_a_log_keeps_whole_lines_where_the_disk_is_full(tmp_path: Path) -> None:
    program = (
        "import resource, pathlib\n"
        "from bert_pretraining.logs.line_file import LineFile\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "file = LineFile(pathlib.Path('log.txt'))\n"
        "file.line('0123456789')\n"
        "try:\n    file.line('0123456789')\n"
        "except OSError as error:\n    print(error)\n"
        "file.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "base")},
    )  # fmt: skip
    assert done.stdout == f"[Errno {errno.EFBIG}] File too large: 'log.txt'\n", done.stderr
    assert done.stderr == ""
    assert (tmp_path / "log.txt").read_text() == "0123456789\n"


def test_a_log_takes_any_text(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "log.txt")
    file.line("D\udcff \u6570")
    file.close()
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "D\\udcff \u6570\n"
