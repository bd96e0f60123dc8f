"""A series of real runs on the mini data set, and what it becomes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bert_pretraining.submission.series import find_log, load_series
from bert_pretraining.submission.tree import read_result
from helpers import ROOT, command


def test_two_short_runs_become_a_tree(mini_data: Path, tmp_path: Path) -> None:
    series_dir = tmp_path / "series"
    run = [
        "submission", "run", "--runs", 2, "--output_dir", series_dir, "--drop_caches", "never",
        "--", "--name", "mini", "--config", "CPUx1x1", "--data_dir", mini_data,
        "--max_steps", 2, "--submission_org", "ACME", "--submission_platform", "laptop",
    ]  # fmt: skip
    done = command(*run, cwd=tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "0 of 2 runs converged" in done.stdout
    series = load_series(series_dir)
    assert [entry.exit_code for entry in series.runs] == [3, 3]
    logs = [read_result(find_log(series_dir / entry.folder)) for entry in series.runs]
    assert [log.value("seed") for log in logs] == [entry.seed for entry in series.runs]
    assert logs[0].value("seed") != logs[1].value("seed")
    assert [log.value("cache_clear") for log in logs] == [False, False]
    assert logs[0].last("run_stop").time_ms < logs[1].first("run_start").time_ms
    terminal = series_dir / "run_00" / "terminal.txt"
    assert "| Model" in terminal.read_text()

    again = command(*run, cwd=tmp_path)
    assert "2 of 2 runs are there" in again.stdout and load_series(series_dir) == series

    done = command(
        "submission", "assemble", "--series", series_dir, "--system", "laptop", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "Note: 2 logs; a submission has 10" in done.stdout

    done = command("submission", "check", "ACME", "--json", cwd=tmp_path)
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["tools"]["repo checker"]["passed"]
    assert report["tools"]["system descriptions"]["passed"]
    found = {(Path(each["path"]).name, each["what"].split(":")[0]) for each in report["findings"]}
    assert ("bert", "2 logs result_*.txt, not 10") in found
    assert ("result_0.txt", "cache_clear is False") in found
    assert ("result_1.txt", "eval_samples is 1114") in found


def test_sigterm_ends_the_run_and_the_series(mini_data: Path, tmp_path: Path) -> None:
    command_line = (
        f"-m bert_pretraining submission run --runs 2 --output_dir {tmp_path}/series --drop_caches "
        f"never -- --name mini --config CPUx1x1 --data_dir {mini_data} --max_steps 100000 "
        "--target_mlm_accuracy 1.0 --submission_org ACME"
    )
    process = subprocess.Popen(
        [sys.executable, *command_line.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "base")},
        stdout=subprocess.DEVNULL,
    )
    try:
        for _ in range(1200):
            log = find_log(tmp_path / "series" / "run_00")
            if log is not None and "eval_accuracy" in log.read_text():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    (run,) = load_series(tmp_path / "series").runs
    assert run.outcome == "ended from outside"
    assert read_result(log).status != "success"
