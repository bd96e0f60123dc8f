"""Every layout that BERT users have is read, strictly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bert_pretraining.checkpoint import load_weights, read_weights, save_checkpoint
from bert_pretraining.checkpoint.structure import Sizes, expected_shapes, sizes_of
from bert_pretraining.errors import UserError
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.heads import BertForPreTraining
from helpers import (
    REFERENCE,
    assert_same_tensors,
    distinct_weights,
    make_model,
    needs_reference,
    tiny_config,
)

CHECKPOINT = REFERENCE / "checkpoint"
APEX = CHECKPOINT / "model.ckpt-28252.apex.pt"
TF1 = CHECKPOINT / "tf1/model.ckpt-28252"
DECODER = "cls.predictions.decoder.weight"
FUSED = {
    "attention.self.query.weight": "attention.multi_head_attention.q_weight",
    "attention.self.query.bias": "attention.multi_head_attention.q_bias",
    "attention.self.key.weight": "attention.multi_head_attention.k_weight",
    "attention.self.key.bias": "attention.multi_head_attention.k_bias",
    "attention.self.value.weight": "attention.multi_head_attention.v_weight",
    "attention.self.value.bias": "attention.multi_head_attention.v_bias",
    "attention.output.dense.weight": "attention.multi_head_attention.out_proj_weight",
    "attention.output.dense.bias": "attention.multi_head_attention.out_proj_bias",
    "attention.output.LayerNorm.": "attention.layer_norm.",
}
SEGMENTS = {"bert": "bert_model_segment.", "cls": "heads_only_segment."}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return distinct_weights(tiny_config())


@pytest.fixture
def model() -> BertForPreTraining:
    return make_model(tiny_config())


def fused(name: str) -> str:
    for ours, theirs in FUSED.items():
        name = name.replace(ours, theirs)
    return name


def segmented(name: str) -> str:
    return SEGMENTS[name.split(".")[0]] + name


def old(name: str) -> str:
    for ours, theirs in (("LayerNorm.weight", "LayerNorm.gamma"), ("Norm.bias", "Norm.beta")):
        name = name.replace(ours, theirs)
    return name


LAYOUTS = {
    "bare": lambda name: name,
    "'module.' in front": lambda name: f"module.{name}",
    "segments": segmented,
    "fused attention": fused,
    "'module.' in front, fused attention, segments": lambda n: f"module.{segmented(fused(n))}",
    "gamma and beta": old,
}


@pytest.mark.parametrize("key", [None, "model"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_naming(
    tmp_path: Path, model: BertForPreTraining, weights: dict, layout: str, key: str | None
) -> None:
    content = {LAYOUTS[layout](name): value for name, value in weights.items()}
    assert len(content) == len(weights)
    torch.save({key: content} if key else content, tmp_path / "start.pt")
    assert layout.replace("bare", "") in load_weights(model, tmp_path / "start.pt").format
    assert_same_tensors(model.state_dict(), weights)


def test_upstream_resume_file(tmp_path: Path, model: BertForPreTraining, weights: dict) -> None:
    """As DeepSparkHub's trainer saves it: apex's optimizer by number, state of plain values."""
    moments = {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    content = {
        "model": {f"module.{segmented(fused(name))}": value for name, value in weights.items()},
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "state": {"global_steps": 1234, "epoch": 2, "iter_dataloader_idx": 7,
                  "learning_rate": 3.5e-4},
    }  # fmt: skip
    torch.save(content, tmp_path / "model.ckpt-1234.pt")
    found = load_weights(model, tmp_path / "model.ckpt-1234.pt")
    assert_same_tensors(model.state_dict(), weights)
    assert found.step == 1234
    assert found.state == content["state"]
    assert found.has_optimizer_state
    assert found.summary().endswith("; step 1234")


def test_own_files_give_the_float32_masters(
    tmp_path: Path, model: BertForPreTraining, weights: dict
) -> None:
    """A bf16 run's weights are the rounding of what its optimizer holds."""
    rounded = {name: value.bfloat16() for name, value in weights.items()}
    masters = {name: value for name, value in weights.items() if name != DECODER}
    path = tmp_path / "model.ckpt-5.pt"
    save_checkpoint(path, rounded, {"updates": 5, "master": masters}, {"global_steps": 5})
    load_weights(model, path)
    assert_same_tensors(model.state_dict(), weights)
    save_checkpoint(path, rounded, {}, {"global_steps": 5})
    load_weights(model, path)
    assert_same_tensors(
        model.state_dict(), {name: value.float() for name, value in rounded.items()}
    )


# ---- Hugging Face


@pytest.fixture(scope="module")
def hugging_face_names(weights: dict) -> dict[str, torch.Tensor]:
    """As Hugging Face's BertForPreTraining names its tensors, older files' extras included."""
    bias = weights["cls.predictions.bias"]
    return {
        **{name: value for name, value in weights.items() if name != DECODER},
        "cls.predictions.decoder.bias": bias.clone(),
        "bert.embeddings.position_ids": torch.arange(512)[None],
    }


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded", "sharded bin", "one file"])
def test_hugging_face_forms(
    tmp_path: Path,
    model: BertForPreTraining,
    weights: dict,
    hugging_face_names: dict,
    form: str,
) -> None:
    content, path = hugging_face_names, tmp_path
    ending = "bin" if "bin" in form else "safetensors"
    stem = "pytorch_model" if "bin" in form else "model"
    write = torch.save if "bin" in form else save_file
    if form.startswith("sharded"):
        names = sorted(content)
        weight_map = {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            file = f"{stem}-0000{number}-of-00002.{ending}"
            write({name: content[name] for name in part}, tmp_path / file)
            weight_map |= dict.fromkeys(part, file)
        index = tmp_path / f"{stem}.{ending}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        write(content, tmp_path / f"{stem}.{ending}")
        path = tmp_path / "model.safetensors" if form == "one file" else tmp_path
    found = load_weights(model, path)
    assert_same_tensors(model.state_dict(), weights)
    assert found.left_out == {"position numbers": ("bert.embeddings.position_ids",)}


def test_a_directory_that_transformers_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = tiny_config()
    theirs = transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48,
        )
    )  # fmt: skip
    for shard_size in ("1GB", "20KB"):
        folder = tmp_path / shard_size
        theirs.save_pretrained(folder, max_shard_size=shard_size)
        assert (folder / "model.safetensors").exists() == (shard_size == "1GB")
        ours = make_model(sizes)
        load_weights(ours, folder)
        expected, found = theirs.state_dict(), ours.state_dict()
        for name, value in found.items():
            rows = len(expected[name])
            assert torch.equal(value[:rows], expected[name]), name
            assert not value[rows:].any(), "padding"


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "model.safetensors.index.json: no index of weights"),
        ("[]", "no index of weights"),
        ('{"weight_map": {"a": 3}}', "no index of weights"),
        ('{"weight_map": {"a": "../outside.safetensors"}}', "names '../outside.*no file beside it"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "no absent.safetensors beside .*index"),
        ('{"weight_map": {"a": "part.safetensors"}}', "part.safetensors: lacks a, which model"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, index: str, words: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    save_file({"b": torch.ones(1)}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=words) as caught:
        read_weights(tmp_path)
    assert "\n" not in str(caught.value)


def test_tied_tensors_that_differ_are_refused(tmp_path: Path, hugging_face_names: dict) -> None:
    content = {**hugging_face_names, "cls.predictions.decoder.bias": torch.zeros(104)}
    save_file(content, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"decoder\.bias differs from cls\.predictions\.bias"):
        read_weights(tmp_path)


# ---- TensorFlow


@needs_reference
@pytest.mark.parametrize("path", [TF1, TF1.with_name(TF1.name + ".index")])
def test_the_tensorflow_checkpoint_is_the_apex_checkpoint(path: Path) -> None:
    config = BertConfig.load(CHECKPOINT / "bert_config.json")
    ours, theirs = make_model(config), make_model(config)
    for model in (ours, theirs):
        for parameter in model.parameters():
            parameter.data.fill_(7.0)  # so that padding must be written
    load_weights(theirs, APEX)
    found = load_weights(ours, path)
    assert_same_tensors(ours.state_dict(), theirs.state_dict())
    assert found.step == 28252
    slots = found.left_out["optimizer state"]
    assert len(slots) == 88
    assert {"beta1_power", "bert/pooler/dense/kernel/LAMB_1"} <= set(slots)
    assert found.summary() == (
        "TensorFlow 1 checkpoint; step 28252; left out: optimizer state (88)"
    )


@needs_reference
def test_a_part_of_a_tensorflow_checkpoint_leads_to_the_whole() -> None:
    with pytest.raises(UserError, match=r"one part of a TensorFlow checkpoint; pass .*28252$"):
        read_weights(TF1.with_name(TF1.name + ".data-00000-of-00001"))
    with pytest.raises(UserError, match=r"a directory, not a .*--init_checkpoint .*28252$"):
        read_weights(TF1.parent)


# ---- strictness


def test_expected_shapes_are_the_models(model: BertForPreTraining) -> None:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    sizes = Sizes(2, 32, 48, 104, 512, 2)
    assert expected_shapes(sizes) == shapes
    assert sizes_of(model.state_dict()) == sizes
    assert sizes_of({"a": torch.ones(1)}) is None


def test_the_report_lists_every_tensor(
    tmp_path: Path, model: BertForPreTraining, weights: dict
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spoiled = {**weights, "extra": torch.ones(2), "other.extra": torch.ones(1)}
    del spoiled["bert.pooler.dense.bias"], spoiled["cls.seq_relationship.weight"]
    spoiled["cls.predictions.bias"] = torch.ones(99)
    spoiled["bert.embeddings.LayerNorm.bias"] = torch.ones(32, dtype=torch.int64)
    torch.save(spoiled, tmp_path / "start.pt")
    with pytest.raises(UserError) as caught:
        load_weights(model, tmp_path / "start.pt")
    summary, *lines = str(caught.value).splitlines()
    assert summary.endswith(
        "start.pt does not fit the model of bert_config.json: tensors "
        "2 missing (bert.pooler.dense.bias (32,), ...), 2 unexpected (extra (2,), ...), "
        "1 wrong shape (cls.predictions.bias is (99,), the model's is (104,)), "
        "1 wrong type (bert.embeddings.LayerNorm.bias is torch.int64); "
        "pass the checkpoint and bert_config.json of one model"
    )
    assert lines == [
        "  missing: bert.pooler.dense.bias (32,)",
        "  missing: cls.seq_relationship.weight (2, 32)",
        "  unexpected: extra (2,)",
        "  unexpected: other.extra (1,)",
        "  wrong shape: cls.predictions.bias is (99,), the model's is (104,)",
        "  wrong type: bert.embeddings.LayerNorm.bias is torch.int64",
    ]
    assert_same_tensors(model.state_dict(), before)


def test_a_report_of_another_model_is_readable(tmp_path: Path, weights: dict) -> None:
    torch.save(weights, tmp_path / "start.pt")
    with pytest.raises(UserError) as caught:
        load_weights(make_model(tiny_config(num_hidden_layers=12)), tmp_path / "start.pt")
    summary, *lines = str(caught.value).splitlines()
    assert "it has num_hidden_layers 2 instead of 12, tensors 160 missing (" in summary
    assert summary.endswith("--bert_config_path of this checkpoint's model, or another checkpoint")
    assert len(lines) == 41
    assert lines[-1] == "  missing: 120 more"


@pytest.mark.parametrize(("rows", "fits"), [(101, True), (104, True), (103, False), (105, False)])
def test_the_vocabulary_is_padded_from_its_own_size_alone(
    tmp_path: Path, model: BertForPreTraining, weights: dict, rows: int, fits: bool
) -> None:
    content = dict(weights)
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        content[name] = torch.ones(rows, *content[name].shape[1:])
    del content[DECODER]
    torch.save(content, tmp_path / "start.pt")
    if not fits:
        with pytest.raises(UserError, match=r"[23] wrong shape"):
            load_weights(model, tmp_path / "start.pt")
        return
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    load_weights(model, tmp_path / "start.pt")
    table = model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.weight is table
    for value in (table, model.cls.predictions.bias):
        assert value[:rows].eq(1).all()
        assert value[rows:].eq(0).all()


def test_one_name_twice_is_refused(tmp_path: Path, weights: dict) -> None:
    name = "bert.pooler.dense.bias"
    torch.save({**weights, f"module.{name}": weights[name]}, tmp_path / "start.pt")
    with pytest.raises(UserError, match=f"holds {name} twice, under two names"):
        read_weights(tmp_path / "start.pt")
