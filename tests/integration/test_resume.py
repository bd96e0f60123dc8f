"""Runs that are stopped and go on: bit for bit what they would have been."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers import ROOT, MakeOnce, command, error_lines, in_process, perf_events

STEPS, HALF = 6, 3
FLAGS = ("--name", "mini", "--config", "CPUx1x1", "--device", "cpu", "--seed", 5, "--log_freq", 1,
         "--train_batch_size", 8, "--num_eval_examples", 64, "--save_checkpoint",
         "--min_samples_to_start_checkpoints", 0)  # fmt: skip
SHARDED = ("--nproc_per_node", 2, "--distributed_lamb", "--batching", "balanced", "--eval_steps", 5)


def train(data: Path, output_dir: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    """One rank, in this process."""
    words = (*FLAGS, "--data_dir", data, "--output_dir", output_dir, *flags)
    return in_process("train", *words, cwd=output_dir.parent)


def launch(data: Path, output_dir: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    words = (*FLAGS, "--data_dir", data, "--output_dir", output_dir, *flags)
    return command("launch", *words, cwd=output_dir.parent)


def saved(output_dir: Path, step: int) -> dict:
    """The checkpoint of a step; only one run may have written it."""
    (path,) = output_dir.glob(f"run-*/model.ckpt-{step}.pt")
    return torch.load(path, weights_only=True)


def losses(output: str) -> dict[int, tuple]:
    """What a step computes, without what depends on the clock."""
    keys = ("loss", "mlm_acc", "grad_norm", "learning_rate", "epoch", "iter_dataloader_idx")
    return {
        event["global_steps"]: tuple(event[key] for key in keys)
        for event in perf_events(output, "STEP_END")
    }


def assert_equal(one: object, other: object, where: str = "") -> None:
    """All tensors and numbers of two checkpoints are the same bits; the clock's aside."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            if key not in ("job", "run_number"):
                assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_equal(left, right, f"{where}/{index}")
    else:
        assert one == other, where


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, ("--gradient_accumulation_steps", 3)),
        pytest.param(2, SHARDED, marks=pytest.mark.slow),
        pytest.param(4, (), marks=pytest.mark.slow),
    ],
    ids=["1 rank, accumulation", "2 ranks, distributed LAMB, balanced", "4 ranks"],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    mini_data: Path, tmp_path: Path, ranks: int, flags: tuple
) -> None:
    """Two ranks: see also the test of torn files."""
    flags = (*flags, "--nproc_per_node", ranks, "--eval_steps", 5, "--max_steps", STEPS)
    run = train if ranks == 1 else launch
    per_step = 8 * ranks * (3 if ranks == 1 else 1)
    whole = run(
        mini_data, tmp_path / "whole", *flags, "--num_samples_per_checkpoint", HALF * per_step
    )
    assert whole.returncode == 3, whole.stderr

    (made,) = (tmp_path / "whole").glob(f"run-2*/model.ckpt-{HALF}.pt")
    # In the middle of a shard, and of an epoch.
    state = torch.load(made, weights_only=True)["state"]
    assert 0 < state["samples_seen"] == HALF * per_step
    resumed = run(mini_data, tmp_path / "resumed", *flags, "--init_checkpoint", made)
    assert resumed.returncode == 3, resumed.stderr
    assert f"Resumed: {made}, step {HALF}, {HALF * per_step} sequences\n" in resumed.stdout
    assert "not bit-identical" not in resumed.stdout
    assert_same_from(HALF, whole.stdout, resumed.stdout)
    assert_equal(saved(tmp_path / "whole", STEPS), saved(tmp_path / "resumed", STEPS))
    # Speed is that of the part that was trained here.
    (finished,) = perf_events(resumed.stdout, "FINISHED")
    here = finished["training_sequences_per_second"] * finished["raw_train_time"]
    assert here == pytest.approx((STEPS - HALF) * per_step, rel=1e-6)


def assert_same_from(step: int, whole: str, resumed: str) -> None:
    """What was printed of the steps and evaluations after `step` of runs of STEPS steps."""
    expected = losses(whole)
    assert losses(resumed) == {after: expected[after] for after in range(step + 1, STEPS + 1)}
    evaluations = [
        {event["global_steps"]: (event["eval_loss"], event["eval_mlm_accuracy"])
         for event in perf_events(output, "EVALUATION")}
        for output in (whole, resumed)
    ]  # fmt: skip
    assert set(evaluations[0]) == {5, 6}
    assert evaluations[1] == evaluations[0]


@pytest.fixture(scope="session")
def series(mini_data: Path, make_once: MakeOnce) -> Path:
    """The folder of a run of 2 ranks with checkpoints of steps 2, 4 and 6, and its output.txt."""

    def make(folder: Path) -> None:
        folder.mkdir()
        done = launch(mini_data, folder / "output", *SHARDED, "--max_steps", STEPS,
                      "--num_samples_per_checkpoint", 32)  # fmt: skip
        assert done.returncode == 3, done.stderr
        (made,) = (folder / "output").glob("run-*")
        (made / "output.txt").write_text(done.stdout)

    (folder,) = (make_once("series", make) / "output").glob("run-*")
    assert sorted(path.name for path in folder.glob("*.pt")) == [
        f"model.ckpt-{step}.pt" for step in (2, 4, 6)
    ]
    return folder


def test_another_number_of_ranks_and_another_batch_go_on_at_the_same_place(
    mini_data: Path, tmp_path: Path, series: Path
) -> None:
    done = train(mini_data, tmp_path / "out", "--nproc_per_node", 1, "--train_batch_size", 4,
                 "--max_steps", 9, "--init_checkpoint", series / "model.ckpt-6.pt")  # fmt: skip
    assert done.returncode == 3, done.stderr
    (notice,) = (line for line in done.stdout.splitlines() if "not bit-identical" in line)
    assert "train_batch_size 8 -> 4" in notice
    assert "ranks 2 -> 1" in notice
    assert "global batch size 16 -> 4" in notice
    assert "max_steps 6 -> 9" in notice
    steps = perf_events(done.stdout, "STEP_END")
    assert [event["num_trained_samples"] for event in steps] == [100, 104, 108]
    state = saved(tmp_path / "out", 9)["state"]
    assert state["samples_seen"] == 6 * 16 + 3 * 4
    assert state["order"]["lanes"] == 2  # as it was, so that no sequence comes twice


def test_what_is_torn_or_foreign_is_passed_over(
    mini_data: Path, tmp_path: Path, series: Path
) -> None:
    folder = tmp_path / "out" / "run-0"
    folder.mkdir(parents=True)
    contents = {step: (series / f"model.ckpt-{step}.pt").read_bytes() for step in (2, 4, 6)}
    (folder / "model.ckpt-2.pt").write_bytes(contents[2])
    flipped = bytearray(contents[4])
    flipped[len(flipped) // 2] ^= 16
    (folder / "model.ckpt-4.pt").write_bytes(flipped)
    (folder / "model.ckpt-6.pt").write_bytes(contents[6][: len(contents[6]) // 2])
    (folder / "model.ckpt-7.pt").write_bytes(b"")
    (folder / "model.ckpt-8.pt.partial").write_bytes(contents[6])
    weights = torch.load(series / "model.ckpt-6.pt", weights_only=True)["model"]
    torch.save({"model": weights}, folder / "model.ckpt-9.pt")
    done = launch(mini_data, tmp_path / "out", *SHARDED, "--max_steps", STEPS, "--resume", "auto")
    assert done.returncode == 3, done.stderr
    assert f"Resumed: {folder}/model.ckpt-2.pt, step 2, 32 sequences\n" in done.stdout
    passed = [line for line in done.stdout.splitlines() if "passed over" in line]
    assert len(passed) == 4, passed
    for line, step in zip(passed, (9, 7, 6, 4), strict=True):
        assert line.startswith(f"Notice: passed over {folder}/model.ckpt-{step}.pt: ")
    whole = torch.load(series / "model.ckpt-6.pt", weights_only=True)
    (path,) = (tmp_path / "out").glob("run-2*/model.ckpt-6.pt")
    mine = torch.load(path, weights_only=True)
    mine["state"]["config"], mine["state"]["config_hash"] = (
        whole["state"]["config"], whole["state"]["config_hash"])  # fmt: skip
    assert_equal(whole, mine)
    assert_same_from(2, (series / "output.txt").read_text(), done.stdout)


def test_required_never_and_a_run_that_had_finished(
    mini_data: Path, tmp_path: Path, series: Path
) -> None:
    refused = train(mini_data, tmp_path / "out", "--resume", "required")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(
        f"Error: --resume required: no whole training checkpoint in {tmp_path}/out; pass its"
    )
    last = series / "model.ckpt-6.pt"
    anew = train(mini_data, tmp_path / "out", "--init_checkpoint", last, "--resume", "never",
                 "--max_steps", 1)  # fmt: skip
    assert anew.returncode == 3
    assert f"Start weights: {last}" in anew.stdout
    assert "Resumed" not in anew.stdout
    done = train(mini_data, tmp_path / "out", "--init_checkpoint", last, "--max_steps", STEPS)
    assert done.returncode == 3, done.stderr
    assert perf_events(done.stdout, "STEP_END") == []
    assert f"Nothing to do: {last} has made 6 steps; to train on, pass" in done.stdout
    (finished,) = perf_events(done.stdout, "FINISHED")
    assert not {"p_whole", "p_train", "p_core", "tokens/s"} & set(finished), "nothing was trained"


def test_checkpoints_are_kept_by_number(mini_data: Path, tmp_path: Path) -> None:
    done = train(mini_data, tmp_path / "out", "--max_steps", 5, "--num_samples_per_checkpoint", 8,
                 "--keep_n_most_recent_checkpoints", 2)  # fmt: skip
    assert done.returncode == 3, done.stderr
    names = sorted(path.name for path in (tmp_path / "out").glob("run-*/*.pt*"))
    assert names == ["model.ckpt-4.pt", "model.ckpt-5.pt"]


def start(data: Path, output_dir: Path, *flags: object) -> subprocess.Popen[str]:
    """A run in the background, once it trains."""
    words = ("launch", *FLAGS, "--data_dir", data, "--output_dir", output_dir, *flags)
    process = subprocess.Popen(
        [sys.executable, "-m", "bert_pretraining", *(str(word) for word in words)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "base")},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if '"STEP_END"' in line:
            break
    else:
        raise AssertionError(process.stderr.read())
    return process


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_finishes_the_step_saves_and_says_so(
    mini_data: Path, tmp_path: Path, number: int
) -> None:
    flags = ("--nproc_per_node", 2, "--max_steps", 100000)
    process = start(mini_data, tmp_path / "out", *flags)
    process.send_signal(number)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 4, errors
    (path,) = (tmp_path / "out").glob("run-*/model.ckpt-*.pt")
    assert f"Checkpoint: {path}\n" in output
    assert f"stopped by signal {signal.Signals(number).name}" in output
    (log,) = (tmp_path / "out").glob("run-*/mllog.txt")
    assert '"status": "aborted"' in log.read_text()
    if number != signal.SIGTERM:
        return
    step = torch.load(path, weights_only=True)["state"]["global_steps"]
    again = train(mini_data, tmp_path / "out", "--max_steps", step + 2, "--resume", "required")
    assert again.returncode == 3, again.stderr
    assert f"Resumed: {path}, step {step}," in again.stdout


def test_a_second_run_into_one_folder_is_refused(mini_data: Path, tmp_path: Path) -> None:
    process = start(mini_data, tmp_path / "out", "--max_steps", 100000)
    try:
        second = train(mini_data, tmp_path / "out", "--max_steps", 1)
        assert second.returncode == 2
        (line,) = error_lines(second.stderr)
        assert line.startswith(
            f"Error: output_dir {tmp_path}/out is in use by another run (process "
        )
        assert len(list((tmp_path / "out").glob("run-*"))) == 1
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=600)
    assert process.returncode == 4
    assert train(mini_data, tmp_path / "out", "--max_steps", 1).returncode == 3


def test_a_full_disk_ends_no_run_and_no_file(mini_data: Path, tmp_path: Path) -> None:
    """A limit on the size of files, below a checkpoint's and above a log's."""
    output_dir = tmp_path / "out"
    words = ("train", *FLAGS, "--data_dir", mini_data, "--output_dir", output_dir, "--max_steps", 3,
             "--num_samples_per_checkpoint", 8)  # fmt: skip
    program = 'ulimit -f 1024; exec "$@"'  # KiB
    done = subprocess.run(
        ["bash", "-c", program, "-", sys.executable, "-m", "bert_pretraining",
         *(str(word) for word in words)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "base")}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    warnings = [line for line in done.stdout.splitlines() if line.startswith("Warning: ")]
    assert len(warnings) == 3, warnings
    for line in warnings:
        assert "no checkpoint was written" in line
        assert line.endswith(": File too large"), line
    assert list(output_dir.glob("run-*/*.pt*")) == []


@pytest.fixture
def saving_run(mini_data: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of 2 ranks, restarted once if need be, that has written a checkpoint."""
    process = start(mini_data, tmp_path / "out", "--nproc_per_node", 2, "--max_steps", 100000,
                    "--num_samples_per_checkpoint", 160, "--max_restarts", 1)  # fmt: skip
    while not list((tmp_path / "out").glob("run-*/model.ckpt-*.pt")):
        time.sleep(0.05)
    yield process
    for pid in [*processes_below(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_killed_rank_is_restarted_and_a_killed_run_goes_on(
    mini_data: Path, tmp_path: Path, saving_run: subprocess.Popen[str]
) -> None:
    (victim,) = (
        pid
        for pid in processes_below(saving_run.pid)
        if b"RANK=1" in environment_of(pid).split(b"\0")
    )
    os.kill(victim, signal.SIGKILL)
    for line in saving_run.stdout:
        if line.startswith("Resumed: "):
            break
    else:
        raise AssertionError(saving_run.stderr.read())
    for pid in [saving_run.pid, *processes_below(saving_run.pid)]:
        with contextlib.suppress(ProcessLookupError):  # ranks end with their launcher
            os.kill(pid, signal.SIGKILL)
    _, errors = saving_run.communicate(timeout=600)
    killed, restart = error_lines(errors)[:2]
    assert killed.startswith("Error: rank 1 was killed by SIGKILL")
    assert restart == "Restart 1 of 1"
    again = train(mini_data, tmp_path / "out", "--max_steps", 1, "--resume", "required")
    # More steps than that were made before: nothing is left to do.
    assert again.returncode == 3, again.stderr
    assert "Resumed: " in again.stdout


def environment_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def processes_below(pid: int) -> list[int]:
    """Children and theirs, the deepest first."""
    children = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            children.append(int(entry.name))
    return [below for child in children for below in [*processes_below(child), child]]
