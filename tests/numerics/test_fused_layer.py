"""The layer with a hand-written backward pass computes what the modules compute."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from bert_pretraining.kernels.fp8_operators import Factor
from bert_pretraining.kernels.pairs import PlainSums
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.fused_layer import NO_SEEDS, FusedLayer, Saved
from bert_pretraining.model.fused_record import run_layers
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.layer_form import CompiledForm, FusedForm, LayerForm
from bert_pretraining.model.parameter_memory import OwnGradients, side_by_side
from bert_pretraining.training.micro_step import forward_backward
from helpers import make_model, packed, padded_arrays, tiny_config
from reference_pairs import PAIRS

WEIGHTS = {"mlm": torch.tensor(0.01), "nsp": torch.tensor(0.2)}
LENGTHS = {"several": [30, 7, 52, 1, 64], "one token": [1], "full": [64, 64]}


def batch_of(lengths: list[int], seed: int = 3) -> PackedBatch:
    return packed(padded_arrays(lengths, 64, 101, seed=seed))


def fused(model: BertForPreTraining, sink: object = None) -> FusedForm:
    return FusedForm(model.bert.encoder.layer, PAIRS, sink or OwnGradients())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def run(model: BertForPreTraining, batches: list[PackedBatch], form: LayerForm | None) -> list:
    """The losses of each batch, and the gradients of all together."""
    model.zero_grad()
    sums = []
    with model.layers_as(form or model.bert.form):
        for batch in batches:
            sums.append(forward_backward(model, batch, WEIGHTS))
    return [sums, gradients(model)]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_gradients_are_those_of_the_modules(lengths: list[int], recompute: bool) -> None:
    model = make_model(tiny_config(), dtype=torch.float64)
    model.bert.encoder.checkpoint_activations = recompute
    batches = [batch_of(lengths), batch_of(lengths[::-1], seed=4)]
    expected = run(model, batches, None)
    found = run(model, batches, fused(model))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("width", [32, 64], ids=["biases are apart", "all are together"])
def test_queries_keys_and_values_may_lie_side_by_side(width: int) -> None:
    """Also the gradients, as in the flat memory of an optimizer."""
    model = make_model(tiny_config(hidden_size=width), dtype=torch.float64)
    batch = batch_of(LENGTHS["several"])
    expected = run(model, [batch], None)
    groups = [g for layer in model.bert.encoder.layer for g in layer.attention.self.groups()]
    for group in groups if width == 64 else groups[::2]:
        put_side_by_side(group)
        assert side_by_side(group) is not None
    model.zero_grad()
    memories = []
    for group in groups:
        memories.append(torch.zeros(3, *group[0].shape, dtype=torch.float64))
        for parameter, part in zip(group, memories[-1], strict=True):
            parameter.grad = part
    with model.layers_as(fused(model)):
        sums = forward_backward(model, batch, WEIGHTS)
    torch.testing.assert_close([[sums], gradients(model)], expected, rtol=1e-9, atol=1e-12)
    for memory, group in zip(memories, groups, strict=True):
        for part, parameter in zip(memory, group, strict=True):
            assert part.data_ptr() == parameter.grad.data_ptr()
            assert part.abs().sum() > 0


def put_side_by_side(parameters: Sequence[nn.Parameter]) -> None:
    """Move parameters of equal shape into one tensor, one behind the other."""
    whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, whole.chunk(len(parameters)), strict=True):
        parameter.data = part


class WideSink:
    """Gradients in float64, and the order in which layers told that theirs are there."""

    def __init__(self) -> None:
        self.targets: dict[nn.Parameter, Tensor] = {}
        self.order: list[tuple[nn.Parameter, ...]] = []

    def target(self, parameter: nn.Parameter) -> Tensor:
        if parameter not in self.targets:
            self.targets[parameter] = torch.zeros_like(parameter, dtype=torch.float64)
        return self.targets[parameter]

    def arrived(self, parameters: Sequence[nn.Parameter]) -> None:
        self.order.append(tuple(parameters))


def test_gradients_go_to_the_sink_in_its_dtype_and_autograd_sees_none() -> None:
    model = make_model(tiny_config(), dtype=torch.float32)
    batches = [batch_of([30, 7], seed=1), batch_of([9, 40, 2], seed=2)]
    expected = run(model, batches, None)[1]
    sink = WideSink()
    model.zero_grad()
    with model.layers_as(fused(model, sink)):
        for batch in batches:
            forward_backward(model, batch, WEIGHTS)
    names = {parameter: name for name, parameter in model.named_parameters()}
    in_layers = {name for name in names.values() if ".layer." in name}
    assert {names[parameter] for parameter in sink.targets} == in_layers
    for parameter, found in sink.targets.items():
        assert parameter.grad is None
        torch.testing.assert_close(found.float(), expected[names[parameter]], rtol=1e-4, atol=1e-6)
    layers = [tuple(layer.parameters()) for layer in model.bert.encoder.layer]
    assert sink.order == 2 * layers[::-1]  # the last layer's come first, in each micro-batch


def test_evaluation_keeps_nothing_and_gives_the_same_losses() -> None:
    model = make_model(tiny_config(), dtype=torch.float64).eval()
    batch = batch_of([30, 7, 52])
    with torch.no_grad():
        expected = model(batch)
        with model.layers_as(fused(model)):
            found = model(batch)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert not found["mlm"].loss.requires_grad


class CountingSink(OwnGradients):
    """Counts the tensors of each layer that are still kept when a layer begins or has gone back."""

    def __init__(self) -> None:
        self.kept: list[list[weakref.ref]] = []
        self.alive: list[list[int]] = []

    def arrived(self, parameters: Sequence[nn.Parameter]) -> None:
        self.alive.append([sum(ref() is not None for ref in refs) for refs in self.kept])


class WatchedLayer(FusedLayer):
    """Tells the sink what it keeps."""

    def forward(self, *arguments: object) -> tuple[Tensor, Factor, Saved]:
        self.sink.arrived(())
        output, factor, saved = super().forward(*arguments)
        self.sink.kept.append([weakref.ref(saved.inner), weakref.ref(saved.context)])
        return output, factor, saved


def test_what_a_layer_keeps_is_freed_when_it_has_gone_back() -> None:
    model = make_model(tiny_config(num_hidden_layers=3))
    batch, sink = batch_of([30, 7]), CountingSink()
    layers = [WatchedLayer(layer, PAIRS, sink) for layer in model.bert.encoder.layer]
    hidden = torch.randn(37, model.bert.embeddings.word_embeddings.weight.shape[1])
    output = run_layers(layers, [NO_SEEDS] * 3, hidden.requires_grad_(), batch)
    sink.alive.clear()
    output.sum().backward()
    # The tensors of the layer that has just gone back are freed after it told so.
    assert [counts[-1 - n :] for n, counts in enumerate(sink.alive)] == [
        [2], [2, 0], [2, 0, 0]
    ]  # fmt: skip
    assert all(ref() is None for refs in sink.kept[1:] for ref in refs)


def test_an_evaluation_keeps_nothing_of_a_layer_while_the_next_one_runs() -> None:
    model = make_model(tiny_config(num_hidden_layers=3))
    batch, sink = batch_of([30, 7]), CountingSink()
    layers = [WatchedLayer(layer, PAIRS, sink) for layer in model.bert.encoder.layer]
    hidden = torch.randn(37, model.bert.embeddings.word_embeddings.weight.shape[1])
    with torch.no_grad():
        run_layers(layers, [NO_SEEDS] * 3, hidden, batch)
    assert sink.alive == [[], [0], [0, 0]]


def test_a_second_backward_pass_is_refused() -> None:
    model = make_model(tiny_config())
    with model.layers_as(fused(model)):
        loss = model(batch_of([30, 7]))["mlm"].loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="keep nothing for a second backward pass"):
        loss.backward()


def test_the_form_is_restored_also_after_an_error() -> None:
    model = make_model(tiny_config())
    before = model.bert.form
    with pytest.raises(RuntimeError, match="some error"), model.layers_as(fused(model)):
        raise RuntimeError("some error")
    assert model.bert.form is before


def test_memory_order_puts_value_key_and_query_behind_each_other() -> None:
    model = make_model(tiny_config())
    ordered = model.parameters_in_memory_order()
    assert sorted(name for name, _ in ordered) == sorted(n for n, _ in model.named_parameters())
    names = [name for name, _ in ordered]
    for kind in ("weight", "bias"):
        start = names.index(f"bert.encoder.layer.1.attention.self.value.{kind}")
        parts = [name.split(".")[-2] for name in names[start : start + 3]]
        assert parts == ["value", "key", "query"]
    assert all(dict(model.named_parameters())[name] is one for name, one in ordered)


@pytest.mark.parametrize(
    "parts",
    [
        torch.zeros(6, 4).chunk(3)[::-1],
        [torch.zeros(2, 4) for _ in range(3)],
        torch.zeros(4, 6).t().chunk(3),
    ],
    ids=["in reverse", "separate", "not contiguous"],
)
def test_what_does_not_lie_side_by_side_is_not_taken_for_it(parts: Sequence[Tensor]) -> None:
    assert side_by_side(parts) is None


def test_side_by_side_shares_memory() -> None:
    memory = torch.arange(30.0)
    found = side_by_side([part.view(2, 4) for part in memory[3:27].split(8)])
    assert torch.equal(found, memory[3:27].view(6, 4))
    found += 1.0
    assert memory[3] == 4.0


@pytest.mark.slow
@pytest.mark.parametrize("constant", [True, False])
def test_all_layers_share_one_program(constant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many programs for six layers as for two; batches of another size run as they are."""
    eager = functools.partial(torch.compile, backend="eager")  # the programs are traced only
    monkeypatch.setattr(torch, "compile", eager)
    batches = [batch_of([30, 7, 52]), batch_of([9, 40, 2, 16])]
    counts = []
    for num_layers in (2, 6):
        model = make_model(tiny_config(num_hidden_layers=num_layers), "torch")
        expected = run(model, batches, None)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        form = CompiledForm(batches[0].num_tokens if constant else None)
        found = run(model, batches, form)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("parts", [0, 1, 5])
def test_a_provider_without_its_own_way_adds_partial_sums_at_once(parts: int) -> None:
    partial = torch.randn(parts, 2, 3, dtype=torch.float64)
    outputs = [torch.ones(3, dtype=torch.float64) for _ in range(2)]
    sums = PlainSums()
    sums(partial, outputs)
    sums.finish()
    torch.testing.assert_close(torch.stack(outputs), 1.0 + partial.sum(0))
