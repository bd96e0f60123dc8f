"""Configuration: layers, sources, upstream's values, and errors with hints."""

from __future__ import annotations

from pathlib import Path

import pytest

from bert_pretraining import config
from bert_pretraining.config import FlagParser, add_config_flags, resolve, show
from bert_pretraining.errors import UserError


def parse(*arguments: str) -> dict[str, object]:
    parser = FlagParser(allow_abbrev=False)
    add_config_flags(parser)
    return vars(parser.parse(list(arguments)))


def test_flag_over_file_over_default_with_sources() -> None:
    resolved = resolve(
        parse("--name", "iluvatar", "--config", "03V100x1x8", "--train_batch_size", "9")
    )
    assert resolved.config.train_batch_size == 9
    assert resolved.sources["train_batch_size"] == "flag"
    assert resolved.config.max_steps == 28000
    assert resolved.sources["max_steps"] == "configs/iluvatar/03V100x1x8.toml"
    assert resolved.sources["learning_rate"] == "configs/iluvatar/_base.toml"
    assert resolved.config.opt_lamb_epsilon == 1e-6
    assert resolved.sources["opt_lamb_epsilon"] == "default"
    assert "max_steps = 28000" in show(resolved)


def test_hyphens_equals_signs_and_booleans() -> None:
    values = parse("--train-batch-size=3", "--start_warmup_step", "-76", "--no-fp16")
    assert values == {"train_batch_size": 3, "start_warmup_step": -76, "fp16": False}
    assert parse("--save_checkpoint") == {"save_checkpoint": True}
    assert parse("--save_checkpoint", "false") == {"save_checkpoint": False}


def test_fp16_flag_is_precision_fp16_and_precision_wins() -> None:
    nvidia = ("--name", "nvidia", "--config", "H200x1x1")
    assert resolve(parse(*nvidia)).config.resolved_precision == "bf16"
    assert resolve(parse(*nvidia, "--fp16")).config.resolved_precision == "fp16"
    default = ("--name", "default", "--config", "V100x1x8")
    assert resolve(parse(*default)).config.resolved_precision == "fp16"
    assert resolve(parse(*default, "--precision", "fp32")).config.resolved_precision == "fp32"


@pytest.mark.parametrize(("name", "stem"), config.config_names())
def test_every_config_resolves_and_its_name_is_its_topology(name: str, stem: str) -> None:
    resolved = resolve({"name": name, "config": stem}).config
    assert config.parse_topology(stem) == (resolved.nnodes, resolved.nproc_per_node)


def test_eight_gpus_share_the_optimizer_s_work() -> None:
    one, eight = (resolve({"name": "nvidia", "config": f"H200x1x{n}"}).config for n in (1, 8))
    assert eight.distributed_lamb
    assert not one.distributed_lamb  # one rank has nobody to share with
    assert one.global_batch_size == eight.global_batch_size == 448


def test_all_names_are_there() -> None:
    assert {f"{name}/{stem}" for name, stem in config.config_names()} == {
        *(f"default/V100x1x{count}" for count in (1, 4, 8, 16)),
        *(f"iluvatar/0{stage}V100x1x8" for stage in range(4)),
        *(f"iluvatar/V100x{nodes}x8" for nodes in (1, 2, 4)),
        "iluvatar/03V100x1x16",
        "iluvatar/V100x1x1",
        *("mini/CPUx1x1", "mini/CPUx1x2", "mini/GPUx1x1"),
        *("nvidia/H200x1x1", "nvidia/H200x1x8"),
    }


# learning rate, batch, max_steps, max samples, target, eval_steps: from DeepSparkHub's files
UPSTREAM = {
    "default/V100x1x1": (2.0e-4, 10, 7100, 4500000, 0.72, 1000),
    "default/V100x1x4": (2.0e-4, 10, 7100, 4500000, 0.72, 1000),
    "default/V100x1x8": (3.5e-4, 10, 7100, 4500000, 0.72, 1000),
    "default/V100x1x16": (3.5e-4, 10, 7100, 4500000, 0.72, 1000),
    "iluvatar/00V100x1x8": (3.5e-4, 27, 14000, 4500000, 0.45, 1000),
    "iluvatar/01V100x1x8": (3.5e-4, 27, 14000, 4500000, 0.489, 200),
    "iluvatar/02V100x1x8": (3.5e-4, 27, 14000, 4500000, 0.706, 200),
    "iluvatar/03V100x1x8": (3.5e-4, 27, 28000, 9000000, 0.72, 200),
    "iluvatar/03V100x1x16": (3.5e-4, 27, 28000, 18000000, 0.72, 200),
    "iluvatar/V100x1x1": (3.5e-4, 27, 7100, 4500000, 0.40, 200),
    "iluvatar/V100x1x8": (3.5e-4, 27, 28000, 9000000, 0.72, 1000),
    "iluvatar/V100x2x8": (4e-4, 27, 8000, 4500000, 0.71, 1000),
    "iluvatar/V100x4x8": (4e-4, 27, 8000, 4500000, 0.40, 200),
}


SAVING = {"iluvatar/V100x1x8", "iluvatar/V100x2x8", "iluvatar/V100x4x8"}
PLAIN_LAMB = {"iluvatar/V100x1x1", "iluvatar/V100x2x8", "iluvatar/V100x4x8"}


@pytest.mark.parametrize("which", UPSTREAM)
def test_upstream_values(which: str) -> None:
    name, stem = which.split("/")
    values = resolve({"name": name, "config": stem}).config
    assert (
        values.learning_rate,
        values.train_batch_size,
        values.max_steps,
        values.max_samples_termination,
        values.target_mlm_accuracy,
        values.eval_steps,
    ) == UPSTREAM[which]
    assert values.seed == 9031
    assert values.fp16
    assert values.eval_batch_size == values.train_batch_size
    assert (values.opt_lamb_beta_1, values.opt_lamb_beta_2) == (0.9, 0.999)
    assert values.weight_decay_rate == 0.01
    assert (values.warmup_steps, values.warmup_proportion, values.start_warmup_step) == (0, 0, 0)
    assert values.gradient_accumulation_steps == 1
    assert values.cache_eval_data
    assert values.log_freq == (1 if name == "default" else 200)
    assert values.save_checkpoint == (which in SAVING)
    assert values.distributed_lamb == (name == "iluvatar" and which not in PLAIN_LAMB)
    assert values.dist_backend == ("gloo" if which == "iluvatar/V100x2x8" else "nccl")
    assert values.exchange_padding == (which != "iluvatar/V100x1x1")
    assert values.fused_mha == values.dense_seq_output == (name == "iluvatar")
    groups = {"iluvatar/03V100x1x16": 16, "iluvatar/03V100x1x8": 8, "iluvatar/V100x1x8": 8,
              "iluvatar/V100x4x8": 8}  # fmt: skip
    assert values.dwu_group_size == groups.get(which, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train_batchsize", "3"], "unknown flag --train_batchsize; did you mean --train_batch"),
        (["--train_batch_size", "many"], "invalid int value"),
        (["--train_batch_size"], "expected one argument"),
        (["stray"], "unexpected argument 'stray'"),
        (["--save_checkpoint", "perhaps"], "neither true nor false"),
    ],
)
def test_bad_flags_name_the_right_one(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(*arguments)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"name": "iluvata", "config": "V100x1x8"}, "did you mean iluvatar"),
        ({"name": "default", "config": "V100x1x9"}, "did you mean V100x1x8"),
        ({"name": "default", "config": "_base"}, "no such configuration"),
        ({"name": "iluvatar"}, "--name iluvatar alone chooses no configuration: iluvatar has 00V1"),
        ({"name": "nvidia"}, "H200x1x8; add --config, such as --config H200x1x8"),
        ({"name": "iluvata"}, "--name iluvata: no such name; did you mean iluvatar?"),
        ({"config": "V100x1x8"}, "of mini; it exists under default, iluvatar: add --name default"),
        ({"train_batch_size": 0}, "--train_batch_size 0: must be at least 1"),
        ({"learning_rate": float("nan")}, "must be at least 0"),
        ({"learning_rate": float("inf")}, "must be finite"),
        ({"opt_lamb_beta_1": 1.0}, "must be at most"),
        ({"target_mlm_accuracy": 72.0}, "must be at most 1"),
        ({"target_mlm_accuracy": float("nan")}, "must be at least 0"),
        ({"compile": "maybe"}, "must be one of auto, on, off"),
        ({"precision": "fp4"}, "--precision fp4: must be one of fp32, bf16, fp16, fp8"),
        ({"gradient_dtype": "bf16"}, "--gradient_dtype bf16: must be one of auto, param, fp32"),
    ],
)
def test_bad_values(flags: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve(flags)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_stepz = 3", "unknown key 'max_stepz'; did you mean max_steps"),
        ('max_steps = "3"', "key 'max_steps' must be int"),
        ("max_steps = true", "key 'max_steps' must be int"),
        ("fp16 = 1", "key 'fp16' must be bool"),
        ("max_steps = ", "not valid TOML"),
        ('extends = "mine"', "extends itself"),
        ('extends = "nobody"', "cannot read .*nobody.toml: does not exist .*'extends'"),
        ('name = "me"', "unknown key 'name'"),
        ("seed = 2020-01-01", "key 'seed' must be int"),
        ("[training]\nmax_steps = 3", r"'training' is a table, .*; delete the line \[training\]"),
        ("[[max_steps]]\nmax_steps = 3", "'max_steps' is a table"),
        ("max_steps = 0", "mine.toml: max_steps = 0: must be at least 1"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        resolve({"config": str(path)})


def test_own_file_extends_another_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "common.toml").write_text("max_steps = 7\nlearning_rate = 1\n")
    (tmp_path / "mine.toml").write_text('extends = "common"\nmax_steps = 8\n')
    resolved = resolve({"config": str(tmp_path / "mine.toml")})
    assert (resolved.config.max_steps, resolved.config.learning_rate) == (8, 1.0)
    assert resolved.sources["learning_rate"].endswith("common.toml")
    assert resolved.config.resolved_output_dir == "output/mini_mine"


def test_every_field_has_help_and_shows_as_toml() -> None:
    for field in config.FIELDS.values():
        assert field.metadata["help"]
    shown = config.parse_toml(show(resolve({})))
    expected = {name: getattr(resolve({}).config, name) for name in config.FIELDS}
    assert shown == {name: value for name, value in expected.items() if value is not None}
