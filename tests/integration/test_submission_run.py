"""A series of real runs on the mini data set, and what it becomes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bert_pretraining.submission.series import find_log, load_series
from bert_pretraining.submission.tree import read_result
from helpers import ROOT, command


def wait_for_run_start(folder: Path) -> None:
    for _ in range(12_000):
        log = find_log(folder)
        if log is not None and "run_start" in log.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"no run began in {folder}")


@pytest.mark.slow
def test_a_stopped_series_goes_on_and_becomes_a_tree(mini_data: Path, tmp_path: Path) -> None:
    """Two runs: the first ends by itself, SIGTERM ends the second."""
    series_dir = tmp_path / "series"
    run = (
        f"submission run --runs 2 --output_dir {series_dir} --drop_caches never -- --name mini "
        f"--config CPUx1x1 --data_dir {mini_data} --max_steps 300 --eval_steps 300 "
        "--submission_org ACME --submission_platform laptop"
    ).split()
    process = subprocess.Popen(
        [sys.executable, "-m", "bert_pretraining", *run],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "base")},
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for_run_start(series_dir / "run_01")
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 128 + signal.SIGTERM
    finally:
        process.kill()
    series = load_series(series_dir)
    outcomes = [entry.outcome for entry in series.runs]
    assert outcomes == ["not converged", "ended from outside"]
    logs = [read_result(find_log(series_dir / entry.folder)) for entry in series.runs]
    assert [log.value("seed") for log in logs] == [entry.seed for entry in series.runs]
    assert logs[0].value("seed") != logs[1].value("seed")
    assert [log.value("cache_clear") for log in logs] == [False, False]
    assert logs[0].last("run_stop").time_ms < logs[1].first("run_start").time_ms
    assert logs[0].status == "aborted" and logs[1].status != "success"
    assert "| Model" in (series_dir / "run_00" / "terminal.txt").read_text()

    again = command(*run, cwd=tmp_path)
    assert again.returncode == 3 and "0 of 2 runs converged" in again.stdout
    assert "2 of 2 runs are there; run_01 was ended from outside" in again.stdout
    assert load_series(series_dir) == series

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
    assert ("result_1.txt", "cache_clear is False") in found
    assert ("result_0.txt", "eval_samples is 1114") in found
