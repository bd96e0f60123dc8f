"""Checkpoints with the names, keys and heads of other programs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bert_pretraining.checkpoint import load_weights, read_weights
from bert_pretraining.checkpoint.formats import read_checkpoint
from bert_pretraining.checkpoint.names import from_pytorch
from bert_pretraining.checkpoint.plausibility import suspicions
from bert_pretraining.errors import UserError
from bert_pretraining.model.heads import BertForPreTraining
from helpers import assert_same_tensors, distinct_weights, make_model, tiny_config

EMBEDDING = "bert.embeddings.word_embeddings.weight"
DECODER = "cls.predictions.decoder.weight"
QUERY = "bert.encoder.layer.1.attention.self.query.weight"
NORM = "bert.encoder.layer.0.output.LayerNorm.weight"
WRAPPERS = (
    "module.", "model.", "_orig_mod.", "_fsdp_wrapped_module.", "_forward_module.",
    "_checkpoint_wrapped_module.",
)  # fmt: skip
NSP_HEAD = ["bert.pooler.dense.weight", "bert.pooler.dense.bias",
            "cls.seq_relationship.weight", "cls.seq_relationship.bias"]  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return distinct_weights(tiny_config())


@pytest.fixture
def model() -> BertForPreTraining:
    return make_model(tiny_config())


def kept(weights: dict, *beginnings: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights.items() if name.startswith(beginnings)}


# ---- names


@pytest.mark.parametrize("count", [1, 2, 3])
def test_wrappers_in_any_order_lead_to_the_same_names(weights: dict, count: int) -> None:
    for prefixes in itertools.permutations(WRAPPERS, count):
        for name in (EMBEDDING, QUERY, DECODER, "cls.seq_relationship.bias"):
            assert from_pytorch("".join(prefixes) + name)[0] == name


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("bert.encoder.layer.1._checkpoint_wrapped_module.attention.self.query.weight", QUERY),
        ("_fsdp_wrapped_module.bert.encoder._fsdp_wrapped_module.layer.1._fsdp_wrapped_module."
         "_orig_mod.attention.self.query.weight", QUERY),
        ("bert.module.encoder.layer.1.attention.self.query.weight", QUERY),
        ("bert." + QUERY, QUERY),
        ("bert.cls.predictions.bias", "cls.predictions.bias"),
        ("backbone.bert.pooler.dense.bias", "bert.pooler.dense.bias"),
        ("encoder.layer.1.attention.self.query.weight", QUERY),
        ("0.auto_model.encoder.layer.1.attention.self.query.weight", QUERY),
        ("encoder.encoder.layer.1.attention.self.query.weight", QUERY),
        ("module.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
        ("bert.pooler.dense_act.weight", "bert.pooler.dense.weight"),
        ("cls.predictions.transform.dense_act.bias", "cls.predictions.transform.dense.bias"),
        # Other models' layers have the same names and compute something else.
        ("roberta.encoder.layer.0.output.dense.bias", "roberta.encoder.layer.0.output.dense.bias"),
        ("electra.embeddings.word_embeddings.weight", "electra.embeddings.word_embeddings.weight"),
        ("classifier.weight", "classifier.weight"),
        ("qa_outputs.bias", "qa_outputs.bias"),
    ],
)  # fmt: skip
def test_a_name_of_another_program(theirs: str, ours: str) -> None:
    assert from_pytorch(theirs)[0] == ours


def test_a_file_says_what_was_in_front_of_its_names(tmp_path: Path, weights: dict) -> None:
    path = tmp_path / "start.pt"
    torch.save({f"_orig_mod.module.{name}": value for name, value in weights.items()}, path)
    found = read_checkpoint(path)
    assert found.format == "PyTorch file (bare, '_orig_mod.' in front, 'module.' in front)"
    assert_same_tensors(found.weights, weights)


def test_two_models_in_one_file_are_named(tmp_path: Path, weights: dict) -> None:
    both = {
        f"{one}.{name}": value for one in ("query", "passage") for name, value in weights.items()
    }
    torch.save(both, tmp_path / "two.pt")
    with pytest.raises(UserError, match=f"twice, .*: query.{EMBEDDING} and passage.{EMBEDDING}; "):
        read_weights(tmp_path / "two.pt")


def test_another_architecture_is_named(
    tmp_path: Path, model: BertForPreTraining, weights: dict
) -> None:
    theirs = {
        name.replace("bert.", "roberta.", 1): value
        for name, value in kept(weights, "bert.").items()
    }
    torch.save(theirs, tmp_path / "roberta.bin")
    for missing in ("refuse", "random"):
        with pytest.raises(UserError, match=r"none of .* is BERT's \(they begin with 'roberta'\)"):
            load_weights(model, tmp_path / "roberta.bin", missing)


# ---- where the weights are in a file


@pytest.mark.parametrize(
    "holder",
    [
        lambda w: {"model": w, "rng_state": torch.ones(3), "epoch": 3},
        lambda w: {"module": w, "optimizer": None, "ds_version": "0.14"},
        lambda w: {"state_dict": w, "hyper_parameters": {"lr": 1e-3}, "callbacks": {}},
        lambda w: {"net": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        lambda w: {"epoch": 1, "bert_large": w, "optimizer": {}},
        lambda w: {"app": {"model": w, "optimizer": {"state": {}}}},
        lambda w: {"checkpoint": {"state_dict": w}},
        lambda w: {"params": {"lr": 1e-3}, "model_state": w},
        lambda w: {**w, "version": 3, "note": "text", "nothing": None},
        lambda w: {"model": {**w, "num_updates": 5}},
        lambda w: {**w, "bert.encoder.layer.0._extra_state": torch.ones(4, dtype=torch.uint8)},
        lambda w: {**{f"module.{n}": v for n, v in w.items()}, "n_averaged": torch.tensor(7)},
        lambda w: {"model": {n: torch.nn.Parameter(v) for n, v in w.items()}},
    ],
)
def test_the_key_of_the_weights_is_found(
    tmp_path: Path, model: BertForPreTraining, weights: dict, holder: Callable
) -> None:
    torch.save(holder(weights), tmp_path / "start.pt")
    load_weights(model, tmp_path / "start.pt")
    assert_same_tensors(model.state_dict(), weights)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3, "optimizer": {}}, "; its keys are 'epoch', 'optimizer'; export"),
        ({}, ", but an empty dictionary; export"),
        ([torch.ones(1)], ", but a list; export"),
        (torch.ones(3), ", but a Tensor; export"),
    ],
)
def test_a_file_without_weights_says_what_it_holds(
    tmp_path: Path, content: object, words: str
) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"holds no named tensors, .* 'model' key{words}"):
        read_weights(tmp_path / "a.pt")


def test_a_dictionary_within_itself_ends(tmp_path: Path) -> None:
    content: dict = {"epoch": 1}
    content["model"] = content
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds no named tensors"):
        read_weights(tmp_path / "a.pt")


def test_deep_learning_examples(tmp_path: Path, model: BertForPreTraining, weights: dict) -> None:
    """NVIDIA's PyTorch file, with apex's optimizer, a list of masters and of data files."""
    renamed = {
        name.replace("intermediate.dense.", "intermediate.dense_act.")
        .replace("pooler.dense.", "pooler.dense_act.")
        .replace("transform.dense.", "transform.dense_act."): value
        for name, value in weights.items()
    }
    content = {
        "model": renamed,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"step": 7038}]},
        "master params": [torch.nn.Parameter(torch.ones(1))],
        "files": [3, "a_training_0.hdf5"], "epoch": 2, "data_loader": None,
    }  # fmt: skip
    torch.save(content, tmp_path / "ckpt_7038.pt")
    found = load_weights(model, tmp_path / "ckpt_7038.pt")
    assert "dense_act" in found.format
    assert_same_tensors(model.state_dict(), weights)


# ---- models without the heads of pretraining


def encoder(weights: dict) -> dict:
    """BertModel: no 'bert.' in its names."""
    return {name.removeprefix("bert."): value for name, value in kept(weights, "bert.").items()}


def classifier(weights: dict) -> dict:
    return {**kept(weights, "bert."), "classifier.weight": torch.zeros(2, 32),
            "classifier.bias": torch.zeros(2)}  # fmt: skip


def masked_lm(weights: dict) -> dict:
    return {name: value for name, value in weights.items() if name not in NSP_HEAD}


def question_answering(weights: dict) -> dict:
    return {**kept(masked_lm(weights), "bert."), "qa_outputs.weight": torch.zeros(2, 32),
            "qa_outputs.bias": torch.zeros(2)}  # fmt: skip


HEADLESS = {
    "encoder": (encoder, 9 - 2, 0, "--missing_weights random to start with random ones"),
    "classifier": (classifier, 9 - 2, 2, "--missing_weights random to start with random ones"),
    "masked_lm": (masked_lm, 4, 0, "--objective mlm to train without one, or --missing_weights ra"),
    "question_answering": (question_answering, 9, 2, "--missing_weights random to start with"),
}


@pytest.mark.parametrize("kind", HEADLESS)
def test_a_model_without_heads_is_refused_with_the_list_or_its_heads_start_anew(
    tmp_path: Path, weights: dict, kind: str
) -> None:
    make, lacking, extra, advice = HEADLESS[kind]
    torch.save(make(weights), tmp_path / "start.bin")
    model = make_model(tiny_config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(model, tmp_path / "start.bin")
    first, *lines = str(caught.value).splitlines()
    assert advice in first
    assert f"tensors {lacking} missing (" in first
    assert sum(line.startswith("  missing: ") for line in lines) == lacking
    assert sum(line.startswith("  unexpected: ") for line in lines) == extra
    assert_same_tensors(model.state_dict(), before)

    found = load_weights(model, tmp_path / "start.bin", "random")
    after = model.state_dict()
    assert len(found.anew) == lacking
    assert f"not in it, so random: {found.anew[0]}" in found.summary()
    assert ("left out: tensors that the model lacks (2: " in found.summary()) == (extra == 2)
    for name, value in after.items():
        assert torch.equal(value, before[name] if name in found.anew else weights[name]), name


def test_only_heads_start_anew(tmp_path: Path, model: BertForPreTraining, weights: dict) -> None:
    """Half an encoder would train, and no one would learn why it is so bad."""
    less = {
        name: value
        for name, value in weights.items()
        if not name.startswith("bert.encoder.layer.1")
    }
    torch.save(less, tmp_path / "less.pt")
    with pytest.raises(UserError, match="num_hidden_layers 1 instead of 2, tensors 16 missing"):
        load_weights(model, tmp_path / "less.pt", "random")
    more = {**weights, "bert.encoder.layer.2.output.dense.bias": torch.ones(32)}
    torch.save(more, tmp_path / "more.pt")
    with pytest.raises(UserError, match="num_hidden_layers 3 instead of 2, tensors 1 unexpected"):
        load_weights(model, tmp_path / "more.pt", "random")


def test_models_that_transformers_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = transformers.BertConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48,
    )  # fmt: skip
    for name, lacking, extra in (
        ("BertModel", 7, 0), ("BertForMaskedLM", 4, 0), ("BertForSequenceClassification", 7, 2),
        ("BertForQuestionAnswering", 9, 2), ("BertForNextSentencePrediction", 5, 0),
        ("BertForTokenClassification", 9, 2), ("BertForPreTraining", 0, 0),
    ):  # fmt: skip
        theirs = getattr(transformers, name)(sizes)
        theirs.save_pretrained(tmp_path / name)
        torch.save(theirs.state_dict(), tmp_path / f"{name}.bin")
        for path in (tmp_path / name, tmp_path / f"{name}.bin"):
            ours = make_model(tiny_config())
            found = load_weights(ours, path, "random")
            others = found.left_out.get("tensors that the model lacks", ())
            assert (len(found.anew), len(others)) == (lacking, extra), path
            expected, loaded = theirs.state_dict(), ours.state_dict()
            table = next(name for name in expected if name.endswith("word_embeddings.weight"))
            assert torch.equal(loaded[EMBEDDING][:101], expected[table]), path


# ---- numbers


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [QUERY, EMBEDDING, "cls.predictions.bias"])
def test_numbers_that_are_not_finite_are_the_files(
    tmp_path: Path, model: BertForPreTraining, weights: dict, name: str, number: float
) -> None:
    spoiled = {**weights, name: weights[name].clone()}
    spoiled[name].view(-1)[5:7] = number
    spoiled[DECODER] = spoiled[EMBEDDING].clone()
    spoiled["cls.predictions.decoder.bias"] = spoiled["cls.predictions.bias"].clone()
    torch.save(spoiled, tmp_path / "start.pt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count = f"{weights[name].numel():,}"
    with pytest.raises(UserError, match=f"start.pt: 2 of {count} numbers of {name} are NaN or inf"):
        load_weights(model, tmp_path / "start.pt")
    assert_same_tensors(model.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_are_taken(
    tmp_path: Path, model: BertForPreTraining, weights: dict, dtype: torch.dtype
) -> None:
    rounded = {name: value.to(dtype) for name, value in weights.items()}
    torch.save(rounded, tmp_path / "start.pt")
    load_weights(model, tmp_path / "start.pt")
    assert_same_tensors(
        model.state_dict(), {name: value.float() for name, value in rounded.items()}
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_numbers_are_refused(
    tmp_path: Path, model: BertForPreTraining, weights: dict, dtype: torch.dtype
) -> None:
    torch.save({name: value.to(dtype) for name, value in weights.items()}, tmp_path / "small.pt")
    with pytest.raises(UserError, match=r"quantized, .* 47 wrong type .*; pass the checkpoint"):
        load_weights(model, tmp_path / "small.pt")


def test_another_protocol_of_pickle_is_named(tmp_path: Path, weights: dict) -> None:
    torch.save(weights, tmp_path / "start.pt", pickle_protocol=5)
    with pytest.raises(UserError, match=r"pickled with protocol 5 and not with torch\.save's 2"):
        read_weights(tmp_path / "start.pt")


def test_trained_weights_raise_no_suspicion(weights: dict) -> None:
    assert suspicions(weights) == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda w: make_model(tiny_config()).state_dict(), "was never trained"),
        (lambda w: {**w, QUERY: torch.zeros(32, 32)}, f"are the same in {QUERY}: "),
        (lambda w: {name: value * 1000 for name, value in w.items()}, "far too large in bert.emb"),
        (lambda w: {**w, NORM: w[NORM] * 1e-4}, f"near 0 in {NORM}, which switch"),
    ],
)
def test_implausible_weights_are_suspected(weights: dict, spoil: Callable, words: str) -> None:
    (found,) = suspicions(spoil(weights))
    assert words in found
