"""Logs -> runs: published logs, ours, DeepSparkHub's, and what is no log of one run."""

from __future__ import annotations

from pathlib import Path

import pytest

from bert_pretraining.errors import UserError
from bert_pretraining.logs.reading.loading import load_runs
from bert_pretraining.logs.reading.runs import Run
from helpers import REFERENCE, needs_reference
from log_files import mllog_line, perflog_line, write_run


def one(path: Path) -> Run:
    (run,) = load_runs([path])
    return run


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


@needs_reference
def test_nvidias_published_run() -> None:
    run = one(REFERENCE / "mlperf_log" / "nvidia_v4.1_h200_result_0.txt")
    assert (run.name, run.source, run.status) == (
        "nvidia_v4.1_h200_result_0", "MLPerf log", "success",
    )  # fmt: skip
    assert (run.organization, run.platform, run.division) == (
        "NVIDIA", "1xNVIDIA HGX H200", "closed",
    )  # fmt: skip
    assert (run.seed, run.global_batch_size, run.eval_samples) == (25661, 768, 10000)
    # run_start 1715252859435, run_stop 1715253160303, init_start 1715252818435
    assert run.run_seconds == pytest.approx(300.868)
    assert run.init_seconds == pytest.approx(40.999)
    assert len(run.evaluations) == 16
    assert run.evaluations[0].samples == 150336
    assert run.evaluations[0].seconds == pytest.approx(20.387)
    assert run.target_point == run.evaluations[-1]
    assert run.sequences_per_second == pytest.approx(2398552 / 300.868)
    # Its tracked_stats; the one after run_stop is of the whole run, and no point.
    assert len(run.training) == 16
    assert run.training[0].sequences_per_second == pytest.approx(8337.46, abs=0.01)
    assert run.hyperparameters["opt_base_learning_rate"] == 0.00096
    assert run.faults == ()


@needs_reference
def test_a_log_of_one_evaluation() -> None:
    run = one(REFERENCE / "mlperf_log" / "minimal_closed.txt")
    assert (run.global_batch_size, run.train_samples, run.training) == (448, 2400000, ())
    assert run.run_seconds == pytest.approx(599.003)


def test_a_runs_folder_joins_both_logs(tmp_path: Path) -> None:
    run = one(write_run(tmp_path / "run-1", seed=3))
    assert run.source == "MLPerf log and PerfLog"
    assert (run.global_batch_size, run.seed, run.status) == (448, 3, "success")
    start, first = run.evaluations[:2]
    assert (start.samples, start.seconds) == (0, 1.5)
    assert start.accuracy == pytest.approx(0.341, abs=0.01)
    # The MLPerf log has no loss: it is the PerfLog's of the same evaluation.
    assert all(point.loss == pytest.approx(4.47 - 4.4 * point.accuracy, abs=0.02)
               for point in run.evaluations)  # fmt: skip
    assert first.samples == run.training[0].samples == 335 * 448
    assert run.training[0].learning_rate == pytest.approx(0.000383, abs=1e-6)
    # Both logs in one file, as the terminal shows them, make the same run.
    text = "".join(
        (tmp_path / "run-1" / f"{name}.txt").read_text() for name in ("perflog", "mllog")
    )
    (tmp_path / "stdout.txt").write_text(text)
    whole = one(tmp_path / "stdout.txt")
    assert (whole.evaluations, whole.training) == (run.evaluations, run.training)


def deepsparkhub(*, begin: int = 1000, steps: range = range(1, 5), finished: bool = True) -> list:
    """Lines as DeepSparkHub writes them: times in milliseconds, no MLPerf log, no `step`."""
    lines = [
        perflog_line("INIT_START", None, begin - 900),
        perflog_line("INIT_EVALUATION", {"eval_loss": 3.0, "eval_mlm_accuracy": 0.34, "time": 1},
                     begin - 100),
        perflog_line("INIT_END", {"other": "Finish initialization"}, begin - 50),
        perflog_line("TRAIN_BEGIN", None, begin),
    ]  # fmt: skip
    for step in steps:
        figures = {"loss": 3.0 - step / 10, "mlm_acc": 0.4, "num_trained_samples": 216 * step,
                   "global_steps": step, "learning_rate": 4e-4, "seq/s": 180.0}  # fmt: skip
        lines.append(perflog_line("STEP_END", figures, begin + 1000 * step))
    value = {"global_steps": 4, "eval_loss": 1.3, "eval_mlm_accuracy": 0.7203, "time": 9.0}
    lines.append(perflog_line("EVALUATION", value, begin + 5000))
    lines.append(perflog_line("TRAIN_END", None, begin + 6000))
    if finished:
        value = {"e2e_time": 7.5, "converged": True, "raw_train_time": 5.9, "init_time": 0.8}
        lines.append(perflog_line("FINISHED", value, begin + 6100))
    return lines


def test_deepsparkhubs_perflog(tmp_path: Path) -> None:
    run = one(write(tmp_path / "rank0.log", *deepsparkhub()))
    assert (run.source, run.status, run.global_batch_size) == ("PerfLog", "success", 216)
    assert (run.run_seconds, run.init_seconds) == (5.9, 0.8)
    assert [(point.samples, point.seconds) for point in run.evaluations] == [(0, 0.0), (864, 5.0)]
    assert run.target_point is run.evaluations[1]
    assert [point.seconds for point in run.training] == [1.0, 2.0, 3.0, 4.0]
    assert (run.seed, run.eval_samples, run.platform) == (None, None, None)
    cut = one(write(tmp_path / "cut.log", *deepsparkhub(finished=False)))
    assert (cut.status, cut.run_seconds) == ("unfinished", 6.0)


def test_only_the_lowest_rank_counts(tmp_path: Path) -> None:
    lines = deepsparkhub()
    others = [line.replace('"rank": 0', '"rank": 1').replace("864", "999") for line in lines]
    mixed = [line for pair in zip(others, lines, strict=True) for line in pair]
    assert one(write(tmp_path / "both.log", *mixed)).training[-1].samples == 864


def test_a_finish_without_evaluation_is_one(tmp_path: Path) -> None:
    """FlagPerf's form: its EVALUATE has no figures, its FINISHED has the last ones."""
    lines = [line for line in deepsparkhub(finished=False) if "EVALUATION" not in line]
    lines.append(perflog_line("EVALUATE", None, 5000))
    lines.append(perflog_line("FINISHED", {"converged": False, "final_mlm_accuracy": 0.6}, 7000))
    run = one(write(tmp_path / "log.txt", *lines))
    assert [(point.samples, point.accuracy) for point in run.evaluations] == [(864, 0.6)]
    assert run.status == "aborted"


def test_folders_of_runs_and_names(tmp_path: Path) -> None:
    for system in ("a", "b"):
        for number in (10, 2):
            place = tmp_path / system / "bert"
            place.mkdir(parents=True, exist_ok=True)
            write(place / f"result_{number}.txt", mllog_line("run_start", None, 1))
    names = [run.name for run in load_runs([tmp_path / "a" / "bert", tmp_path])]
    assert names == ["a/result_2", "a/result_10", "b/result_2", "b/result_10"]
    write_run(tmp_path / "output" / "run-2", 1)
    write_run(tmp_path / "output" / "run-10", 2)
    runs = load_runs([tmp_path / "output", tmp_path / "output" / "run-2"])
    assert [run.name for run in runs] == ["run-2", "run-10"]  # each once
    assert one(tmp_path / "output" / "run-2" / "mllog.txt").name == "run-2"


def test_a_run_that_has_no_end(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", seed=1)
    for name in ("mllog.txt", "perflog.txt"):
        lines = (folder / name).read_text().splitlines()[:14]
        (folder / name).write_text("\n".join(lines) + '\n:::MLLOG {"names')
    run = one(folder)
    assert (run.status, run.run_seconds, run.target_point) == ("unfinished", None, None)
    assert len(run.evaluations) == 2
    assert len(run.faults) == 2
    assert "mllog.txt:15: not a whole :::MLLOG record" in run.faults[0]


def test_an_accuracy_that_is_none_is_a_fault(tmp_path: Path) -> None:
    lines = [
        mllog_line("run_start", None, 0),
        mllog_line("eval_accuracy", "0.72", 5, epoch_num=10),
        mllog_line("eval_accuracy", 0.5, 6),
        mllog_line("eval_accuracy", 0.5, 7, samples_count=20),
    ]
    run = one(write(tmp_path / "log.txt", *lines))
    assert [point.samples for point in run.evaluations] == [20]
    assert [fault.split(":")[1] for fault in run.faults] == ["2", "3"]


def test_what_is_no_log_of_one_bert_run(tmp_path: Path) -> None:
    write(tmp_path / "empty.txt")
    with pytest.raises(UserError, match=r"empty\.txt: no :::MLLOG and no \[PerfLog\] line"):
        load_runs([tmp_path / "empty.txt"])
    stop = mllog_line("run_stop", None, 2, status="success")
    start = mllog_line("run_start", None, 1)
    write(tmp_path / "two.txt", start, stop, start, stop)
    with pytest.raises(UserError, match=r"two\.txt: holds several runs \(run_start in line 3"):
        load_runs([tmp_path / "two.txt"])
    write(tmp_path / "other.txt", mllog_line("submission_benchmark", "resnet", 1))
    with pytest.raises(UserError, match="a log of 'resnet', not of BERT"):
        load_runs([tmp_path / "other.txt"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="pass log files or a run's folder"):
        load_runs([tmp_path / "folder"])


def test_planned_samples_are_not_trained_ones(tmp_path: Path) -> None:
    """Published logs have train_samples before run_start: of the schedule, or of the data set."""
    lines = [
        mllog_line("train_samples", 156811560, 0),
        mllog_line("run_start", None, 1000),
        mllog_line("eval_accuracy", 0.73, 3000, epoch_num=400),
        mllog_line("run_stop", None, 3000, status="success"),
    ]
    run = one(write(tmp_path / "log.txt", *lines))
    assert (run.train_samples, run.sequences_per_second) == (400, 200.0)


def test_evaluations_that_count_epochs(tmp_path: Path) -> None:
    """Published logs have epoch_num 1 for every evaluation: only their times are known."""
    lines = [mllog_line("run_start", None, 0)]
    lines += [
        mllog_line("eval_accuracy", accuracy, 1000 * number, epoch_num=1)
        for number, accuracy in enumerate((0.4, 0.6, 0.73), 1)
    ]
    lines += [mllog_line("train_samples", 2976768, 3001)]
    run = one(write(tmp_path / "log.txt", *lines))
    assert [point.samples for point in run.evaluations] == [None, None, 2976768]
    assert [point.seconds for point in run.evaluations] == [1.0, 2.0, 3.0]
    assert run.target_point.accuracy == 0.73
    assert "log.txt:4: epoch_num of eval_accuracy counts epochs" in run.faults[0]
    # The same evaluation from each of two ranks is one.
    lines = [line for line in lines for _ in range(2 if "eval_accuracy" in line else 1)]
    assert len(one(write(tmp_path / "log.txt", *lines)).evaluations) == 3
    # Neither is an epoch's number that is less than an update's sequences one of sequences.
    lines = [
        mllog_line("global_batch_size", 448, 0),
        mllog_line("run_start", None, 0),
        mllog_line("eval_accuracy", 0.73, 5, epoch_num=2),
    ]
    assert one(write(tmp_path / "log.txt", *lines)).evaluations[0].samples is None
