"""Which reduction of gradients is chosen, what logs call it, and that all give the same mean."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from bert_pretraining.model.layer_form import FusedForm
from bert_pretraining.model.losses import mean_loss
from bert_pretraining.model.parameter_memory import OwnGradients
from bert_pretraining.optim import OptimizerSettings, create_optimizer
from bert_pretraining.runtime import process_group
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training import gradient_reduction
from bert_pretraining.training.gradient_reduction import make_reduction
from helpers import make_model, packed, padded_arrays, tiny_config
from reference_pairs import PAIRS

TWO = Ranks(0, 2, torch.device("cpu"))
BATCHES = [packed(padded_arrays([9, 16, 3], 16, 101, seed=seed)) for seed in range(3)]


@pytest.fixture(autouse=True)
def _group_of_one() -> Iterator[None]:
    """A real process group of this process alone: the mean over its ranks is the gradient."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    process_group.stop()  # old versions hang if gloo still frees tensors


# optimizer, sharing, clipping first, whether the backend takes the device's tensors
CHOICES = {
    ("flat", "replicated", False, True): ("DuringBackward", True),
    ("flat", "sharded", False, True): ("Sharded", True),
    ("flat", "sharded", True, True): ("Sharded", True),
    ("flat", "sharded", False, False): ("Sharded", True),
    ("flat", "replicated", True, True): ("AfterClipping", True),
    ("flat", "replicated", True, False): ("AfterClipping", True),
    ("flat", "replicated", False, False): ("AfterBackward", True),
    ("foreach", "replicated", False, True): ("DuringBackward", False),
    ("foreach", "replicated", True, True): ("AfterClipping", True),
    ("foreach", "replicated", False, False): ("AfterBackward", True),
}


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused layers"])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_reduction(choice: tuple, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fused and not CHOICES[choice][1]:
        pytest.skip("DistributedDataParallel must see all gradients, so layers are not fused")
    optimizer_name, sharing, clips, sends = choice
    monkeypatch.setattr(gradient_reduction, "sends_from_device", lambda device: sends)
    results = []
    for alone in (True, False):
        model = make_model(tiny_config(), dtype=torch.float32)
        optimizer = create_optimizer(
            optimizer_name,
            model.parameters_in_memory_order(),
            OptimizerSettings(),
            sharing="alone" if alone else sharing,
        )
        ranks = Ranks(0, 1, TWO.device) if alone else TWO
        reduction = make_reduction(model, optimizer, ranks, 100.0 if clips else None)
        name = ("NoReduction", True) if alone else CHOICES[choice]
        assert (reduction.name, reduction.can_follow) == name
        if fused:
            sink = optimizer.sink or OwnGradients()
            model.bert.form = FusedForm(model.bert.encoder.layer, PAIRS, sink)
        for _ in range(2):
            optimizer.zero_grad()
            for batch in BATCHES:
                torch.manual_seed(1)
                with reduction.overlap(last=batch is BATCHES[-1]):
                    mean_loss(reduction.model(batch), batch).backward()
            reduction.finish(torch.ones(()))
            assert optimizer.step(0.01)
        norm = optimizer.gradient_norm.item()
        results.append((norm, [one.detach().clone() for one in model.parameters()]))
    assert 0.0 < results[0][0] < 100.0
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(one, other)


def test_ddp_tells_when_a_rank_begins_to_wait() -> None:
    """Once an update: in the last backward pass, when all gradients of the rank are there."""
    model = make_model(tiny_config(), dtype=torch.float32)
    optimizer = create_optimizer("foreach", model.parameters_in_memory_order(), OptimizerSettings())
    told: list[list[str]] = []

    def tell() -> None:
        told.append([name for name, one in model.named_parameters() if one.grad is None])

    reduction = make_reduction(model, optimizer, TWO, None, tell)
    for update in range(1, 3):
        optimizer.zero_grad()
        for batch in BATCHES:
            with reduction.overlap(last=batch is BATCHES[-1]):
                mean_loss(reduction.model(batch), batch).backward()
            assert len(told) == (update if batch is BATCHES[-1] else update - 1)
    assert told == [[], []]
