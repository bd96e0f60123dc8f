"""A series of runs: order, seeds, resumption, and what happens to runs that fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from bert_pretraining.errors import UserError
from bert_pretraining.runtime.lock import FolderLock
from bert_pretraining.submission import series
from bert_pretraining.submission.series import Series, run_series
from helpers import command

FLAGS = ("--name", "mini", "--config", "CPUx1x1", "--submission_org", "ACME")
LOG = (
    ':::MLLOG {"key": "run_start", "value": null, "time_ms": 1000, "metadata": {}}\n'
    ':::MLLOG {"key": "eval_accuracy", "value": 0.5, "time_ms": 2000, '
    '"metadata": {"epoch_num": 64}}\n'
)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "describe_machine", lambda: {"number_of_nodes": "1"})


def launcher(
    monkeypatch: pytest.MonkeyPatch, ends: Sequence[int | type[BaseException]]
) -> list[tuple[int, Path]]:
    """In the real launcher's place: each launch leaves a log and ends as told."""
    launched: list[tuple[int, Path]] = []

    def launch(flags: Sequence[str], seed: int, folder: Path, dropped: bool, show: bool) -> int:
        end = ends[len(launched)]
        launched.append((seed, folder))
        if end != 2:
            log = folder / f"run-{len(launched)}" / "mllog.txt"
            log.parent.mkdir(parents=True)
            log.write_text(LOG)
        else:
            (folder / "terminal.txt").write_text("Notice: x\nError: no data directory; make it\n")
        if not isinstance(end, int):
            raise end
        return end

    monkeypatch.setattr(series, "launch_run", launch)
    return launched


def start(directory: Path, runs: int = 3, say: Callable[[str], None] = print) -> Series:
    return run_series(directory, FLAGS, runs, "never", show=False, say=say)


def test_runs_follow_each_other_with_seeds_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = launcher(monkeypatch, [0, 3, 0])
    done = start(tmp_path / "series")
    assert [run.outcome for run in done.runs] == ["converged", "not converged", "converged"]
    assert done.unconverged == 1 and done.complete
    assert [folder.name for _, folder in launched] == ["run_00", "run_01", "run_02"]
    assert len({seed for seed, _ in launched}) == 3
    assert [run.seed for run in done.runs] == [seed for seed, _ in launched]
    assert series.load_series(tmp_path / "series") == done
    assert len(series.series_logs(tmp_path / "series")) == 3
    assert not any(run.caches_dropped for run in done.runs)


def test_no_seed_is_taken_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([5, 5, 5, 7, 7, 9])
    monkeypatch.setattr(series.seeds, "draw_master_seed", lambda: next(drawn))
    launcher(monkeypatch, [0, 0, 0])
    assert [run.seed for run in start(tmp_path).runs] == [5, 7, 9]


def test_a_failed_run_is_kept_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = launcher(monkeypatch, [0, 1, 0])
    done = start(tmp_path)
    assert [run.outcome for run in done.runs][1] == "failed with exit code 1"
    assert len(launched) == 3 and done.unconverged == 1
    assert series.find_log(tmp_path / "run_01") is not None


def test_a_series_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = launcher(monkeypatch, [0, KeyboardInterrupt, 0])
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path)
    lines: list[str] = []
    done = start(tmp_path, say=lines.append)
    assert lines[0] == (
        "2 of 3 runs are there; run_01 was ended from outside and counts as a failed run"
    )
    assert [folder.name for _, folder in launched] == ["run_00", "run_01", "run_02"]
    assert [run.outcome for run in done.runs] == ["converged", "ended from outside", "converged"]
    assert start(tmp_path, say=lines.append) == done
    assert len(launched) == 3


def test_a_run_that_refuses_its_input_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher(monkeypatch, [0, 2, 0, 0])
    with pytest.raises(UserError, match="no data directory; make it"):
        start(tmp_path)
    assert len(series.load_series(tmp_path).runs) == 1
    assert [run.outcome for run in start(tmp_path).runs] == ["converged"] * 3


def test_a_command_that_never_ran_may_be_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher(monkeypatch, [2, 0, 0])
    with pytest.raises(UserError, match="no data directory"):
        start(tmp_path)
    assert run_series(tmp_path, ("--name", "other"), 2, "never", False, print).complete


def test_another_command_is_another_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher(monkeypatch, [0, 0, 0])
    start(tmp_path)
    with pytest.raises(UserError, match="holds a series of 3 runs of '--name mini"):
        start(tmp_path, runs=10)
    with pytest.raises(UserError, match="or pass another --output_dir"):
        run_series(tmp_path, (*FLAGS, "--max_steps", "9"), 3, "never", False, print)


def test_two_processes_do_not_share_a_series(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher(monkeypatch, [0, 0, 0])
    with (
        FolderLock(tmp_path),
        pytest.raises(UserError, match="in use by another 'submission run'"),
    ):
        start(tmp_path)
    assert start(tmp_path).complete


def test_a_damaged_state_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"holds no series\.json"):
        series.load_series(tmp_path)
    (tmp_path / "series.json").write_text('{"runs": 3')
    with pytest.raises(UserError, match=r"series\.json cannot be read"):
        start(tmp_path)


def test_page_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switch = tmp_path / "drop_caches"
    monkeypatch.setattr(series, "DROP_CACHES", switch)
    assert series.drop_page_caches("never") == (False, "not dropped (--drop_caches never)")
    assert not switch.exists()
    assert series.drop_page_caches("auto") == (True, "dropped")
    assert switch.read_text() == "3\n"
    monkeypatch.setattr(series, "DROP_CACHES", tmp_path / "absent" / "drop_caches")
    dropped, words = series.drop_page_caches("auto")
    assert not dropped and "not dropped" in words
    with pytest.raises(UserError, match="run as root"):
        series.drop_page_caches("required")


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ("--name mini --config CPUx1x1", "pass --submission_org ORG"),
        ("--submission_org ACME", "name no configuration"),
        ("--name mini --config CPUx1x1 --submission_org A --seed 5", "--seed after --"),
        ("--name mini --config CPUx1x1 --submission_org A --output_dir x", "--output_dir after"),
        ("--name mini --config CPUx1x1 --submission_org A --max_restarts 2", "--max_restarts"),
        (
            "--name mini --config CPUx1x1 --submission_org A --exit_zero_without_target",
            "exit code 3",
        ),
        ("--name mini --config CPUx1x1 --submission_org A --max_step 2", "mean --max_steps"),
        ("--name iluvatar --config V100x2x8 --submission_org A", "starts runs on one"),
        ("--name mini --config CPUx1x1 --submission_org A", "data/datasets/bert_mini"),
    ],
)
def test_bad_usage_is_one_line(training: str, words: str, tmp_path: Path) -> None:
    done = command(
        "submission", "run", "--runs", 2, "--drop_caches", "never", "--", *training.split(),
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr


def test_what_the_rules_say_of_the_batch_comes_first(tmp_path: Path) -> None:
    """Before any time is spent; the run itself lacks its data here."""
    done = command(
        "submission", "run", "--runs", 2, "--drop_caches", "never", "--", "--name", "nvidia",
        "--config", "H200x1x8", "--submission_org", "ACME", "--data_dir", "nowhere",
        cwd=tmp_path,
    )  # fmt: skip
    first = done.stdout.splitlines()[0]
    assert first == (
        "Ruleset 4.1.0, global batch size 448: the reference was run at 448; at least 2,274,732 "
        "samples in the mean"
    )
    assert done.returncode == 2 and "nowhere" in done.stderr
    assert json.loads((tmp_path / "output/submission/series.json").read_text())["runs"] == []
