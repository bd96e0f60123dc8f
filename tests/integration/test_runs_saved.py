"""Runs that cannot go on, or whose output goes away: what was trained is saved first."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bert_pretraining.data.loader import TrainingLoader
from bert_pretraining.errors import UserError
from bert_pretraining.logs.line_file import LineFile
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.training import feed
from helpers import OF_A_BUSY_MACHINE, ROOT, error_lines, in_process, perf_events
from launching import Launch

BATCH = 8
FLAGS = ("--name", "mini", "--config", "CPUx1x1", "--device", "cpu", "--seed", 5, "--log_freq", 1,
         "--train_batch_size", BATCH, "--num_eval_examples", 64)  # fmt: skip
STEPS, BAD = 6, 4  # updates; the batch (from 0) that cannot be read


def train(data: Path, output_dir: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    words = (*FLAGS, "--data_dir", data, "--output_dir", output_dir, *flags)
    return in_process("train", *words, cwd=output_dir.parent)


def saved(output_dir: Path) -> tuple[Path, dict]:
    """The only checkpoint of a folder's last run."""
    (path,) = sorted(output_dir.glob("run-*"))[-1].glob("model.ckpt-*.pt")
    return path, torch.load(path, weights_only=True)


def test_data_that_goes_away(
    mini_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away once, it changes nothing. Away for good, the run is saved, and goes on bit for bit."""
    failures = 0

    class Failing(TrainingLoader):
        def __init__(self, shards: list, order: object, config: object) -> None:
            super().__init__(shards, order, config)
            self.first = config.samples_seen // BATCH

        def __iter__(self) -> Iterator[PackedBatch]:
            nonlocal failures
            for number, batch in enumerate(super().__iter__(), self.first):
                if number == BAD and failures:
                    failures -= 1
                    cause = OSError(5, "Input/output error")
                    raise UserError("/data/part_7: input/output error", "copy it") from cause
                yield batch

    monkeypatch.setattr("bert_pretraining.training.session.TrainingLoader", Failing)
    monkeypatch.setattr(feed, "SECONDS_TO_RETRY", 0.0)
    flags = ("--max_steps", STEPS, "--save_checkpoint", "--min_samples_to_start_checkpoints", 1000)
    whole = train(mini_data, tmp_path / "whole", *flags)
    assert whole.returncode == 3, whole.stderr
    _, expected = saved(tmp_path / "whole")

    failures = 1
    retried = train(mini_data, tmp_path / "retried", *flags)
    assert retried.returncode == 3, retried.stderr
    notice = "Notice: /data/part_7: input/output error; trying again in 0 s"
    assert notice in retried.stderr.splitlines()
    assert_same(saved(tmp_path / "retried")[1], expected)

    failures = 2
    ended = train(mini_data, tmp_path / "ended", *flags)
    assert ended.returncode == 2
    assert error_lines(ended.stderr) == [
        "Error: /data/part_7: input/output error; see that its folder and disk are there, then go "
        "on with --resume auto"
    ]
    path, content = saved(tmp_path / "ended")
    assert path.name == f"model.ckpt-{BAD}.pt"
    assert f"Checkpoint: {path}" in ended.stdout
    assert f"(stopped by an error) after {BAD} steps" in ended.stdout
    assert content["state"]["samples_seen"] == BAD * BATCH
    assert '"status": "aborted"' in path.with_name("mllog.txt").read_text()
    resumed = train(mini_data, tmp_path / "ended", *flags, "--resume", "auto")
    assert resumed.returncode == 3, resumed.stderr
    assert_same(saved(tmp_path / "ended")[1], expected)

    # The warm-up of this configuration is longer than six steps.
    notices = perf_events(whole.stdout, "NOTICE")
    (told,) = (one for one in notices if one["kind"] not in OF_A_BUSY_MACHINE)
    assert told["kind"] == "warmup_too_long"
    assert f"Notice: {told['text']}" in whole.stdout.splitlines()
    (facts,) = perf_events(whole.stdout, "EVALUATION_SET")
    assert 0.05 < facts["commonest_share"] < 0.2


def assert_same(one: dict, other: dict) -> None:
    for part in ("model", "optimizer"):
        assert_same_tensors(one[part], other[part])
    for name in ("global_steps", "samples_seen", "num_trained_samples"):
        assert one["state"][name] == other["state"][name], name


def assert_same_tensors(one: object, other: object) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            assert_same_tensors(one[name], other[name])


def test_a_log_file_on_a_full_disk(
    mini_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(LineFile):
        def line(self, text: str) -> None:
            if '"STEP_END"' in text:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/perflog.txt")
            super().line(text)

    monkeypatch.setattr("bert_pretraining.logs.run_log.LineFile", Full)
    done = train(mini_data, tmp_path / "out", "--max_steps", STEPS)
    assert done.returncode == 2
    assert error_lines(done.stderr) == [
        "Error: cannot write /full/perflog.txt (No space left on device); free disk space or mend "
        "that disk, then go on with --resume auto"
    ]
    path, _ = saved(tmp_path / "out")
    # The first step's line was lost. The run stops after the update that follows at the latest.
    assert path.name in ("model.ckpt-1.pt", "model.ckpt-2.pt")
    assert "Evaluation" not in path.with_name("perflog.txt").read_text()
    assert '"key": "run_stop"' in path.with_name("mllog.txt").read_text()


def test_a_disk_too_full_for_logs_and_checkpoint(mini_data: Path, tmp_path: Path) -> None:
    words = ("train", *FLAGS, "--data_dir", mini_data, "--output_dir", tmp_path / "out",
             "--max_steps", STEPS)  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 8; exec "$@"', "-", sys.executable, "-m", "bert_pretraining",
         *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "base")}, capture_output=True, text=True,
        timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = error_lines(done.stderr)
    assert line.startswith("Error: what was trained since the last checkpoint is lost, because")
    assert "cannot write" in line
    assert "File too large" in line


def test_a_last_checkpoint_that_cannot_be_written_is_told_on_stderr(
    mini_data: Path, tmp_path: Path
) -> None:
    words = ("train", *FLAGS, "--data_dir", mini_data, "--output_dir", tmp_path / "out",
             "--max_steps", 2, "--save_checkpoint", "--target_mlm_accuracy", 0.0001)  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 200; exec "$@"', "-", sys.executable, "-m", "bert_pretraining",
         *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "base")}, capture_output=True, text=True,
        timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr  # of the result
    lost = (
        "Warning: what was trained since the last checkpoint is lost, because none can be written"
    )
    assert done.stderr.count(lost) == 1


def test_a_reader_that_goes_away_in_mid_run(mini_data: Path, tmp_path: Path) -> None:
    """The launcher and both ranks write to the same pipe."""
    words = ("launch", *FLAGS, "--data_dir", mini_data, "--output_dir", tmp_path / "out",
             "--nproc_per_node", 2, "--max_steps", 100000)  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "bert_pretraining", *map(str, words)], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "base")}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if '"STEP_END"' in line:
            break
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=600) == 4, errors
    assert error_lines(errors) == []
    assert "Notice: nobody reads stdout (Broken pipe): stopping" in errors.splitlines()
    path, content = saved(tmp_path / "out")
    assert content["state"]["global_steps"] >= 1
    assert '"event": "FINISHED"' in path.with_name("perflog.txt").read_text()


RANK_1_CANNOT_READ = f"""
import bert_pretraining.training.session as session
from bert_pretraining.__main__ import main
from bert_pretraining.data.loader import TrainingLoader
from bert_pretraining.training import feed
class Failing(TrainingLoader):
    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if rank == 1 and (number == {BAD} or feed.SECONDS_TO_RETRY == 0.1):
                feed.SECONDS_TO_RETRY = 0.1
                raise OSError(116, "Stale file handle", "/data/part_7")
            yield batch
session.TrainingLoader = Failing
feed.SECONDS_TO_RETRY = 0.0
sys.argv = ["bert_pretraining", *sys.orig_argv[4:]]
main()
"""


def test_one_rank_that_cannot_read_stops_all_and_all_are_saved(
    mini_data: Path, tmp_path: Path
) -> None:
    flags = (*FLAGS[6:], "--output_dir", tmp_path / "out", "--max_steps", 100000)
    code, errors = Launch(tmp_path, mini_data, RANK_1_CANNOT_READ, *flags).end()
    assert code == 2, errors
    assert error_lines(errors) == [
        "Error: cannot read the training data ([Errno 116] Stale file handle: '/data/part_7'); "
        "see to its disk, then go on with --resume auto"
    ]
    path, content = saved(tmp_path / "out")
    assert path.name == f"model.ckpt-{BAD}.pt"
    assert content["state"]["samples_seen"] == BAD * BATCH * 2
