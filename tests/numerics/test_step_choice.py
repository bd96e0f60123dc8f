"""Compiled steps that fail or are wrong are left out; torch.compile is replaced by stand-ins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bert_pretraining import config
from bert_pretraining.errors import UserError
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.losses import LossSum
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.micro_step import MicroStep, forward_backward
from bert_pretraining.training.static_batch import usual_budget
from bert_pretraining.training.step_choice import (
    Trained,
    Way,
    best_that_works,
    prepared_step,
)
from bert_pretraining.training.step_proof import difference, sample_batch
from helpers import make_model, packed, padded_arrays, tiny_config
from reference_pairs import PAIRS

ALONE = Ranks(0, 1, torch.device("cpu"))
BATCH = packed(padded_arrays([30, 7, 52, 11, 64, 5], 64, 101, seed=3))
SIZE = usual_budget(6, 64, 200)
WEIGHTS = {"mlm": torch.tensor(0.01), "nsp": torch.tensor(0.2)}


class Wrong(nn.Module):
    """The model, but the gradient of one parameter is scaled, or the pass raises."""

    def __init__(self, model: nn.Module, factor: float = 1.0, fails_from: float = 1e9) -> None:
        super().__init__()
        self.model, self.factor, self.fails_from = model, factor, fails_from

    def forward(self, batch: PackedBatch) -> dict[str, LossSum]:
        return spoiled(self.model, self.model(batch), batch, self.factor, self.fails_from)


def spoiled(
    model: BertForPreTraining,
    sums: dict[str, LossSum],
    batch: PackedBatch,
    factor: float,
    fails_from: float,
) -> dict[str, LossSum]:
    if batch.num_tokens >= fails_from:
        raise RuntimeError(f"backend failed for {batch.num_tokens} tokens\nmore lines")
    bias = model.bert.encoder.layer[0].output.dense.bias
    extra = (factor - 1.0) * (bias - bias.detach()).sum()
    return {name: part._replace(loss=part.loss + extra) for name, part in sums.items()}


def compiler(factor: float = 1.0, fails_from: float = 1e9) -> Callable:
    """Stands for torch.compile: all parts of the model stay as they are, but not the losses."""

    def compiled(function: Callable, dynamic: bool) -> Callable:
        if function is not BertForPreTraining.losses_of:
            return function

        def run(model: BertForPreTraining, hidden: torch.Tensor, batch: PackedBatch) -> dict:
            return spoiled(model, function(model, hidden, batch), batch, factor, fails_from)

        return run

    return compiled


def tiny(dropout: float = 0.0) -> BertForPreTraining:
    sizes = tiny_config(
        num_hidden_layers=1,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return make_model(sizes, "torch")


def trained(model: nn.Module, **others: object) -> Trained:
    module = getattr(model, "model", model)
    return Trained(module, model, lambda: module.zero_grad(set_to_none=False), **others)


def prepare(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, make: Callable, **values: object
) -> tuple[MicroStep, list[str]]:
    """A step for --compile on; `make` stands for torch.compile."""
    settings = {
        "compile": "on",
        "batching": "balanced",
        "train_batch_size": 6,
        "static_tokens": 200,
    }
    chosen = config.resolve({**settings, "prove_kernels": "on", **values}).config
    monkeypatch.setattr(torch, "compile", make)
    monkeypatch.setenv("CXX", "true")  # any program: nothing is compiled
    said: list[str] = []
    before = torch.get_rng_state()
    step = prepared_step(chosen, trained(model), 64, ALONE, said.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(
        parameter.grad is not None and parameter.grad.any() for parameter in model.parameters()
    )
    return step, said


def gradients_of(step: Callable, model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    step(BATCH, WEIGHTS)
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("batching", ["balanced", "random"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_right_step_is_kept(
    monkeypatch: pytest.MonkeyPatch, dropout: float, batching: str
) -> None:
    _, said = prepare(tiny(dropout), monkeypatch, compiler(), batching=batching)
    assert not [text for text in said if text.startswith("Notice")]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_wrong_gradient_is_found_and_named(
    monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    with pytest.raises(UserError, match=r"torch.compile fails .the gradient of bert.encoder.layer"):
        prepare(tiny(dropout), monkeypatch, compiler(1000.0 if dropout else 1.1))


def test_a_wrong_loss_is_found() -> None:
    model, batch = tiny(), sample_batch(3, 32, 8, ALONE.device)
    losses = [forward_backward(model, batch, WEIGHTS)] * 3
    other = {name: part._replace(loss=part.loss * 1.01) for name, part in losses[0].items()}
    steps = iter([*losses[:2], other])
    model.zero_grad(set_to_none=False)
    found = difference(model, lambda: next(steps), lambda: next(steps), lambda: None)
    assert found.startswith("the loss differs by ")


@pytest.mark.parametrize("batching", ["balanced", "random"])
def test_compiling_that_fails_and_was_asked_for_is_an_error(
    monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    with pytest.raises(
        UserError, match=r"RuntimeError: backend failed for \d+ tokens.; pass --comp"
    ):
        prepare(tiny(), monkeypatch, compiler(fails_from=0), batching=batching)


def test_a_new_shape_that_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first real batch is larger than what was tried; no gradient counts twice."""
    model = tiny()
    step, _ = prepare(model, monkeypatch, compiler(fails_from=100), batching="random")
    with pytest.raises(UserError, match="backend failed for 169 tokens"):
        step(BATCH, WEIGHTS)


def test_the_step_goes_on_where_a_form_fails() -> None:
    model = tiny()
    expected = gradients_of(lambda *given: forward_backward(model, *given), model)
    wrong = Wrong(model, fails_from=0)
    errors: list[Exception] = []

    def instead(error: Exception) -> None:
        errors.append(error)
        wrong.fails_from = 1e9

    step = MicroStep(wrong, ALONE.device, None, False, instead=instead)
    for _ in range(2):
        for ours, theirs in zip(gradients_of(step, model), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert len(errors) == 1


@pytest.mark.parametrize("proves", ["on", "off"])
@pytest.mark.parametrize(
    ("way", "fails_from", "names"),
    [
        (Way(("compiled", "plain"), False, SIZE), 0, ["torch.compile"]),
        (Way(("plain",), True, SIZE), 1e9, ["use_cuda_graph"]),
        (Way(("compiled", "plain"), True, SIZE), 0, ["torch.compile", "use_cuda_graph"]),
    ],
    ids=["compiled", "graph", "both"],
)
def test_what_fails_is_left_out_with_one_notice(
    monkeypatch: pytest.MonkeyPatch, way: Way, fails_from: float, names: list[str], proves: str
) -> None:
    """On a CPU no graph can be captured."""
    if torch.cuda.is_available():
        pytest.skip("a CUDA device can capture the graph")
    monkeypatch.setattr(torch, "compile", compiler(1.0, fails_from))
    chosen = config.resolve({"train_batch_size": 6, "prove_kernels": proves}).config
    model = tiny()
    said: list[str] = []
    step = best_that_works(way, chosen, trained(model), 64, ALONE, said.append)
    notices = [text for text in said if text.startswith("Notice: ")]
    assert len(notices) == len(names)
    for notice, name in zip(notices, names, strict=True):
        assert notice.startswith(f"Notice: {name}: the run goes on without it (")
        assert "\n" not in notice
    assert not step.captured
    expected = gradients_of(lambda *given: forward_backward(model, *given), model)
    for ours, theirs in zip(gradients_of(step, model), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_that_fails_for_the_shape_is_not_captured_again_and_again() -> None:
    """Nothing was compiled, so that the notice is about the graph."""
    model = Wrong(tiny(), fails_from=SIZE.tokens)
    chosen = config.resolve({"train_batch_size": 6}).config
    said: list[str] = []
    way = Way(("plain",), True, SIZE)
    step = best_that_works(way, chosen, trained(model), 64, ALONE, said.append)
    (notice,) = said
    assert notice.startswith("Notice: use_cuda_graph: the run goes on without it (RuntimeError: ")
    assert not step.captured


def with_pairs(dropout: float = 0.0, gelu_backward: Callable | None = None) -> BertForPreTraining:
    """A model whose operators have pairs; maybe with another backward function of GELU."""
    model = tiny(dropout)
    gelu = PAIRS.bias_gelu
    gelu = gelu._replace(backward=gelu_backward or gelu.backward)
    model.kernels = dataclasses.replace(
        model.kernels, pairs=dataclasses.replace(PAIRS, bias_gelu=gelu)
    )
    return model


@pytest.mark.parametrize("compile_it", ["auto", "off"])
def test_layers_are_fused_where_their_operators_allow_it(compile_it: str) -> None:
    model, said = with_pairs(), []
    expected = gradients_of(lambda *given: forward_backward(model, *given), model)
    chosen = config.resolve({"compile": compile_it, "prove_kernels": "on"}).config
    step = prepared_step(chosen, trained(model), 64, ALONE, said.append)
    assert said == ["Micro-steps: fused layers"]
    assert model.bert.form.name == "fused"
    torch.testing.assert_close(gradients_of(step, model), expected, rtol=1e-4, atol=1e-6)


def test_layers_are_not_fused_where_gradients_are_sent_by_autograd() -> None:
    model, said = with_pairs(), []
    chosen = config.resolve({"compile": "auto", "prove_kernels": "on"}).config
    prepared_step(chosen, trained(model, reduces_later=False), 64, ALONE, said.append)
    assert model.bert.form.name == "plain" and said == []


def test_compile_on_is_obeyed_although_layers_could_be_fused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = with_pairs()
    prepare(model, monkeypatch, compiler())
    assert model.bert.form.name == "compiled"


def test_fused_layers_that_are_wrong_are_left_out() -> None:
    def wrong(gradient: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return 1.01 * PAIRS.bias_gelu.backward(gradient, *others)

    model, said = with_pairs(gelu_backward=wrong), []
    expected = gradients_of(lambda *given: forward_backward(model, *given), model)
    chosen = config.resolve({"compile": "auto", "prove_kernels": "on"}).config
    step = prepared_step(chosen, trained(model), 64, ALONE, said.append)
    (notice,) = said
    assert notice.startswith("Notice: fused layers: the run goes on without it (the gradient of ")
    assert model.bert.form.name == "plain"
    assert all(map(torch.equal, gradients_of(step, model), expected))
