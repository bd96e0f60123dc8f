"""Notices of runs that go wrong quietly: each at its time, once, and none on healthy runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from bert_pretraining.logs.sinks import Resumption
from bert_pretraining.logs.watch_settings import faults_of_schedule, no_evaluation
from log_files import accuracy_at
from mlperf_logs import facts
from watched import SHAPE, Watched


def test_a_healthy_run_gets_no_notice() -> None:
    """MLPerf's curve, with batches that are noisy and a little worse than evaluations."""
    run = Watched()
    run.start(0.341)
    for step in range(10, 1000, 10):
        accuracy = accuracy_at(step * 3000, 2_400_000)
        run.logged(step, accuracy - 0.03 + 0.02 * (-1) ** step, 4.47 - 4.4 * accuracy)
        if step % 100 == 0:
            run.evaluated(step, accuracy, 4.47 - 4.4 * accuracy)
    assert run.found == {}


def test_a_run_from_random_weights_gets_no_notice() -> None:
    """It stays at the commonest token for long."""
    run = Watched(init_checkpoint="random")
    run.start(0.00003, 11.1)
    for step, accuracy, loss in ((100, 0.02, 8.5), (200, 0.05, 7.2), (300, 0.05, 7.1),
                                 (400, 0.05, 7.05), (500, 0.06, 6.9)):  # fmt: skip
        run.logged(step, accuracy, loss)
        run.evaluated(step, accuracy, loss)
    assert run.found == {}


def test_a_little_worse_is_no_fall() -> None:
    run = Watched()
    run.start(0.34)
    for step, accuracy in ((100, 0.28), (200, 0.34), (300, 0.25), (400, 0.35)):
        run.evaluated(step, accuracy)
    assert run.found == {}


def test_below_the_start_twice_in_a_row() -> None:
    run = Watched()
    run.start(0.34)
    run.evaluated(100, 0.30)
    assert run.found == {}
    run.evaluated(200, 0.29)
    text = (
        "MLM accuracy is below the start's 0.3400 in 2 evaluations in a row: 0.3000 after 6,400 "
        "sequences and 0.2900 after 12,800 sequences: the learning rate 0.004 is likely too high; "
        "start again with a lower one, such as --learning_rate 0.0004, or with more --warmup_steps"
    )
    assert run.found == {"accuracy_below_start": text}
    run.evaluated(300, 0.01)
    assert list(run.found) == ["accuracy_below_start"], "the same fault, told already"


@pytest.mark.parametrize(
    ("flags", "accuracies"),
    [
        ({}, (0.338, 0.337, 0.338)),  # less than three standard errors of 10,000 tokens
        ({}, (0.20, 0.24, 0.29)),  # on its way back
        ({"warmup_steps": 300}, (0.28, 0.27, 0.28)),
        ({"masked_tokens": 12, "sequences": 1}, (0.25, 0.1667, 0.25)),
    ],
    ids=["noise", "recovery", "warm-up", "one sequence"],
)
def test_below_the_start_without_a_fault(
    flags: dict[str, object], accuracies: tuple[float, ...]
) -> None:
    run = Watched(**flags)
    run.start(0.34)
    for step, accuracy in enumerate(accuracies, 1):
        run.evaluated(100 * step, accuracy)
    assert "accuracy_below_start" not in run.found


def flat_from_random(run: Watched, evaluations: int, every: int, fall: float = 0.0) -> None:
    """Evaluations at the commonest token, whose loss falls by `fall` from one to the next."""
    run.start(0.00003, 11.1)
    for number in range(1, evaluations + 1):
        run.evaluated(number * every, 0.0504 + 0.0004 * (-1) ** number, 7.3 - number * fall)


def test_a_run_that_learns_no_more_than_the_commonest_token() -> None:
    run = Watched(init_checkpoint="random", max_steps=1000, warmup_steps=100)
    flat_from_random(run, evaluations=11, every=50)  # of which two are in the warm-up
    assert run.found == {}
    run.evaluated(600, 0.0508, 7.301)
    text = run.found["no_progress"]
    assert text.startswith(
        "no better than guessing: MLM accuracy is 0.0508 after 38,400 sequences, and always "
        "guessing the commonest token has 0.0500; the loss is 7.3010, and was 7.3000 after 9,600 "
        "sequences: pass another --learning_rate (it is 0.004)"
    )


def test_a_run_that_has_learnt_nothing_by_half_of_its_steps() -> None:
    """Its loss falls, but with a rate that is far too low."""
    run = Watched(init_checkpoint="random", max_steps=1000, learning_rate=1e-5)
    flat_from_random(run, evaluations=10, every=50, fall=0.02)
    assert run.found == {}, "450 steps"
    run.evaluated(550, 0.0508, 7.08)
    assert "the loss is 7.0800, and was 7.2800 after 3,200 seq" in run.found["no_progress"]


@pytest.mark.parametrize(
    ("flags", "every", "fall"),
    [
        ({"max_steps": 2000}, 100, 0.002),  # 0.018 in ten evaluations
        ({}, 10, 0.0),  # 90 steps say little
        ({"max_steps": 100_000}, 100, 0.0),  # less than a tenth of the run
        ({"masked_tokens": 20}, 100, 0.0),
    ],
    ids=["loss falls", "few steps", "long run", "small set"],
)
def test_a_plateau_of_a_healthy_run(flags: dict[str, object], every: int, fall: float) -> None:
    run = Watched(**{"init_checkpoint": "random", "max_steps": 1000, **flags})
    flat_from_random(run, evaluations=10, every=every, fall=fall)
    assert run.found == {}


def test_an_evaluation_far_below_the_start() -> None:
    run = Watched(learning_rate=1.4)
    run.start(0.3423)
    run.evaluated(100, 0.0044, 3112.8)
    run.evaluated(200, 0.0040, 1888.5)
    assert run.found == {
        "accuracy_fell": "MLM accuracy fell to 0.0044 after 6,400 sequences (loss 3113), from "
        "0.3423 at the start: the learning rate 1.4 is likely too high; start again with a lower "
        "one, such as --learning_rate 0.14, or with more --warmup_steps"
    }


def test_the_best_accuracy_counts_not_the_start() -> None:
    run = Watched()
    run.start(0.34)
    run.evaluated(100, 0.6)
    run.evaluated(200, 0.29)
    assert "from 0.6000 after 6,400 sequences" in run.found["accuracy_fell"]


def test_batches_show_a_fall_before_the_next_evaluation() -> None:
    run = Watched(eval_steps=5000)
    run.start(0.34)
    for step in range(1, 5):
        run.logged(step, 0.01, 9.0)
    assert run.found == {}, "one bad batch is no fall"
    run.logged(5, 0.01, 9.0)
    assert "on the last 5 logged batches" in run.found["accuracy_fell"]


def test_small_batches_need_more_of_them() -> None:
    run = Watched(eval_steps=5000, train_batch_size=1)
    run.start(0.34)
    for step in range(1, 256):
        run.logged(step, 0.01)
    assert run.found == {}
    run.logged(256, 0.01)
    assert list(run.found) == ["accuracy_fell"]


def test_from_random_weights_a_loss_that_explodes() -> None:
    run = Watched(init_checkpoint="random")
    run.start(0.00003, 11.1)
    run.evaluated(100, 0.01, 310.0)
    assert "fell to 0.0100 after 6,400 sequences (loss 310)" in run.found["accuracy_fell"]


def test_a_resumed_run_that_has_lost_what_it_knew() -> None:
    run = Watched()
    run.watch.resumed(Resumption(Path("model.ckpt-900.pt"), 900, 57_600, [], 0.61))
    for step in range(901, 906):
        run.logged(step, 0.02)
    assert "from 0.6100 before the run was resumed" in run.found["accuracy_fell"]
    assert "compare the checkpoint with an older one" in run.found["accuracy_fell"]


def test_start_weights_that_know_less_than_the_commonest_token() -> None:
    run = Watched(baseline=0.051)
    run.start(0.0102)
    text = run.found["start_weights_useless"]
    assert text.startswith("the start checkpoint's MLM accuracy is 0.0102 (loss 2.7)")
    assert "the commonest token has 0.0510" in text
    assert "checkpoint inspect" in text


def test_the_commonest_token_of_a_small_set_says_little() -> None:
    run = Watched(baseline=0.3, masked_tokens=10, sequences=1)
    run.start(0.2)
    assert run.found == {}


def test_heads_that_start_anew_know_nothing_yet() -> None:
    run = Watched(baseline=0.051, missing_weights="random")
    run.start(0.0001, 11.2)
    assert run.found == {}


def test_a_target_that_the_start_weights_meet() -> None:
    run = Watched(target_mlm_accuracy=0.33)
    run.start(0.341)
    assert run.found["target_met_at_start"] == (
        "the start checkpoint already meets the target (0.3410 >= 0.33): stopping after one step; "
        "to train on, pass a higher --target_mlm_accuracy"
    )


def test_a_loss_that_does_not_move() -> None:
    run = Watched(learning_rate=1e-9, warmup_steps=150)
    run.start(0.341, 2.7)
    for step in (100, 200, 300):  # the first is in the warm-up
        run.evaluated(step, 0.3412, 2.699)
    assert run.found == {}
    run.evaluated(400, 0.3412, 2.698)
    text = run.found["loss_does_not_move"]
    assert "2.7000 at the start, 2.6980 after 25,600 sequences" in text
    assert "1e-09 is likely too low" in text


def test_a_loss_scale_that_collapses() -> None:
    run = Watched()
    run.start(0.341)
    scale = 2.0**20
    for skipped in range(1, 17):
        scale /= 2
        run.watch.skipped(10 * skipped, 1, skipped, scale)
        assert bool(run.found) == (scale == 16), scale
    assert "fell from 1.04858e+06 to 16" in run.found["loss_scale_collapsed"]


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        ({"max_steps": 3, "warmup_steps": 100}, ["warmup_too_long"]),
        ({"max_steps": 100, "warmup_steps": 100}, ["warmup_too_long"]),
        ({"max_steps": 101, "warmup_steps": 100}, []),
        ({"max_steps": 2, "warmup_steps": 1}, []),
        ({"max_steps": 1000, "max_samples_termination": 640, "warmup_steps": 50},
         ["warmup_too_long"]),
        ({"max_steps": 100, "warmup_steps": 150, "start_warmup_step": -100}, []),
        ({"max_steps": 50, "learning_rate": 0}, ["learning_rate_zero"]),
    ],
)  # fmt: skip
def test_what_a_schedule_alone_shows(flags: dict[str, object], kinds: list[str]) -> None:
    assert list(Watched(**{"max_steps": 1000, **flags}).found) == kinds
    config = facts(**{**SHAPE, **flags}).config
    assert [kind for kind, _ in faults_of_schedule(config)] == kinds


def test_a_warm_up_that_is_too_long_says_where_the_rate_ends() -> None:
    values = {**SHAPE, "max_steps": 3, "warmup_steps": 100, "learning_rate": 0.014}
    ((_, text),) = faults_of_schedule(facts(**values).config)
    assert text.startswith("the warm-up of 100 steps is longer than the run of 3: the learning")
    assert "ends at 0.00028" in text
    assert text.endswith("pass fewer --warmup_steps, or more --max_steps")


@pytest.mark.parametrize(
    ("flags", "is_late"),
    [
        ({"max_steps": 50, "eval_steps": 200}, False),
        ({"max_steps": 100, "eval_steps": 200}, True),
        ({"max_steps": 200, "eval_steps": 200}, False),
        ({"max_steps": 500, "eval_interval_samples": 150_000}, True),
        ({"max_steps": 20, "eval_interval_samples": 150_000}, False),
    ],
)
def test_evaluations_that_never_come(flags: dict[str, object], is_late: bool) -> None:
    """A short run is a trial; a long one cannot end at its target."""
    run = Watched(**flags)
    run.start(0.34)
    run.watch.training_began()
    assert list(run.found) == ["no_evaluation"] * is_late


def test_where_the_target_is_met_at_the_start_no_evaluation_is_missing() -> None:
    run = Watched(max_steps=500, eval_steps=1000, target_mlm_accuracy=0.33)
    run.start(0.34)
    run.watch.training_began()
    assert list(run.found) == ["target_met_at_start"]


@pytest.mark.parametrize(("eval_steps", "is_late"), [(50, False), (51, True)])
def test_evaluations_that_the_user_wants_but_does_not_get(eval_steps: int, is_late: bool) -> None:
    config = facts(**{**SHAPE, "max_steps": 50, "eval_steps": eval_steps}).config
    assert bool(no_evaluation(config, chose_evaluations=True)) == is_late
