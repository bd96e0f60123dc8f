"""Schedule, evaluation, stopping, loss scale, seeds: rules without side effects."""

from __future__ import annotations

import inspect
import json
import math
from importlib.resources import files

import numpy as np
import pytest
import torch

from bert_pretraining.errors import UserError
from bert_pretraining.logs.mlperf import run_status
from bert_pretraining.optim import LossScale, Schedule
from bert_pretraining.progress import (
    RunState,
    StepTriggers,
    check_update,
    evaluation_interval,
    stop_reason,
)
from bert_pretraining.runtime import seeds


def test_schedule_without_warmup_is_linear_decay() -> None:
    schedule = Schedule(3.5e-4, max_steps=14000)
    assert schedule(0) == 3.5e-4
    # The value that DeepSparkHub's published log shows at step 6000.
    assert schedule(6000) == pytest.approx(0.00019999999999999998, rel=1e-12)
    assert schedule(14000) == 0.0
    assert schedule(20000) == 0.0


def test_schedule_warms_up_from_zero_and_decays_from_the_start_of_training() -> None:
    schedule = Schedule(1.0, max_steps=1000, warmup_steps=100)
    assert [schedule(step) for step in (0, 50, 99)] == [0.0, 0.5, 0.99]
    assert schedule(100) == 0.9


def test_schedule_before_the_start_of_warmup_is_zero() -> None:
    schedule = Schedule(1e-3, max_steps=100, warmup_steps=10, start_warmup_step=5)
    assert [schedule(step) for step in (0, 5, 6)] == [0.0, 0.0, 1e-4]
    assert Schedule(1.0, max_steps=100, start_warmup_step=5)(0) == 1.0


def test_schedule_with_a_negative_start_of_warmup() -> None:
    # The RCP row for a global batch of 8192: 287 steps of warm-up from step -76.
    schedule = Schedule(2.88293e-3, max_steps=600, warmup_steps=287, start_warmup_step=-76)
    assert schedule(0) == pytest.approx(2.88293e-3 * 76 / 287)
    assert schedule(210) == pytest.approx(2.88293e-3 * 286 / 287)
    assert schedule(211) == pytest.approx(2.88293e-3 * (1 - 211 / 600))


@pytest.mark.parametrize(
    ("global_batch_size", "samples"),
    [(1, 150000), (2171, 150000), (2172, 175000), (4344, 200000), (6516, 225000), (8687, 250000),
     (10859, 275000), (13031, 300000), (15203, 325000)],
)  # fmt: skip
def test_evaluation_interval_of_the_rules(global_batch_size: int, samples: int) -> None:
    assert evaluation_interval(global_batch_size) == samples


def triggers(**changes: int) -> StepTriggers:
    values = {
        "samples_per_step": 10,
        "max_steps": 20,
        "max_samples": 150,
        "log_freq": 3,
        "eval_steps": 0,
        "eval_interval_samples": 40,
        "check_replicas_every": 5,
        "num_samples_per_checkpoint": 0,
        "min_samples_to_start_checkpoints": 0,
    }
    return StepTriggers(**{**values, **changes})


@pytest.mark.parametrize(("per_step", "interval"), [(448, 150000), (7, 10), (64, 64), (100, 30)])
def test_evaluation_is_due_at_the_first_step_past_each_interval(
    per_step: int, interval: int
) -> None:
    due_steps = triggers(samples_per_step=per_step, eval_interval_samples=interval)
    due = {step for step in range(1, 2000) if due_steps.evaluation_due(step, step * per_step)}
    expected = {
        math.ceil(k * interval / per_step) for k in range(1, 2000 * per_step // interval + 2)
    }
    assert due == {step for step in expected if step < 2000}


def test_samples_count_and_not_steps_where_a_run_resumed_with_another_batch() -> None:
    due_steps = triggers(samples_per_step=25)
    samples = [125, 150, 175, 200]  # after 10 steps of 10
    assert [count for count in samples if due_steps.evaluation_due(0, count)] == [125, 175, 200]


def test_an_update_of_more_than_the_training_set_is_refused() -> None:
    check_update(100, 100)
    with pytest.raises(UserError, match=r"takes 10,000,000 sequences .* holds 100; pass a lower"):
        check_update(10_000_000, 100)


def test_eval_steps_takes_the_place_of_the_schedule() -> None:
    due_steps = triggers(eval_steps=3, eval_interval_samples=1)
    assert [step for step in range(1, 8) if due_steps.evaluation_due(step, step * 10)] == [3, 6]


def test_stop_reasons() -> None:
    def reason(accuracy: float, steps: int, samples: int) -> str | None:
        state = RunState(steps, samples, eval_mlm_accuracy=accuracy)
        return stop_reason(state, target_mlm_accuracy=0.72, max_steps=10, max_samples=100)

    assert reason(0.71, 9, 99) is None
    assert reason(0.72, 9, 99) == "target"
    assert reason(0.72, 10, 100) == "target"
    assert reason(0.71, 10, 99) == "max_steps"
    assert reason(0.71, 9, 100) == "max_samples_termination"


def test_what_is_due_at_each_step() -> None:
    due_steps, steps = triggers(), range(1, 18)

    def due(due_steps: StepTriggers, what: str) -> list[int]:
        method = getattr(due_steps, what)
        names = list(inspect.signature(method).parameters)
        arguments = {"step": lambda step: step, "samples": lambda step: 10 * step}
        return [step for step in steps if method(*(arguments[name](step) for name in names))]

    assert due(due_steps, "logging_due") == [1, 3, 6, 9, 12, 15]
    assert due(due_steps, "evaluation_due") == [4, 8, 12, 16]
    assert due(due_steps, "replica_check_due") == [5, 10, 15]
    assert due(due_steps, "end_due") == [15, 16, 17]
    assert due(due_steps, "anything_due") == [1, 3, 4, 5, 6, 8, 9, 10, 12, 15, 16, 17]
    assert due(due_steps, "checkpoint_due") == []
    saving = triggers(num_samples_per_checkpoint=35, min_samples_to_start_checkpoints=80)
    assert due(saving, "checkpoint_due") == [11, 14]
    assert 11 in due(saving, "anything_due")
    seldom = triggers(log_freq=0, check_replicas_every=0, max_samples=10**6, max_steps=16)
    assert due(seldom, "logging_due") == [1]
    assert due(seldom, "replica_check_due") == []
    assert due(seldom, "end_due") == [16, 17]


def test_skipped_updates_count_neither_as_steps_nor_as_samples() -> None:
    run = RunState(global_steps=5, num_trained_samples=50)
    assert run.account(updates=3, skipped=0, last_finite=True, samples_per_step=10) == 8
    assert (run.global_steps, run.num_trained_samples, run.skipped_steps) == (8, 80, 0)
    assert run.account(updates=1, skipped=2, last_finite=False, samples_per_step=10) is None
    assert (run.global_steps, run.num_trained_samples, run.skipped_steps) == (9, 90, 2)
    assert run.account(updates=2, skipped=1, last_finite=True, samples_per_step=10) == 11
    assert (run.global_steps, run.num_trained_samples, run.skipped_steps) == (11, 110, 3)


def convergence_points() -> list[tuple[float, int, int, int]]:
    """The reference convergence points' learning rate, steps, warm-up and its start."""
    file = files("mlperf_logging") / "rcp_checker" / "training_4.1.0" / "rcps_bert.json"
    names = ("base_learning_rate", "learning_rate_training_steps")
    return [
        (
            *(point["Hyperparams"][f"opt_{name}"] for name in names),
            point["Hyperparams"]["num_warmup_steps"],
            point["Hyperparams"]["start_warmup_step"],
        )
        for point in json.loads(file.read_text()).values()
    ]


@pytest.mark.parametrize("row", convergence_points())
def test_schedule_equals_the_tensorflow_formula_and_has_the_same_bits_on_a_device(
    row: tuple[float, int, int, int],
) -> None:
    rate, max_steps, warmup, start = row
    schedule = Schedule(rate, max_steps, warmup, start)
    steps = np.arange(max_steps + 3)
    # polynomial_decay of degree 1, then the warm-up that replaces it, as in the reference's
    # optimization.py.
    decayed = rate * (1.0 - np.minimum(steps, max_steps) / max_steps)
    is_warmup = (steps - start) < warmup
    warming = rate * (steps - start) / max(warmup, 1)
    expected = np.where(is_warmup, warming, decayed)
    rates = [schedule(int(step)) for step in steps]
    np.testing.assert_allclose(rates, expected, rtol=1e-14)
    assert [schedule.at(torch.tensor(step)).item() for step in steps] == rates


def test_run_status() -> None:
    assert (run_status(True), run_status(False)) == ("success", "aborted")


def test_loss_scale_halves_and_doubles() -> None:
    good, bad = torch.tensor(True), torch.tensor(False)
    scale = LossScale(8.0, dynamic=True, growth_interval=3)
    scale.update(bad)
    assert scale.scale == 4.0
    for _ in range(3):
        scale.update(good)
    assert scale.scale == 8.0
    scale.update(good)
    scale.update(bad)
    assert (scale.scale, scale.good_steps, scale.skipped_in_a_row) == (4.0, 0, 1)
    for _ in range(30):
        scale.update(bad)
    assert (scale.scale, scale.skipped_in_a_row) == (1.0, 31)
    scale.update(good)
    assert (scale.scale, scale.skipped_in_a_row) == (1.0, 0)
    fixed = LossScale(8.0, dynamic=False)
    fixed.update(good)
    assert fixed.scale == 8.0
    fixed.update(bad)
    fixed.update(good)
    assert torch.isnan(fixed.scale)


def test_initial_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INIT_LOSS_SCALE", raising=False)
    assert LossScale.for_precision("fp16", 0.0).scale == 2.0**20
    assert LossScale.for_precision("fp16", 64.0).scale == 64.0
    assert LossScale.for_precision("bf16", 64.0).scale == 1.0
    monkeypatch.setenv("INIT_LOSS_SCALE", "1024")
    assert LossScale.for_precision("fp16", 0.0).scale == 1024.0
    for wrong in ("x", "0", "inf"):
        monkeypatch.setenv("INIT_LOSS_SCALE", wrong)
        with pytest.raises(UserError, match=f"INIT_LOSS_SCALE={wrong}"):
            LossScale.for_precision("fp16", 0.0)


def test_seeds_differ_by_purpose_and_never_change() -> None:
    assert seeds.derive(1, "shards", 0) == 2917168511
    every = [seeds.worker_seed(1, rank) for rank in range(100)] + [seeds.model_seed(1)]
    assert len(set(every)) == len(every)
    assert 0 <= seeds.draw_master_seed() < 2**31


@pytest.mark.parametrize("changes", [{"eval_steps": 7}, {"eval_interval_samples": 45}])
@pytest.mark.parametrize("limits", [{"max_steps": 20}, {"max_samples": 150}])
def test_updates_to_the_next_evaluation(changes: dict, limits: dict) -> None:
    values = {"max_steps": 99, "max_samples": 9999, "eval_steps": 0, "eval_interval_samples": 1000}
    rest = ("log_freq", "check_replicas_every", "num_samples_per_checkpoint")
    zeros = dict.fromkeys((*rest, "min_samples_to_start_checkpoints"), 0)
    triggers = StepTriggers(samples_per_step=10, **{**values, **zeros, **changes, **limits})
    evaluated = [
        step
        for step in range(1, 21)
        if triggers.evaluation_due(step, 10 * step) or triggers.end_due(step, 10 * step)
    ]
    for step in range(evaluated[-1]):
        ahead = triggers.updates_to_evaluation(step, 10 * step)
        assert step + ahead == next(due for due in evaluated if due > step)
        if triggers.end_due(step + 1, 10 * (step + 1)):
            break
    assert triggers.updates_to_evaluation(20, 200) == 0
