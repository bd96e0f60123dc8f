"""The MLPerf log, by the real checkers: recorded runs of BERT-large, whole, ended and resumed."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bert_pretraining.logs import mllog_line
from bert_pretraining.logs.mlperf import MlperfLog, run_status
from bert_pretraining.logs.reading.events import Event, mllog_events, perflog_events
from bert_pretraining.logs.reading.loading import load_runs
from bert_pretraining.logs.sinks import Hyperparameters, Resumption, Work
from bert_pretraining.logs.tensor_names import mlperf_tensor_names
from bert_pretraining.submission.log_checks import check_log
from bert_pretraining.submission.tree import read_result
from helpers import REFERENCE, make_model, needs_reference, tiny_config
from mlperf_logs import (
    BELOW_TARGET,
    RULESETS,
    Clock,
    Recording,
    facts,
    failures,
    parameters,
    record,
)

SUBMISSION = {"submission_org": "ACME", "submission_platform": "8xH200"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def values(events: list[Event], key: str) -> list[object]:
    return [event.value for event in events if event.key == key]


def named_by_the_rules(layers: int) -> list[str]:
    """MLPerf's tensors, spelled out apart from the code under test."""
    normalized = ["LayerNorm/gamma", "LayerNorm/beta"]
    dense = ["attention/self/query", "attention/self/key", "attention/self/value"]
    dense += ["attention/output/dense", "intermediate/dense", "output/dense"]
    embeddings = ["word_embeddings", "position_embeddings", "token_type_embeddings", *normalized]
    names = [f"bert/embeddings/{name}" for name in embeddings]
    for layer, (part, kind) in itertools.product(
        range(layers), itertools.product(dense, ("kernel", "bias"))
    ):
        names.append(f"bert/encoder/layer_{layer}/{part}/{kind}")
    for layer, part, norm in itertools.product(
        range(layers), ("attention/output", "output"), normalized
    ):
        names.append(f"bert/encoder/layer_{layer}/{part}/{norm}")
    head = ["output_bias", "transform/dense/kernel", "transform/dense/bias"]
    head += [f"transform/{norm}" for norm in normalized]
    names += ["bert/pooler/dense/kernel", "bert/pooler/dense/bias"]
    names += [f"cls/predictions/{name}" for name in head]
    return [*names, "cls/seq_relationship/output_weights", "cls/seq_relationship/output_bias"]


@pytest.mark.parametrize(("layers", "count"), [(24, 398), (2, 46)])
def test_tensor_names_are_mlperf_s_each_once(layers: int, count: int) -> None:
    names = mlperf_tensor_names(parameters(layers))
    assert len(names) == count
    assert sorted(names) == sorted(named_by_the_rules(layers))
    # The state_dict names the word embedding twice.
    state = make_model(tiny_config(num_hidden_layers=layers)).state_dict()
    assert sorted(mlperf_tensor_names(state)) == sorted(names)


@needs_reference
def test_tensor_names_are_those_of_a_published_log() -> None:
    published = mllog_events(REFERENCE / "mlperf_log" / "nvidia_v4.1_h200_result_0.txt")
    tensors = [
        event.metadata["tensor"] for event in published if event.key == "weights_initialization"
    ]
    assert sorted(mlperf_tensor_names(parameters(24))) == sorted(tensors)


@pytest.mark.parametrize(
    "name", ["weight", "bert.pooler.dense.scale", "module.bert.pooler.dense.weight"]
)
def test_a_name_that_is_no_parameter_is_no_tensor(name: str) -> None:
    with pytest.raises(ValueError, match="no parameter of BERT"):
        mlperf_tensor_names([name])


@pytest.mark.parametrize("division", ["closed", "open"])
@pytest.mark.parametrize("batch_size", [448, 3072])
def test_a_run_that_reaches_the_target_passes_every_ruleset(
    clock: Clock, tmp_path: Path, division: str, batch_size: int
) -> None:
    log = record(
        clock, tmp_path, 2_400_000, batch_size=batch_size, submission_division=division,
        **SUBMISSION,
    )  # fmt: skip
    assert failures(log) == {ruleset: [] for ruleset in RULESETS}
    events = mllog_events(log)
    (trained,) = values(events, "train_samples")
    accuracies = [event for event in events if event.key == "eval_accuracy"]
    assert accuracies[-1].metadata["epoch_num"] == trained
    assert trained % batch_size == 0
    assert values(events, "global_batch_size") == [batch_size]
    assert values(events, "eval_samples") == [10_000]
    assert values(events, "cache_clear") == [False]


def test_order_and_times_of_the_events(clock: Clock, tmp_path: Path) -> None:
    started = clock.now
    events = mllog_events(record(clock, tmp_path, 2_400_000))
    # Which, but for the many between.
    order = [event.key for event in events if event.kind != "POINT_IN_TIME"]
    assert order[:5] == ["init_start", "init_stop", "run_start", "block_start", "epoch_start"]
    assert order[5:-3] == ["eval_start", "eval_stop"] * ((len(order) - 8) // 2)
    assert order[-3:] == ["block_stop", "epoch_stop", "run_stop"]
    assert [event.key for event in events][-5:-2] == ["block_stop", "epoch_stop", "train_samples"]
    at = {event.key: event.time_ms / 1000 - started for event in events}
    assert (at["init_start"], at["init_stop"], at["run_start"]) == (0, 35, 35)
    trained, evaluations = values(events, "train_samples")[0], len(values(events, "eval_accuracy"))
    # Training and evaluations, the first included, are timed.
    assert at["run_stop"] == pytest.approx(35 + trained / 4000 + evaluations, abs=0.01)


def test_metadata_name_the_place_of_the_event(clock: Clock, tmp_path: Path) -> None:
    """The seed checker tells runs apart by it, and a reader finds the code."""
    run = Recording(clock, tmp_path)
    run.log.close()
    (seed,) = (event for event in mllog_events(run.log.folder / "mllog.txt") if event.key == "seed")
    assert seed.metadata["file"].endswith("tests/mlperf_logs.py")
    source = Path(seed.metadata["file"]).read_text().splitlines()
    assert "self.log.hyperparameters(" in source[seed.metadata["lineno"] - 1]


def test_ten_runs_pass_the_reference_convergence_points(clock: Clock, tmp_path: Path) -> None:
    """The samples that MLPerf's RCP checker reads are those that were trained."""
    results = tmp_path / "bert"
    results.mkdir()
    trained: list[int] = []
    for number in range(10):
        log = record(clock, tmp_path / "runs", 2_400_000 + 20_000 * number, seed=100 + number)
        (results / f"result_{number}.txt").write_bytes(log.read_bytes())
        trained += values(mllog_events(log), "train_samples")
    checker = [sys.executable, "-m", "mlperf_logging.rcp_checker"]
    flags = ["--rcp_version", "4.1.0", "--log_output", "/dev/null"]
    done = subprocess.run(
        [*checker, str(results), *flags], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "RCP test PASSED" in done.stderr
    without_extremes = sorted(trained)[1:-1]
    assert f"Submission mean epochs: {sum(without_extremes) / 8:.4f}" in done.stderr


def every_event(log: MlperfLog) -> None:
    flags = {"submission_division": "open", "submission_org": "ACME", "submission_status": "cloud"}
    log.launched(facts(caches_cleared=True, **flags))
    log.hyperparameters(Hyperparameters(7, {"opt_epsilon": 1e-6, "global_batch_size": 448}))
    log.weights_loaded(["bert.pooler.dense.weight"])
    log.clock_started()
    log.resumed(Resumption(Path("model.ckpt-3.pt"), 3, 1344, [], 0.5))
    log.evaluation_started(0)
    log.evaluation_stopped(0, 0.34085)
    log.evaluation_started(448)
    log.aborted(448, 10_000)


def test_without_mlperf_logging_the_lines_are_the_same(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for present in (True, False):
        if not present:
            monkeypatch.setitem(sys.modules, "mlperf_logging", None)
            monkeypatch.setitem(sys.modules, "mlperf_logging.mllog", None)
            assert mllog_line.line_maker() is mllog_line.plain_line
        lines: list[str] = []
        every_event(MlperfLog([lines.append]))
        written.append(lines)
    assert written[0] == written[1]
    assert len(written[0]) == 26
    for line in written[0]:
        record = json.loads(line.removeprefix(":::MLLOG "))
        assert list(record) == ["namespace", "time_ms", "event_type", "key", "value", "metadata"]
        assert record["metadata"]["file"] == __file__


def test_what_cannot_be_written_is_an_error() -> None:
    """mllog would write a line of its own that says so, and go on."""
    with pytest.raises(ValueError, match="Failed to encode"):
        MlperfLog([print]).evaluation_stopped(0, object())  # type: ignore[arg-type]

    def full(line: str) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        MlperfLog([full]).clock_started()


def test_run_status() -> None:
    assert (run_status(True), run_status(False)) == ("success", "aborted")


def test_an_ended_run_is_aborted_once(clock: Clock, tmp_path: Path) -> None:
    run = Recording(clock, tmp_path)
    run.start_clock()
    run.start_evaluated()
    run.train(100)
    run.log.evaluation_started(run.state)  # and ended within it
    run.log.aborted(run.state)
    run.log.aborted(run.state)
    run.log.close()
    events = mllog_events(run.log.folder / "mllog.txt")
    assert [event.metadata["status"] for event in events if event.key == "run_stop"] == ["aborted"]
    assert values(events, "train_samples") == [44_800]
    assert values(events, "eval_samples") == [10_000]
    kinds = Counter(
        event.key.rsplit("_", 1)[0] for event in events if event.kind != "POINT_IN_TIME"
    )
    assert set(kinds.values()) == {2, 4}  # each start has its stop; two evaluations
    # All is in order but that the target was not reached.
    found = failures(run.log.folder / "mllog.txt")
    assert found == dict.fromkeys(RULESETS, BELOW_TARGET)


def test_an_end_after_the_end_changes_nothing(clock: Clock, tmp_path: Path) -> None:
    run = Recording(clock, tmp_path)
    run.start_clock()
    run.start_evaluated()
    run.train_to_target(2_400_000)
    run.log.trained(run.state)
    run.log.aborted(run.state)
    run.log.close()
    events = mllog_events(run.log.folder / "mllog.txt")
    assert [event.metadata["status"] for event in events if event.key == "run_stop"] == ["success"]


def test_an_end_before_the_clock_starts_is_no_run(clock: Clock, tmp_path: Path) -> None:
    run = Recording(clock, tmp_path)
    run.log.aborted(run.state)
    run.log.close()
    keys = [event.key for event in mllog_events(run.log.folder / "mllog.txt")]
    assert keys[-1] == "start_warmup_step"


def test_only_rank_0_writes(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Recording(clock, tmp_path, rank=1)
    run.start_clock()
    run.start_evaluated()
    run.train_to_target(2_400_000)
    run.log.trained(run.state)
    run.log.finished(run.state, "target")
    run.log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_cache_clear_says_what_was_done(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BERT_PRETRAINING_CACHES_DROPPED", "1")
    run = Recording(clock, tmp_path)
    run.log.close()
    assert values(mllog_events(run.log.folder / "mllog.txt"), "cache_clear") == [True]


@pytest.mark.parametrize(("scale", "said"), [(1.0, None), (2.0**20, 2.0**20)])
def test_the_loss_scale_at_the_end(
    clock: Clock, tmp_path: Path, scale: float, said: float | None
) -> None:
    """Also where fp16 is asked for on a device without it: the scale is then 1."""
    run = Recording(clock, tmp_path, precision="fp16")
    run.start_clock()
    run.train(10)
    run.step_logged(10, loss_scale=scale)
    perflog = run.finish("max_steps").with_name("perflog.txt")
    (finished,) = (one.value for one in perflog_events(perflog) if one.key == "FINISHED")
    assert finished.get("loss_scale") == said


def test_a_resumed_run_reports_its_part_and_says_so(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Recording(clock, tmp_path)
    run.log.clock_started()
    run.state.global_steps, run.state.num_trained_samples = 1000, 448_000
    run.state.eval_sequences = 10_000
    run.log.resumed(Path("model.ckpt-1000.pt"), run.state, [])
    run.train(1000)
    run.evaluate(0.721)
    run.state.converged = True
    run.step_logged(1000, evaluation_seconds=1.0)
    log = run.finish()
    (event,) = (event for event in mllog_events(log) if event.key == "resumed_from")
    assert event.value == 448_000
    assert event.metadata["global_steps"] == 1000
    # The official checkers do not look for it.
    (found,) = (each for each in check_log(read_result(log), "4.1.0") if "resumed" in each.what)
    assert (found.line, found.is_error) == (event.line, True)
    printed = capsys.readouterr().out
    assert "Resumed from step 1,000: times and sequences per second are of what came" in printed
    finished = json.loads(printed.split('"FINISHED", "value": ')[1].split(', "metadata"')[0])
    # 448,000 sequences at 4,000 a second, and one second of evaluation.
    assert finished["training_sequences_per_second"] == pytest.approx(448_000 / 113)
    assert finished["raw_train_time"] == pytest.approx(113)
    assert finished["resumed_from_step"] == 1000
    (loaded,) = load_runs([log.parent])
    assert loaded.train_samples == 896_000
    assert loaded.sequences_per_second == pytest.approx(448_000 / 113, rel=1e-3)


def test_speeds_count_skipped_updates_and_samples_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ten updates that were made, ten that were skipped; each of 448 sequences of 100 tokens."""
    run = Recording(Clock(monkeypatch), tmp_path / "output")
    run.start_clock()
    run.start_evaluated()
    run.train(10)
    run.clock.wait(10 * 448 / 4000)
    work = Work(20, 20 * 44_800, 1e12, None, {"data": 0.0, "forward_backward": 0.1})
    run.log.skipped(run.state, 10, 512.0)
    figures = {"loss": 1.5, "mlm_acc": 0.7, "learning_rate": 3e-4, "epoch": 0}
    run.log.steps(run.state, 10, 448, figures, None, work)
    run.log.trained(run.state)
    run.log.finished(run.state, "max_steps", work)
    run.log.close()
    values = {event.key: event.value for event in perflog_events(run.log.folder / "perflog.txt")}
    step, whole = values["STEP_END"], values["FINISHED"]
    assert step["num_trained_samples"] == 4480
    assert (step["seq/s"], step["tokens/s"]) == pytest.approx((4000, 400_000))
    assert whole["training_sequences_per_second"] == pytest.approx(4000)
    assert (whole["p_whole"], whole["p_train"], whole["p_core"]) == pytest.approx((4000,) * 3)
    assert whole["tokens/s"] == pytest.approx(400_000)
