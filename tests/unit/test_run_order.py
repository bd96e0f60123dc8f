"""Which training state a run goes on from: the newest one, whatever folders are called."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from bert_pretraining.checkpoint import CheckpointWriter, newest_first, training_state
from bert_pretraining.config import Config
from bert_pretraining.errors import UserError
from bert_pretraining.progress import RunState
from helpers import distinct_weights, tiny_config

FUTURE = time.time() + 10 * 365 * 86400
WEIGHTS = {
    name: value
    for name, value in distinct_weights(tiny_config()).items()
    if value.numel() < 100  # small files
}


def train(output_dir: Path, name: str, *steps: int, spoil: bool = False) -> Path:
    """A run's folder with checkpoints of these steps; returns the last one."""
    folder = output_dir / name
    folder.mkdir(parents=True)
    weights = dict(WEIGHTS)
    if spoil:
        weights["cls.seq_relationship.bias"] = torch.tensor([1.0, float("nan")])
    writer = CheckpointWriter(folder, keep=0)
    for step in steps:
        state = {"global_steps": step, "order": {}, "job": None}
        writer.write(step, {"model": weights, "optimizer": {"master": weights}, "state": state})
    writer.report(lambda _: None, wait=True)
    return folder / f"model.ckpt-{steps[-1]}.pt"


def older_version(path: Path, written: float) -> None:
    """As versions of this package wrote it that did not number runs."""
    content = torch.load(path, weights_only=True)
    content["state"].pop("run_number")
    torch.save(content, path)
    os.utime(path, (written, written))


def found(output_dir: Path, resume: str = "auto") -> tuple[Path | None, list[str]]:
    said: list[str] = []
    config = Config(output_dir=str(output_dir), resume=resume)
    return training_state.find(config, None, said.append), said


def test_a_run_that_was_dated_in_the_future_is_not_the_newest_for_ever(tmp_path: Path) -> None:
    old = train(tmp_path, "run-20991231-235959", 2)
    os.utime(old, (FUTURE, FUTURE))
    newer = train(tmp_path, "run-20260101-000000", 4, 6)
    newest = train(tmp_path, "run-20260101-000001", 8)
    path, said = found(tmp_path)
    assert path == newest
    assert said == [
        f"Resume: {newest}, the newest training state in {tmp_path} (run 3, step 8; 3 runs have "
        "checkpoints); run-20991231-235959 has a later name, but an older state"
    ]
    assert newest_first(tmp_path) == [newest, newer, newer.with_name("model.ckpt-4.pt"), old]


def test_a_fresh_start_is_newer_than_a_longer_run_before_it(tmp_path: Path) -> None:
    """Two families in one folder: who started anew meant the new one."""
    train(tmp_path, "run-20260101-000000", 1000)
    fresh = train(tmp_path, "run-20260102-000000", 5)
    path, said = found(tmp_path)
    assert path == fresh
    assert said == [
        f"Resume: {fresh}, the newest training state in {tmp_path} (run 2, step 5; 2 runs have "
        "checkpoints)"
    ]


def test_a_copied_folder_changes_nothing(tmp_path: Path) -> None:
    first = train(tmp_path, "run-20260101-000000", 7, 20)
    last = train(tmp_path, "run-20260102-000000", 9)
    for name in ("run-20260101-000000 (copy)", "run-20260103-backup", "run-99999999-old"):
        shutil.copytree(first.parent, tmp_path / name)  # new times of the files
    assert found(tmp_path)[0] == last
    shutil.copytree(last.parent, tmp_path / "run-20260102-000000-copy")
    assert found(tmp_path)[0].read_bytes() == last.read_bytes()
    # A copy that was made before the run went on.
    (tmp_path / "run-20260102-000000-copy/model.ckpt-9.pt").unlink()
    shutil.copy(first, tmp_path / "run-20260102-000000-copy/model.ckpt-20.pt")
    assert found(tmp_path)[0] == last
    after = train(tmp_path, "run-20260102-000001", 11)
    assert torch.load(after, weights_only=True)["state"]["run_number"] == 3
    assert found(tmp_path)[0] == after


def test_equal_steps_go_by_the_number_of_the_run(tmp_path: Path) -> None:
    train(tmp_path, "run-b", 5)
    later = train(tmp_path, "run-a", 5)
    assert found(tmp_path)[0] == later


@pytest.mark.parametrize(
    ("state", "flags", "told"),
    [
        ({}, {}, "at step 1,200 of 2,000; --resume auto goes on from it"),
        ({}, {"seed": 5}, "at step 1,200 of 2,000"),
        ({}, {"seed": 6}, ""),
        ({}, {"resume": "never"}, ""),
        ({}, {"learning_rate": 0.5}, ""),  # another command
        ({}, {"target_mlm_accuracy": 0.5}, ""),  # it has met this target
        ({"global_steps": 2000}, {}, ""),
        ({"num_trained_samples": 10**9}, {}, ""),
        ({"config": None}, {}, ""),
        # What no version of this package wrote.
        ({"config": [1]}, {}, ""),
        ({"config": {"max_steps": torch.zeros(2)}}, {}, ""),
        ({"order": {}}, {}, ""),
        ({"order": [5]}, {}, ""),
        ({"global_steps": "1200"}, {}, ""),
        ({"eval_mlm_accuracy": {}}, {}, ""),
    ],
)
def test_a_start_tells_of_a_run_of_the_same_command_that_was_stopped(
    tmp_path: Path, state: dict, flags: dict, told: str
) -> None:
    config = Config(output_dir=str(tmp_path), max_steps=2000)
    counters = RunState(1200, 1200 * 8, 1200 * 8, eval_mlm_accuracy=0.5)
    saved = {
        **dataclasses.asdict(counters),
        "config": training_state.settings_of(config),
        "order": {"seed": 5},
        **state,
    }
    content = {"model": WEIGHTS, "optimizer": {"master": WEIGHTS}}
    saved = {name: value for name, value in saved.items() if value is not None}
    writer = CheckpointWriter(tmp_path / "run-1", keep=0)
    writer.write(1200, {**content, "state": saved})
    writer.report(lambda _: None, wait=True)
    said: list[str] = []
    assert training_state.find(dataclasses.replace(config, **flags), None, said.append) is None
    start = f"Notice: {tmp_path}/run-1 holds a checkpoint of this command "
    assert [line.startswith(start) and told in line for line in said] == [True] * bool(told)


@pytest.mark.parametrize("damage", ["cut", "empty", "NaN", "weights alone", "partial"])
def test_a_spoiled_newest_state_is_passed_over_and_named(tmp_path: Path, damage: str) -> None:
    good = train(tmp_path, "run-20260101-000000", 4)
    newest = train(tmp_path, "run-20260102-000000", 6, spoil=damage == "NaN")
    words = {"NaN": "1 of 2 numbers of cls.seq_relationship.bias are NaN", "empty": "an empty file",
             "cut": "its end is missing", "weights alone": "it holds weights alone"}  # fmt: skip
    if damage == "cut":
        newest.write_bytes(newest.read_bytes()[:-900])
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "weights alone":
        torch.save({"model": WEIGHTS}, newest)
    elif damage == "partial":
        newest.rename(newest.with_name(f"{newest.name}.partial"))
    path, said = found(tmp_path)
    assert path == good
    if damage != "partial":
        assert said[0].startswith(f"Notice: passed over {newest}: ")
        assert words[damage] in said[0]
    assert said[-1].startswith(f"Resume: {good}, the newest ")


def test_runs_of_older_versions_go_by_the_times_of_their_files(tmp_path: Path) -> None:
    now = time.time()
    ahead = train(tmp_path, "run-20991231-235959", 50)
    older_version(ahead, FUTURE)
    first = train(tmp_path, "run-20260102-000000", 900)
    older_version(first, now - 5000)
    second = train(tmp_path, "run-20260101-000000", 3)
    older_version(second, now - 100)
    assert newest_first(tmp_path) == [second, first, ahead]
    numbered = train(tmp_path, "run-20250101-000000", 1)
    assert newest_first(tmp_path) == [numbered, second, first, ahead]


def test_a_file_beside_the_runs_comes_after_its_like(tmp_path: Path) -> None:
    """Upstream writes into output_dir itself; a user may move a file there."""
    last = train(tmp_path, "run-20260101-000000", 5)
    shutil.copy(last, tmp_path / "model.ckpt-5.pt")
    assert found(tmp_path)[0] == last
    last.unlink()
    assert found(tmp_path)[0] == tmp_path / "model.ckpt-5.pt"


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert found(tmp_path / "absent") == (None, [])
    with pytest.raises(UserError, match="--resume required: no whole training checkpoint in"):
        found(tmp_path, "required")
    train(tmp_path, "run-20260101-000000", 5)
    assert found(tmp_path, "never") == (None, [])
