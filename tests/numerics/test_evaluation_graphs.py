"""Evaluations from graphs: the same bits as without, and none where a graph may not be trusted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bert_pretraining.data.loader import EvaluationSet
from bert_pretraining.kernels import select
from bert_pretraining.kernels.fp8 import Fp8State
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.runtime import agreement, capture
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training import evaluate as evaluation
from bert_pretraining.training.evaluate import Evaluation, Evaluator, evaluate
from helpers import make_model, packed, padded_arrays, tiny_config
from recorded_graphs import RECORDED, RecordedGraph

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
LENGTHS = [[9, 16, 3], [4], [16, 16, 5, 7]]  # the last batch of a shard may be smaller
BATCHES = [packed(padded_arrays(lengths, 16, 101, seed=7)) for lengths in LENGTHS]
SET = EvaluationSet(5, [(1, BATCHES[0]), (2, BATCHES[1]), (4, BATCHES[2])])


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "graphs", lambda _device: RECORDED)


def figures(found: Evaluation) -> tuple:
    return found.losses, found.num_sequences


def make(**options: object) -> tuple[BertForPreTraining, Evaluator, list[str], list[int]]:
    """Model, evaluator, what it said, and how many tokens each forward pass of the model had."""
    model = make_model(tiny_config(hidden_dropout_prob=0.5))
    said: list[str] = []
    passes: list[int] = []
    model.register_forward_pre_hook(lambda _, given: passes.append(given[0].num_tokens))
    evaluator = Evaluator(model, ALONE, say=said.append, **{"pool": object(), **options})
    return model, evaluator, said, passes


def change(model: BertForPreTraining, seed: int) -> None:
    """What an update does: new weights in the same memory."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_later_evaluations_replay_and_give_the_same_bits() -> None:
    model, evaluator, said, passes = make()
    seen = set()
    for update in range(3):
        found = figures(evaluator(SET))
        assert model.training
        assert (len(passes) > 0) is (update == 0)
        assert found == figures(evaluate(model, SET, ALONE))
        seen.add(found[0].mean["mlm"])
        passes.clear()
        change(model, update)
    assert len(seen) == 3 and said == []


def test_another_set_and_a_set_without_batches() -> None:
    model, evaluator, _, passes = make()
    other = EvaluationSet(3, list(enumerate(BATCHES)))
    evaluator(SET)
    passes.clear()
    assert figures(evaluator(other)) == figures(evaluate(model, other, ALONE))
    assert len(passes) == 6
    _, evaluator, said, _ = make()
    for _ in range(2):
        assert evaluator(EvaluationSet(2, [])).num_sequences == 0
    assert said == []


def test_nothing_is_captured_where_the_step_is_not() -> None:
    _, evaluator, said, passes = make(pool=None)
    for _ in range(2):
        evaluator(SET)
    assert len(passes) == 6 and said == []


def test_only_so_many_batches_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MOST_GRAPHS", 2)
    model, evaluator, said, passes = make()
    evaluator(SET)
    change(model, 1)
    passes.clear()
    found = evaluator(SET)
    assert passes == [BATCHES[2].num_tokens] and said == []
    assert figures(found) == figures(evaluate(model, SET, ALONE))


def fails(*_: object) -> None:
    raise RuntimeError("operation not permitted\nmore lines")


def wrong(graph: RecordedGraph) -> None:
    function, arguments, options, results = graph.calls[-1]
    graph.calls[-1] = (lambda *a, **o: function(*a, **o) + 1, arguments, options, results)
    replay(graph)


replay = RecordedGraph.replay


@pytest.mark.parametrize(
    ("name", "function", "reason"),
    [
        ("__init__", fails, "RuntimeError: operation not permitted"),
        ("replay", wrong, "RuntimeError: a graph gives other sums than the same batch without it"),
    ],
    ids=["fails", "wrong"],
)
def test_a_graph_that_fails_or_is_wrong_is_left_out(
    monkeypatch: pytest.MonkeyPatch, name: str, function: Callable, reason: str
) -> None:
    monkeypatch.setattr(RecordedGraph, name, function)
    model, evaluator, said, passes = make()
    for update in range(3):
        assert figures(evaluator(SET)) == figures(evaluate(model, SET, ALONE))
        change(model, update)
    assert said == [f"Notice: evaluation is not captured: the run goes on without it ({reason})"]
    # Three of them tried to capture, or captured, as long as that was tried.
    assert len(passes) == 3 * 6 + (3 if name == "replay" else 0)


def test_a_wrong_graph_is_not_found_without_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecordedGraph, "replay", wrong)
    _, evaluator, said, _ = make(proves=False)
    evaluator(SET)
    assert said == []


def test_what_fails_on_another_rank_is_left_out_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        agreement, "first_said", lambda reason, device: reason or "OutOfMemoryError: full"
    )
    _, evaluator, said, passes = make()
    evaluator(SET)
    passes.clear()
    evaluator(SET)
    assert len(passes) == 3
    (notice,) = said
    assert notice.endswith("the run goes on without it (OutOfMemoryError: full)")


def test_batches_that_are_copied_each_time_are_not_captured() -> None:
    model, evaluator, said, _ = make()
    evaluator = Evaluator(model, Ranks(0, 1, torch.device("cpu", 0)), object(), say=said.append)
    for _ in range(2):
        assert figures(evaluator(SET)) == figures(evaluate(model, SET, ALONE))
    (notice,) = said
    assert "the evaluation set does not stay on the device" in notice


def test_fp8_is_captured_once_its_scales_are_those_of_an_update() -> None:
    model, said = make_model(tiny_config()), []
    state = Fp8State.of(model.bert.encoder, CPU)
    evaluator = Evaluator(model, ALONE, object(), fp8=state, say=said.append)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    for expected in (3, 6, 0):  # measured; evaluated and captured; replayed
        calls.clear()
        found = evaluator(SET)
        assert len(calls) == expected
        assert figures(found) == figures(evaluate(model, SET, ALONE))
        state.update()
    assert said == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_replays_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # real graphs
    device = torch.device("cuda", torch.cuda.current_device())
    ranks = Ranks(0, 1, device)
    dtype = torch.bfloat16 if devices.supports(device, torch.bfloat16) else torch.float32
    kernels = select("auto", device, dtype, head_size=8)
    model = BertForPreTraining(tiny_config(), kernels, seed=1).to(device, dtype)
    near = SET.near(device)
    evaluate(model, near, ranks)
    # The pool of a training step whose graph has room for an evaluation.
    step, _ = capture.captured(device, lambda: torch.empty(2**24, device=device).zero_())
    said: list[str] = []
    evaluator = Evaluator(model, ranks, step.pool(), say=said.append)
    evaluator(near)
    for shift in (0.0, 0.1):
        for parameter in model.parameters():
            parameter.data.add_(shift)
        step.replay()
        assert figures(evaluator(near)) == figures(evaluate(model, near, ranks))
    assert said == []
