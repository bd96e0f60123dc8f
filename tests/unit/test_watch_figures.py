"""Notices of start accuracies and of losses that jump."""

from __future__ import annotations

import random
from pathlib import Path

import h5py
import numpy as np
import pytest

from bert_pretraining.logs.reading.loading import load_runs
from bert_pretraining.logs.watch_start import MINI_START, MLPERF_START
from helpers import REFERENCE, needs_reference
from log_files import accuracy_at
from watched import Watched

MLPERF = {"model": (24, 1024), "sequences": 10_000, "masked_tokens": 700_000}
MINI = {"sequences": 1114, "masked_tokens": MINI_START.masked_tokens, "baseline": 0.11}


@pytest.mark.parametrize("shape", [MLPERF, MINI], ids=["mlperf", "mini"])
@pytest.mark.parametrize(("accuracy", "is_unusual"), [(0.31, True), (0.3405, False), (0.37, True)])
def test_a_known_checkpoint_has_its_accuracy(
    shape: dict[str, object], accuracy: float, is_unusual: bool
) -> None:
    run = Watched(**shape)
    run.start(accuracy, 4.73)
    assert list(run.found) == ["start_accuracy_unusual"] * is_unusual


def test_an_unusual_start_says_what_was_expected() -> None:
    run = Watched(**MLPERF, init_checkpoint="/data/model.ckpt-28252.index")
    run.start(0.2, 5.5)
    assert run.found["start_accuracy_unusual"].startswith(
        "the start checkpoint's MLM accuracy is 0.2000 (loss 5.5); MLPerf's model.ckpt-28252 has "
        "0.32 to 0.36 on MLPerf's 10,000 evaluation sequences: the weights, the vocabulary or the "
        "evaluation set are likely others"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"model": (12, 768)},
        {"sequences": 9_999},
        {"init_checkpoint": "bert-large.safetensors"},
        {"init_checkpoint": "random"},
        {"missing_weights": "random"},
        {"model": (2, 64), "sequences": 1114},  # another text than the mini data set's
    ],
    ids=lambda changes: "-".join(changes),
)
def test_of_another_checkpoint_or_set_nothing_is_known(changes: dict[str, object]) -> None:
    run = Watched(**{**MLPERF, **changes})
    run.start(0.2, 5.5)
    assert run.found == {}


def test_a_useless_start_is_told_once() -> None:
    run = Watched(**MLPERF)
    run.start(0.01, 9.0)
    assert list(run.found) == ["start_weights_useless"]


@needs_reference
def test_a_published_run_gets_no_notice() -> None:
    (published,) = load_runs([REFERENCE / "mlperf_log" / "nvidia_v4.1_h200_result_0.txt"])
    run = Watched(**MLPERF, train_batch_size=768)
    draw = random.Random(1)
    run.start(0.340857, 4.7324)
    for point in published.evaluations:
        step = point.samples // 768
        loss = 8.1 - 9.6 * point.accuracy
        for logged in range(step - 100, step, 10):
            run.logged(logged, point.accuracy, loss + draw.gauss(0, 0.04))
        run.evaluated(step, point.accuracy, loss)
    assert run.found == {}


def losses(run: Watched, count: int, batch_deviation: float) -> int:
    """So many healthy steps; returns the next one's number."""
    draw = random.Random(2)
    for step in range(1, count + 1):
        run.logged(step, loss=2.0 + draw.gauss(0, batch_deviation))
    return count + 1


def test_a_loss_that_jumps() -> None:
    run = Watched()
    for step in range(1, 41):
        run.logged(step, loss=2.0 + 0.02 * (-1) ** step)
    run.logged(41, loss=2.9)
    assert run.found == {}, "0.9 is less than five times 1.5 by the root of 64 sequences"
    run.logged(42, loss=3.1)
    text = run.found["loss_jumped"]
    assert text.startswith(
        "the loss is 3.1 at step 42 (learning rate 0.001, sample numbers 2,624 to 2,687), more "
        "than 5 standard deviations of 0.19 above 2.02, the median of the 41 logged steps before"
    )
    run.logged(43, loss=9.0)  # a second time nothing is said


def test_a_jump_is_measured_by_the_losses_before() -> None:
    """Where they differ by 1, a loss of 3 above the median is none, and one of 9 above is."""
    run = Watched(train_batch_size=4096)
    step = losses(run, 40, 1.0)
    run.logged(step, loss=5.0)
    assert run.found == {}
    run.logged(step + 1, loss=11.0)
    assert list(run.found) == ["loss_jumped"]


def test_a_jump_in_the_first_steps_is_none() -> None:
    run = Watched()
    step = losses(run, 19, 0.02)
    run.logged(step, loss=9.0)
    assert run.found == {}


def test_sample_numbers_count_skipped_updates() -> None:
    run = Watched()
    run.watch.skipped(3, 2, 2, 512.0)
    run.logged(losses(run, 40, 0.02), loss=9.0)
    assert "sample numbers 2,688 to 2,751)" in run.found["loss_jumped"]


def test_single_sequences_are_compared_by_64() -> None:
    """Of a sequence with one masked token the loss is that of a word, which may be anything."""
    run = Watched(train_batch_size=1)
    draw = random.Random(3)
    for step in range(1, 64 * 40 + 1):
        run.logged(step, loss=draw.expovariate(1 / 2.5))
    assert run.found == {}
    for step in range(64 * 40 + 1, 64 * 41 + 1):
        run.logged(step, loss=6.0)
    text = run.found["loss_jumped"]
    assert "the loss is 6 on average over the 64 logged steps 2,561 to 2,624 (" in text
    assert "sample numbers 2,560 to 2,623)" in text


@pytest.mark.parametrize("batch", [8, 64, 448, 8192])
def test_noise_of_healthy_batches_is_no_jump(batch: int) -> None:
    """A learning curve, with the noise of tokens' losses, which have a long tail."""
    for seed in range(5):
        run = Watched(train_batch_size=batch)
        draw = random.Random(seed)
        for step in range(1, 1001):
            level = 4.5 - 4.4 * accuracy_at(step * 2400, 2_400_000)
            tokens = [draw.expovariate(1 / level) for _ in range(min(8 * batch, 64))]
            noise = sum(tokens) / len(tokens) - level
            run.logged(step, loss=level + noise * (64 / max(64, 8 * batch)) ** 0.5)
        assert run.found == {}


def test_the_bands_are_those_of_the_documentation() -> None:
    for known in (MLPERF_START, MINI_START):
        assert (known.lowest, known.highest) == (0.32, 0.36)


def test_the_mini_data_set_is_the_one_that_is_known(mini_data: Path) -> None:
    found = 0
    for path in (mini_data / "eval_set_uncompressed").iterdir():
        with h5py.File(path) as file:
            assert len(file["masked_lm_ids"]) == MINI_START.sequences
            found += int(np.count_nonzero(file["masked_lm_ids"][:]))
    assert found == MINI_START.masked_tokens
