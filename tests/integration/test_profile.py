"""--profile_steps and --profile_memory as a user runs them."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bert_pretraining.errors import EXIT_CRASH, EXIT_STOPPED
from bert_pretraining.runtime.step_trace import StepTrace
from bert_pretraining.training.update import Update
from helpers import ROOT, command, in_process, perf_events

NOT_REACHED = 3
FLAGS = ("--name", "mini", "--seed", 5, "--max_steps", 6, "--log_freq", 1,
         "--num_eval_examples", 64, "--train_batch_size", 8)  # fmt: skip
PARTS = {"data", "forward_backward", "reduction", "optimizer"}


def train(tmp_path: Path, data: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    """One rank, in this process."""
    return in_process(
        "train", *FLAGS, "--config", "CPUx1x1", "--data_dir", data, "--output_dir",
        tmp_path / "runs", *flags, cwd=tmp_path,
    )  # fmt: skip


def figures(output: str) -> list[object]:
    """What training computed, without times."""
    steps = [(v["loss"], v["mlm_acc"], v["grad_norm"]) for v in perf_events(output, "STEP_END")]
    ends = [(v["final_loss"], v["final_mlm_accuracy"]) for v in perf_events(output, "FINISHED")]
    return [*steps, *ends]


def ranges(trace: Path) -> dict[str, list[dict]]:
    """The marked ranges of a trace, by name."""
    found: dict[str, list[dict]] = {}
    for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]:
        if event.get("cat") == "user_annotation":
            found.setdefault(event["name"], []).append(event)
    return found


@pytest.mark.slow
def test_each_rank_writes_a_trace_and_a_table_and_nothing_else_changes(
    mini_data: Path, tmp_path: Path
) -> None:
    flags = (*FLAGS, "--config", "CPUx1x2", "--data_dir", mini_data)
    plain = command("launch", *flags, "--output_dir", tmp_path / "plain", cwd=tmp_path)
    profiled = command(
        "launch", *flags, "--output_dir", tmp_path / "profiled", "--eval_steps", 4,
        "--profile_steps", "3:5", "--profile_memory", cwd=tmp_path,
    )  # fmt: skip
    assert (plain.returncode, profiled.returncode) == (NOT_REACHED, NOT_REACHED), profiled.stderr
    assert len(figures(plain.stdout)) == 7
    assert figures(profiled.stdout) == figures(plain.stdout)

    (folder,) = (tmp_path / "profiled").glob("run-*/profile")
    assert sorted(path.name for path in folder.iterdir()) == [
        "rank0.operators.txt", "rank0.trace.json.gz",
        "rank1.operators.txt", "rank1.trace.json.gz",
    ]  # fmt: skip
    for rank in (0, 1):
        marked = ranges(folder / f"rank{rank}.trace.json.gz")
        assert {name: len(marked[name]) for name in PARTS} == dict.fromkeys(PARTS, 2)
        assert {name for name in marked if "Step" in name} == {"ProfilerStep#3", "ProfilerStep#4"}
        assert len(marked["evaluation"]) == 1
        assert len(marked["logging"]) == 2
        table = (folder / f"rank{rank}.operators.txt").read_text()
        assert table.startswith(f"Profile of steps 3 to 4, rank {rank} of 2 (CPU)\n")
        assert re.search(r"^aten::mm +\d+\.\d +\d+\.\d{3} +\d+\.\d%$", table, re.MULTILINE)

    lines = profiled.stdout.splitlines()
    told = [line for line in lines if line.startswith("Profile of ")]
    assert told == [
        f"Profile of steps 3 to 4, slowed down by it: open {folder}/rank0.trace.json.gz at "
        "https://ui.perfetto.dev; costliest operators: rank0.operators.txt beside it"
    ]
    memory = [line for line in lines if "profile_memory" in line and "PerfLog" not in line]
    assert memory == [
        "Notice: profile_memory has no effect: PyTorch keeps no history of the memory of a CPU"
    ]
    assert "profiler" not in profiled.stderr  # its library prints lines of its own


@pytest.mark.parametrize(
    ("steps", "flags", "line"),
    [
        ("5:20", (), "Profile of steps 5 to 6, where the run ended, "),
        ("7:9", (), "Notice: profile_steps 7:9: no step is profiled, since the run ends at step 6 "
                    "(max_steps); pass earlier steps"),
        ("2:4", ("--target_mlm_accuracy", 0.1),
         "Notice: profile_steps 2:4: no step is profiled, since the run ended before them; pass "
         "steps that the run has"),
        ("1:2", (), "Profile of step 1, slowed"),
    ],
)  # fmt: skip
def test_a_run_that_ends_too_early_says_so_once(
    mini_data: Path, tmp_path: Path, steps: str, flags: tuple[object, ...], line: str
) -> None:
    done = train(tmp_path, mini_data, "--profile_steps", steps, *flags)
    assert done.returncode in (0, NOT_REACHED), done.stderr
    told = [
        text
        for text in done.stdout.splitlines()
        if re.match("Profile of|Notice: .*profile_steps", text)
    ]
    assert len(told) == 1
    assert told[0].startswith(line)
    assert any((tmp_path / "runs").glob("run-*/profile")) is line.startswith("Profile")


def test_steps_are_those_of_the_run(mini_data: Path, tmp_path: Path) -> None:
    """A resumed run counts on."""
    first = train(tmp_path, mini_data, "--save_checkpoint")
    assert first.returncode == NOT_REACHED, first.stderr
    more = ("--resume", "auto", "--max_steps", 9)
    late = train(tmp_path, mini_data, *more, "--profile_steps", "8:9", "--save_checkpoint")
    assert "Profile of step 8, " in late.stdout
    gone = train(tmp_path, mini_data, *more[:2], "--max_steps", 12, "--profile_steps", "2:4")
    assert (
        "Notice: profile_steps 2:4: no step is profiled, since the run goes on with step 10; pass, "
        "for example, 11:13"
    ) in gone.stdout


def test_a_profile_that_cannot_be_written_does_not_end_the_run(
    mini_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "bert_pretraining.runtime.step_trace.write_whole", lambda path, _: path.parent.rmdir() or
        path.write_bytes(b""),
    )  # fmt: skip
    done = train(tmp_path, mini_data, "--profile_steps", "2:4")
    assert done.returncode == NOT_REACHED
    assert re.search(
        r"^Warning: rank 0: cannot write the profile \S+rank0.trace.json.gz \(No such file or "
        r"directory\); the run goes on without it$",
        done.stderr, re.MULTILINE,
    )  # fmt: skip
    assert "Profile of" not in done.stdout


def test_after_a_signal_the_checkpoint_comes_before_the_trace(
    mini_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sent it may not wait for a long trace."""
    saved: list[str] = []
    update, stop = Update.__call__, StepTrace.stop

    def signalled(self: Update, batches: list) -> object:
        signal.raise_signal(signal.SIGTERM)
        return update(self, batches)

    def stopped(self: StepTrace) -> None:
        saved.extend(path.name for path in (tmp_path / "runs").glob("run-*/*.pt"))
        stop(self)

    monkeypatch.setattr(Update, "__call__", signalled)
    monkeypatch.setattr(StepTrace, "stop", stopped)
    done = train(tmp_path, mini_data, "--profile_steps", "1:5")
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert saved == ["model.ckpt-1.pt"]
    assert "Profile of step 1, where the run ended" in done.stdout


def test_an_error_amid_the_profile_is_the_error_that_is_told(
    mini_data: Path, tmp_path: Path
) -> None:
    """In a process of its own: PyTorch 2.13 crashes if its profiler still runs at the end."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from bert_pretraining.__main__ import main\n"
        "from bert_pretraining.training.update import Update\n"
        "calls, call = [], Update.__call__\n"
        "def fails(self, batches):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4:\n"
        "        raise RuntimeError('broken on purpose')\n"
        "    return call(self, batches)\n"
        "Update.__call__ = fails\n"
        "sys.exit(main())\n"
    )
    words = (*FLAGS, "--config", "CPUx1x1", "--data_dir", mini_data, "--profile_steps", "3:6")
    done = subprocess.run(
        [sys.executable, program, "train", *map(str, words), "--output_dir", tmp_path / "runs"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "base")},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == EXIT_CRASH
    assert done.stderr.splitlines()[-1] == "Error: RuntimeError: broken on purpose"
    assert "Profile of" not in done.stdout


@pytest.mark.slow
def test_another_type_of_device_is_profiled_as_far_as_it_can(
    testdev: Path, mini_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = command(
        "train", *FLAGS, "--config", "CPUx1x1", "--device", "testdev", "--data_dir", mini_data,
        "--output_dir", tmp_path / "runs", "--profile_steps", "2:4", "--profile_memory",
        cwd=tmp_path, PYTHONPATH=f"{ROOT / 'base'}{os.pathsep}{testdev}",
    )  # fmt: skip
    assert done.returncode == NOT_REACHED, done.stderr
    (folder,) = (tmp_path / "runs").glob("run-*/profile")
    assert set(ranges(folder / "rank0.trace.json.gz")) >= PARTS
    assert "the memory of testdev devices" in done.stdout
    assert (
        "Notice: the profile shows the host alone: torch.profiler recorded no work of the testdev "
        "device; docs/performance.md names the causes"
    ) in done.stdout
