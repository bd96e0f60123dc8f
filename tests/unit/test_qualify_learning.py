"""The stage `learning`: a training that does not learn, and wrong start checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bert_pretraining import config as configuration
from bert_pretraining.config import Config
from bert_pretraining.errors import TrainingError
from bert_pretraining.logs.reading.events import POINT_IN_TIME, Event
from bert_pretraining.qualify import learning
from bert_pretraining.qualify.learning import Goal, Late
from bert_pretraining.qualify.record import FAIL, NOTE, PASS
from qualify_doubles import context_of, ignored

GOAL = Goal(0.45, (100, 200), 400)
CHECKPOINT = "model.ckpt-28252.apex.pt"


def events(**values: object) -> list[Event]:
    return [
        Event(line, POINT_IN_TIME, key, value, None, {})
        for line, (key, value) in enumerate(values.items(), 1)
    ]


def trained(accuracy: float | None, converged: bool, **more: object) -> list[Event]:
    return events(
        RUN_OUTLINE={"precision": "fp32", "kernels": "torch"},
        INIT_EVALUATION={"eval_mlm_accuracy": 0.34, "eval_loss": 2.7},
        EVALUATION={"global_steps": 150, "eval_mlm_accuracy": accuracy},
        STEP_END={"global_steps": 150},
        **more,
        FINISHED={
            "converged": converged, "final_mlm_accuracy": accuracy, "e2e_time": 9.0,
            "p_whole": 600.0, "p_train": 700.0, "p_core": 710.0,
        },
    )  # fmt: skip


def test_a_run_that_learns() -> None:
    found = learning.judged_mini(trained(0.478, True), GOAL, 64)
    assert found.verdict == PASS
    assert found.reason == (
        "accuracy 0.478 after 150 steps (usual: 100 to 200), from 0.340 at the start; p_whole "
        "600, p_train 700, p_core 710 sequences/s"
    )
    figures = found.figures
    assert (figures["steps"], figures["accuracy"], figures["reached"]) == (150, 0.478, True)
    assert (figures["p_whole"], figures["p_train"], figures["p_core"]) == (600.0, 700.0, 710.0)
    assert figures["curve"] == [[150, 0.478]]


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (0.41, "it learns too little: 0.410 instead of 0.45 after 150 steps"),
        (0.34, "it learns nothing: 0.340 instead"),
        (0.2, "its accuracy falls: 0.200 instead"),
        (None, "its accuracy falls: no number instead"),
    ],
)
def test_a_run_that_does_not_learn(accuracy: float | None, words: str) -> None:
    found = learning.judged_mini(trained(accuracy, False), GOAL, 64)
    assert found.verdict == FAIL
    assert found.reason.startswith(words)


def test_a_notice_of_the_run_is_a_note() -> None:
    notice = {"kind": "loss_scale", "text": "the loss scale falls"}
    found = learning.judged_mini(trained(0.5, True, NOTICE=notice), GOAL, 64)
    assert found.verdict == NOTE
    assert found.reason.endswith("; the loss scale falls")


def test_a_run_that_was_ended_keeps_its_figures() -> None:
    until = [one for one in trained(0.41, False) if one.key != "FINISHED"]
    found = learning.late_mini(Late("the run was ended at its limit of 9 s", until), GOAL, 64)
    assert (found.verdict, found.is_late) == (FAIL, True)
    assert found.reason == (
        "the run was ended at its limit of 9 s; until then accuracy 0.410 after 150 steps"
    )
    whole = learning.judged_mini(trained(0.41, False), GOAL, 64).figures
    missing = {"e2e_seconds", "p_whole", "p_train", "p_core"}
    assert found.figures == {n: value for n, value in whole.items() if n not in missing}
    assert learning.late_mini(Late("ended", []), GOAL, 64).figures["curve"] == []
    # One whose accuracy is no number was not only slow.
    broken = [one for one in trained(None, False) if one.key != "FINISHED"]
    assert not learning.late_mini(Late("ended", broken), GOAL, 64).is_late


@pytest.mark.slow
def test_a_learning_rate_of_nothing_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = {"eval_steps": 5, "log_freq": 5, "learning_rate": 1e-9}
    monkeypatch.setattr(learning, "MINI", {**learning.MINI, **often})
    monkeypatch.setattr(learning, "QUICK_GOAL", Goal(0.37, (5, 5), 10))
    lines: list[str] = []
    found = learning.run(context_of(tmp_path, ranks=1), lines.append)
    assert found.verdict == FAIL
    assert found.reason.startswith("it learns nothing: 0.340 instead of 0.37 after 10 steps")
    assert lines[-1] == "learning: step 10, accuracy 0.340"
    assert (found.figures["steps"], found.figures["batch_size"]) == (10, 64)
    assert {"p_whole", "p_train", "p_core"} <= set(found.figures)


@pytest.mark.slow
def test_a_wrong_start_checkpoint_is_caught(tmp_path: Path, mini_data: Path) -> None:
    """Its weights are those of the right one, with noise."""
    data = tmp_path / "data"
    shutil.copytree(mini_data, data)
    content = torch.load(data / CHECKPOINT, weights_only=True)
    weights = content.get("model", content)
    torch.manual_seed(1)
    for name, weight in weights.items():
        if "layer." in name and weight.is_floating_point():
            weight += 0.6 * weight.std() * torch.randn_like(weight)
    torch.save(content, data / CHECKPOINT)
    config = configuration.resolve({**learning.MINI, "device": "cpu", "data_dir": str(data)}).config
    found = learning.run(context_of(tmp_path, config=config, ranks=1), ignored)
    assert found.verdict == FAIL
    assert "start checkpoint's MLM accuracy is 0." in found.reason
    assert found.figures["start_accuracy"] < found.figures["lowest"] == 0.32
    assert not list((tmp_path / "stages/learning").rglob("*.pt")), "nothing was trained or saved"


SHAPE = {
    "parameters": 1, "layers": 24, "hidden_size": 1024, "sequences": 1, "shards": 1,
    "kernels": "torch", "precision": "bf16", "matrix_rate": None,
}  # fmt: skip


def began(accuracy: float, sequences: int = 10_000, **more: object) -> list[Event]:
    return events(
        RUN_OUTLINE=SHAPE,
        EVALUATION_SET={"masked_tokens": 1, "commonest_token": 1, "commonest_share": 0.1},
        INIT_EVALUATION={"eval_mlm_accuracy": accuracy, "eval_loss": 2.7, "time": 9.0},
        eval_samples=sequences,
        **more,
    )


def test_the_start_checkpoint_of_mlperf() -> None:
    found = learning.judged_start(began(0.3409), Config(data_dir="/data"))
    assert found.verdict == PASS
    assert found.reason.endswith("0.3409 (loss 2.7); MLPerf's has 0.32 to 0.36")
    assert (found.figures["lowest"], found.figures["highest"]) == (0.32, 0.36)


def test_a_start_that_is_not_known() -> None:
    found = learning.judged_start(began(0.3409, sequences=500), Config(data_dir="/data"))
    assert found.verdict == NOTE
    assert "compared with nothing" in found.reason


def test_an_unusual_start_of_mlperf() -> None:
    notice = {"kind": "start_accuracy_unusual", "text": "the start is unusual"}
    found = learning.judged_start(began(0.30, NOTICE=notice), Config(data_dir="/data"))
    assert (found.verdict, found.reason) == (FAIL, "the start is unusual")


def test_which_data_are_the_users() -> None:
    mini = configuration.resolve(dict(learning.MINI)).config
    assert not learning.real_data(mini)
    assert not learning.real_data(Config())
    assert learning.real_data(Config(data_dir="/data"))


def test_a_launch_that_is_refused(tmp_path: Path) -> None:
    settings = Config(device="cpu", nproc_per_node=1, data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(TrainingError, match=r"exit code 2: Error: .*nowhere.*see "):
        learning.launched(context_of(tmp_path), settings, ignored)


def test_a_run_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "ranks_limit", lambda *_: 0.0)  # at once
    config = Config(device="cpu", data_dir=str(tmp_path / "nowhere"))
    found = learning.run(context_of(tmp_path, config=config), ignored)
    assert found.verdict == NOTE
    assert "not evaluated on this CPU: the run was ended at its limit of 0 s" in found.reason
