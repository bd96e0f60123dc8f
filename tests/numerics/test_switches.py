"""Upstream's switches: every combination trains, with the loss of the reference operators."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch

from bert_pretraining import config
from bert_pretraining.errors import UserError
from bert_pretraining.kernels import select
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.micro_step import forward_backward
from bert_pretraining.training.step_choice import Trained, prepared_step
from helpers import make_model, packed, padded_arrays, tiny_config

SWITCHES = (
    "fused_mha", "fused_gelu_bias", "fused_dropout_add", "dense_seq_output", "exchange_padding",
    "unpad", "pad", "enable_fuse_dropout", "use_cuda_graph", "checkpoint_activations",
)  # fmt: skip
# The others have no effect, whatever they are.
WITH_EFFECT = ("exchange_padding", "use_cuda_graph", "checkpoint_activations")
ALONE = Ranks(0, 1, torch.device("cpu"))
BATCH = packed(padded_arrays([30, 7, 52, 11, 64, 5], 64, 101, seed=3))
WEIGHTS = {"mlm": torch.tensor(0.01), "nsp": torch.tensor(0.2)}


def trained(model: BertForPreTraining) -> Trained:
    return Trained(model, model, functools.partial(model.zero_grad, set_to_none=False))


def combinations(whole: bool) -> Iterator[dict[str, bool]]:
    """Every combination; or of those without effect, each alone, all and none."""
    without = [name for name in SWITCHES if name not in WITH_EFFECT]
    few = [set(), set(without), *({name} for name in without)]
    if whole:
        few = [
            set(on) for n in range(len(without) + 1) for on in itertools.combinations(without, n)
        ]
    for flags in itertools.product((False, True), repeat=len(WITH_EFFECT)):
        for on in few:
            others = {name: name in on for name in without}
            yield {**others, **dict(zip(WITH_EFFECT, flags, strict=True))}


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_combination_of_switches_trains(whole: bool) -> None:
    reference = make_model(tiny_config(num_hidden_layers=1))
    expected = forward_backward(reference, BATCH, WEIGHTS)
    norm = torch.stack([parameter.grad.norm() for parameter in reference.parameters()]).norm()
    for values in combinations(whole):
        chosen = config.resolve({"train_batch_size": 6, **values}).config
        kernels = select(chosen.kernels, ALONE.device, torch.float32)
        model = BertForPreTraining(
            tiny_config(num_hidden_layers=1), kernels, 1, chosen.checkpoint_activations
        )
        said: list[str] = []
        step = prepared_step(chosen, trained(model), 512, ALONE, said.append)
        torch.testing.assert_close(step(BATCH, WEIGHTS), expected, rtol=1e-4, atol=1e-4)
        norms = [parameter.grad.norm() for parameter in model.parameters()]
        torch.testing.assert_close(torch.stack(norms).norm(), norm, rtol=1e-4, atol=1e-6)
        assert chosen.resolved_batching == ("balanced" if values["exchange_padding"] else "random")
        assert ("use_cuda_graph has no effect" in "".join(said)) == values["use_cuda_graph"]
        without = {name for names in chosen.without_effect.values() for name in names}
        assert without == {name for name in SWITCHES if values[name] and name not in WITH_EFFECT}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_give_the_same_gradients(dropout: float) -> None:
    """The recomputed layers use the dropout masks of the first forward pass."""
    sizes = tiny_config(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    taken = []
    for recompute in (False, True):
        kernels = select("torch", ALONE.device, torch.float32)
        model = BertForPreTraining(sizes, kernels, 1, recompute)
        torch.manual_seed(7)
        forward_backward(model, BATCH, WEIGHTS)
        taken.append([parameter.grad for parameter in model.parameters()])
    for kept, recomputed in zip(*taken, strict=True):
        assert torch.equal(kept, recomputed)


@pytest.mark.slow
def test_compiled_steps_are_the_eager_ones() -> None:
    chosen = config.resolve(
        {"compile": "on", "batching": "balanced", "train_batch_size": 6, "static_tokens": 200}
    ).config
    model = make_model(tiny_config(num_hidden_layers=1, max_position_embeddings=64), "torch")
    expected = forward_backward(model, BATCH, WEIGHTS)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    said: list[str] = []
    step = prepared_step(chosen, trained(model), 64, ALONE, said.append)
    torch.testing.assert_close(step(BATCH, WEIGHTS), expected, rtol=1e-4, atol=1e-4)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    assert said[0].startswith("Constant shapes: 200 tokens")


def test_compiling_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    chosen = config.resolve({"compile": "on"}).config
    with pytest.raises(UserError, match=r"needs a C.. compiler; install"):
        model = make_model(tiny_config())
        prepared_step(chosen, trained(model), 512, ALONE, print)


def test_compiling_on_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    chosen = config.resolve({"compile": "on"}).config
    on_gpu = Ranks(0, 1, torch.device("cuda", 0))
    with pytest.raises(UserError, match=r"on a GPU it needs triton; .*-m pip install"):
        model = make_model(tiny_config())
        prepared_step(chosen, trained(model), 512, on_gpu, print)
