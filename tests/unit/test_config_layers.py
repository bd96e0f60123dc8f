"""Two settings with one meaning: the later source decides, and a contradiction is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from bert_pretraining.config import FIELDS, Config, resolve, without_switches
from bert_pretraining.errors import UserError


def resolved(tmp_path: Path, base: str, file: str, **flags: object) -> Config:
    """Resolve a file that extends another, with flags."""
    (tmp_path / "base.toml").write_text(base)
    (tmp_path / "own.toml").write_text(f'extends = "base"\n{file}\n')
    return resolve({"config": str(tmp_path / "own.toml"), **flags}).config


@pytest.mark.parametrize(
    ("base", "file", "flags", "expected"),
    [
        ('precision = "bf16"', "fp16 = true", {}, "fp16"),
        ("fp16 = true", 'precision = "bf16"', {}, "bf16"),
        ('precision = "fp16"', "fp16 = false", {}, "fp32"),
        ('precision = "bf16"', "fp16 = false", {}, "bf16"),
        ('precision = "bf16"', "", {"fp16": True}, "fp16"),
        ("fp16 = true", "", {"precision": "fp32"}, "fp32"),
        ('fp16 = true\nprecision = "fp16"', "", {}, "fp16"),
        ("fp16 = true", "fp16 = false", {}, "fp32"),
    ],
)
def test_precision(tmp_path: Path, base: str, file: str, flags: dict, expected: str) -> None:
    config = resolved(tmp_path, base, file, **flags)
    assert config.resolved_precision == expected
    assert not config.fp16 or expected == "fp16"


@pytest.mark.parametrize(
    ("base", "file", "flags", "expected"),
    [
        ('batching = "random"', "", {"exchange_padding": True}, "balanced"),
        ('batching = "random"', "exchange_padding = true", {}, "balanced"),
        ("exchange_padding = true", 'batching = "random"', {}, "random"),
        ("exchange_padding = true", "", {"exchange_padding": False}, "random"),
        ('batching = "balanced"', "", {"exchange_padding": False}, "random"),
    ],
)
def test_batching(tmp_path: Path, base: str, file: str, flags: dict, expected: str) -> None:
    assert resolved(tmp_path, base, file, **flags).resolved_batching == expected


@pytest.mark.parametrize("switch", ["fp16", "no_fp16"])
def test_one_source_that_contradicts_itself_is_refused(tmp_path: Path, switch: str) -> None:
    on = switch == "fp16"
    precision = "bf16" if on else "fp16"
    said = rf"fp16 = {str(on).lower()} contradicts precision = '{precision}'; remove fp16"
    with pytest.raises(UserError, match=rf"the command line: {said}"):
        resolve({"fp16": on, "precision": precision})
    with pytest.raises(UserError, match=rf"own\.toml: {said}"):
        resolved(tmp_path, "", f'fp16 = {str(on).lower()}\nprecision = "{precision}"')


def test_a_switch_and_its_setting_mean_the_same() -> None:
    """Where settings are compared: a run that resumes with the other spelling is the same run."""
    spelled = [{"fp16": True}, {"precision": "fp16"}, {"precision": "fp16", "fp16": True}]
    meanings = [without_switches(vars(resolve(flags).config)) for flags in spelled]
    assert meanings[0] == meanings[1] == meanings[2]
    assert meanings[0]["precision"] == "fp16"
    assert "fp16" not in meanings[0]
    assert without_switches(vars(resolve({}).config))["batching"] == "random"


def test_a_setting_does_not_turn_its_switch_on() -> None:
    shipped = resolve({"name": "nvidia", "config": "H200x1x8"})
    assert shipped.config.resolved_batching == "balanced"
    assert (shipped.config.exchange_padding, shipped.sources["exchange_padding"]) == (
        False,
        "default",
    )


def test_every_setting_says_whether_numbers_follow_from_it() -> None:
    """These settings may change when a run is resumed, and it stays bit-identical."""
    free = {name for name, field in FIELDS.items() if not field.metadata["changes_numbers"]}
    assert {"target_mlm_accuracy", "eval_steps", "log_freq", "data_dir", "ddp_type"} <= free
    assert not free & {"train_batch_size", "learning_rate", "objective", "optimizer", "kernels"}
    assert not free & {"deterministic", "allow_tf32", "gradient_dtype", "precision"}


def test_the_global_batch_size_counts_every_rank_and_micro_batch() -> None:
    flags = {"train_batch_size": 3, "gradient_accumulation_steps": 5, "nnodes": 2}
    assert resolve({**flags, "nproc_per_node": 7}).config.global_batch_size == 210
