"""One whole update: the fp16 loss scale on the device, skipped steps, no waiting for a device."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bert_pretraining.errors import TrainingError
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.optim import (
    LossScale,
    Optimizer,
    OptimizerSettings,
    Schedule,
    create_optimizer,
)
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.gradient_reduction import NoReduction
from bert_pretraining.training.micro_step import MicroStep
from bert_pretraining.training.outcomes import COPY_EVERY
from bert_pretraining.training.step_clock import StepClock
from bert_pretraining.training.update import Update
from helpers import make_model, packed, padded_arrays, tiny_config

CPU = torch.device("cpu")
BATCHES = [packed(padded_arrays([9, 16, 3], 16, 101, seed=seed)) for seed in range(4)]
SCHEDULE = Schedule(1e-3, max_steps=100, warmup_steps=10)


def make(
    dtype: torch.dtype, loss_scale: LossScale, optimizer: str = "flat"
) -> tuple[BertForPreTraining, Optimizer, Update]:
    model = make_model(tiny_config(), dtype=dtype)
    lamb = create_optimizer(optimizer, model.named_parameters(), OptimizerSettings())
    micro_step = MicroStep(model, CPU, None, graph=False)
    update = Update(
        module=model,
        micro_step=micro_step,
        reduction=NoReduction(model),
        optimizer=lamb,
        schedule=SCHEDULE,
        loss_scale=loss_scale,
        normalization="rank",
        ranks=Ranks(0, 1, CPU),
        clock=StepClock(CPU),
    )
    return model, lamb, update


@pytest.mark.parametrize("optimizer", ["flat", "reference", "foreach"])
def test_overflows_in_fp16_are_skipped_until_the_scale_fits(optimizer: str) -> None:
    model, lamb, update = make(torch.float16, LossScale(2.0**24, dynamic=True), optimizer)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    totals = update(BATCHES[:2])
    outcome = update.outcomes.read(0, totals)
    assert (outcome.updates, outcome.skipped, outcome.last_finite) == (0, 1, False)
    assert outcome.loss_scale == 2.0**23
    assert lamb.updates == 0
    for one, other in zip(start, model.parameters(), strict=True):
        assert torch.equal(one, other)
    for _ in range(20):
        totals = update(BATCHES[:2])
    outcome = update.outcomes.read(0, totals)
    # Every overflow halved the scale, and no overflow followed once it was low enough.
    assert outcome.updates >= 5
    assert outcome.loss_scale == 2.0 ** (23 - outcome.skipped)
    assert outcome.last_finite
    assert lamb.updates == outcome.updates
    assert torch.isfinite(lamb.gradient_norm)


def test_a_scaled_update_is_the_unscaled_one() -> None:
    norms = []
    for loss_scale in (LossScale(1.0, dynamic=False), LossScale(2.0**12, dynamic=True)):
        _, lamb, update = make(torch.float32, loss_scale)
        totals = update(BATCHES)
        assert update.outcomes.read(0, totals).updates == 1
        norms.append((lamb.gradient_norm.item(), [one.clone() for one in lamb.masters]))
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-6)
    for one, other in zip(norms[0][1], norms[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_the_rate_follows_the_updates_that_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    model, lamb, update = make(torch.float32, LossScale(8.0, dynamic=True))
    step = lamb.step
    monkeypatch.setattr(lamb, "step", lambda rate, scale: rates.append(rate) or step(rate, scale))
    broken = 2
    for number in range(5):
        weight = model.cls.predictions.bias.data
        kept = weight.clone()
        if number == broken:
            weight.fill_(torch.inf)
        totals = update(BATCHES[:1])
        if number == broken:
            weight.copy_(kept)
    assert [rate.item() for rate in rates] == [SCHEDULE(made) for made in (0, 1, 2, 2, 3)]
    outcome = update.outcomes.read(0, totals)
    assert (outcome.updates, outcome.skipped, outcome.last_finite) == (4, 1, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_dynamic_scale_the_weights_stay_and_the_cause_is_named(
    dtype: torch.dtype,
) -> None:
    model, lamb, update = make(dtype, LossScale(1.0, dynamic=False))
    totals = update(BATCHES[:1])
    layer = model.bert.encoder.layer[0].output.dense.weight.data
    layer[0, 0] = torch.nan
    totals = update(BATCHES[1:2])
    layer[0, 0] = 0.0
    kept = [one.clone() for one in lamb.masters]
    totals = update(BATCHES[2:3])  # finite by itself, but after a step that was not
    for one, other in zip(kept, lamb.masters, strict=True):
        assert torch.equal(one, other)
    layer[0, 0] = torch.nan
    name = r"parameter bert\.encoder\.layer\.0\.output\.dense\.weight holds 1 NaN"
    with pytest.raises(TrainingError, match=f"not finite after 8 updates: {name}.*; try a lower"):
        update.outcomes.read(7, totals)


def test_the_batch_that_broke_is_the_one_looked_at() -> None:
    """Only one batch has the token whose embedding is too large."""
    model, _, update = make(torch.float32, LossScale(1.0, dynamic=False))
    tokens = {int(token) for batch in BATCHES[1:] for token in batch.input_ids}
    token = next(int(one) for one in BATCHES[0].input_ids if int(one) not in tokens)
    totals = update(BATCHES[1:2])
    model.bert.embeddings.word_embeddings.weight.data[token] = 3e38
    totals = update(BATCHES[:1])
    totals = update(BATCHES[2:3])
    with pytest.raises(TrainingError, match=r"after 1 update: the output of bert\.embeddings"):
        update.outcomes.read(0, totals)


def test_a_fixed_loss_scale_that_overflows_is_the_scale_s_fault() -> None:
    _, _, update = make(torch.float16, LossScale(2.0**24, dynamic=False))
    totals = update(BATCHES[:2])
    with pytest.raises(TrainingError, match=r"the gradient of .*; try a lower --loss_scale, or 0"):
        update.outcomes.read(0, totals)


def test_endless_overflow_ends_the_run() -> None:
    model, _, update = make(torch.float32, LossScale(2.0**20, dynamic=True))
    model.bert.embeddings.LayerNorm.bias.data[3] = torch.inf
    skipped = 0
    for _ in range(3):
        for _ in range(COPY_EVERY):
            totals = update(BATCHES[:1])
        skipped += update.outcomes.read(5, totals).skipped
    assert skipped == 30
    totals = update(BATCHES[:1])
    with pytest.raises(
        TrainingError,
        match=r"overflowed 31 times in a row after 5 updates, at last at loss scale 1: parameter "
        r"bert\.embeddings\.LayerNorm\.bias holds 0 NaN and 1 infinite of 32 numbers; the weights",
    ):
        update.outcomes.read(5, totals)


class NoReading(TorchDispatchMode):
    """Fails if a tensor's value is read as a Python number, which waits on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["flat", "foreach", "reference"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_no_update_waits_for_the_device(optimizer: str, precision: str) -> None:
    dtype = torch.float16 if precision == "fp16" else torch.float32
    _, lamb, update = make(dtype, LossScale.for_precision(precision, 0.0), optimizer)
    lamb.may_read = False  # as on a GPU
    micro_batches: list[PackedBatch] = BATCHES[:2]
    update(micro_batches)
    with NoReading():
        for _ in range(3):
            update(micro_batches)
    assert update.outcomes.num_unread == 4
    with pytest.raises(AssertionError, match="waits"), NoReading():
        lamb.gradient_norm.item()
