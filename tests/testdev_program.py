"""Runs where torch_testdev can be imported; prints the name of each check that held.

A type of device is renamed for a whole process, so that these checks need one of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bert_pretraining.data.packing import on_device
from bert_pretraining.errors import UserError
from bert_pretraining.kernels import select
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.optim import OptimizerSettings, create_optimizer
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.process_group import choose_backend
from helpers import packed, padded_arrays, tiny_config

DEVICE, OTHER = "testdev:0", "testdev:1"


def refused(call: object) -> str:
    """The message of the RuntimeError that the call must raise."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("it was not refused")


def the_type_is_found() -> None:
    assert devices.resolve("testdev") == "testdev"  # imports torch_testdev
    assert devices.types() == ["testdev"]
    assert devices.seen() == "testdev"
    assert devices.count("testdev") == 2
    assert devices.name(torch.device(DEVICE)) == "Test device"
    assert devices.capability(torch.device(DEVICE)) is None


def a_rank_gets_its_own_device() -> None:
    chosen = devices.choose("auto", 1)
    assert str(chosen.device) == OTHER
    assert chosen.notices == ("--device auto chose testdev",)
    assert str(torch.ones(1, device="testdev").device) == OTHER
    try:
        devices.choose("testdev", 2)
    except UserError as error:
        assert "2 devices of type testdev" in error.problem
    else:
        raise AssertionError("there is no third device")
    assert str(devices.choose("testdev", 0).device) == DEVICE


def tensors_of_two_devices_are_refused() -> None:
    here, there, host = (torch.ones(2, 2, device=one) for one in (DEVICE, OTHER, "cpu"))
    for other in (there, host):
        for call in (
            lambda other=other: here + other,
            lambda other=other: here @ other,
            lambda other=other: other @ here,
            lambda other=other: torch.cat([other, here]),
            lambda other=other: here.index_select(0, other[0].long()),
        ):
            message = refused(call).lower()
            assert "expected all tensors to be on" in message, message
    refused(lambda: torch.zeros((), device="cpu").add_(here.sum()))
    assert (here * torch.tensor(2.0)).sum().item() == 8.0  # a number, as everywhere in PyTorch


def a_batch_in_main_memory_is_refused() -> None:
    batch = packed(padded_arrays([7, 3, 5], 16, 101))
    module = model_on(DEVICE)
    assert "expected all tensors to be on" in refused(lambda: module(batch)).lower()
    module(batch.to(torch.device(DEVICE)))


def the_decoder_stays_the_word_embedding() -> None:
    module = model_on(DEVICE)
    module.to(torch.bfloat16)
    weight = module.bert.embeddings.word_embeddings.weight
    assert module.cls.predictions.decoder.weight is weight
    assert weight.dtype == torch.bfloat16
    names = [name for name, _ in module.named_parameters()]
    assert names == [name for name, _ in model_on("cpu").named_parameters()]


def what_the_device_lacks_is_known() -> None:
    device = torch.device(DEVICE)
    assert devices.streams(device) is None
    assert devices.graphs(device) is None
    assert not devices.can_pin(device)
    assert devices.wide(device) == torch.float32
    assert devices.supports(device, torch.bfloat16)
    assert not devices.supports(device, torch.float16)
    assert devices.backend("testdev") is None
    devices.synchronize(device)
    devices.synchronize_used()


def batches_come_without_streams_too() -> None:
    given = [packed(padded_arrays([length, 4], 16, 101)) for length in (3, 5, 9)]
    for batch, arrived in zip(given, on_device(iter(given), torch.device(DEVICE)), strict=True):
        for name, value in arrived.tensors().items():
            assert str(value.device) == DEVICE
            assert torch.equal(value.cpu(), batch.tensors()[name])


def memory_is_counted() -> None:
    device = torch.device(DEVICE)
    devices.reset_peak_memory(device)
    before = devices.memory(device)
    kept = torch.ones(1000, device=device)
    del kept
    after = devices.memory(device)
    assert after.total == 2**30
    assert after.in_use == before.in_use
    assert after.peak == before.in_use + 4000


def random_numbers_are_the_devices_own() -> None:
    device = torch.device(DEVICE)
    torch.manual_seed(1)
    host, state = torch.get_rng_state(), devices.generator_state(device)
    draws = [torch.rand(5, device=device).cpu() for _ in range(2)]
    assert not torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), host)
    devices.set_generator_state(device, state)
    with devices.generators_kept(device):
        assert torch.equal(torch.rand(5, device=device).cpu(), draws[0])
        torch.rand(5)
    assert torch.equal(torch.get_rng_state(), host)
    assert torch.equal(torch.rand(5, device=device).cpu(), draws[0])


def the_ranks_exchange_through_main_memory() -> None:
    backend, notice = choose_backend("testdev", "nccl")
    assert backend == "gloo"
    assert "through main memory" in notice


def every_optimizer_updates_as_on_the_cpu() -> None:
    for name in ("auto", "reference", "foreach", "flat", "adamw"):
        expected, found = updated(name, "cpu"), updated(name, DEVICE)
        for one, other in zip(expected, found, strict=True):
            assert str(other.device) == DEVICE
            torch.testing.assert_close(other.cpu(), one, rtol=2e-6, atol=5e-7)


def a_step_that_is_not_finite_changes_nothing() -> None:
    (parameter,) = parameters = [nn.Parameter(torch.ones(3, device=DEVICE))]
    optimizer = create_optimizer("flat", [("weight", parameter)], OptimizerSettings())
    optimizer.zero_grad()
    parameter.grad.copy_(torch.tensor([1.0, torch.nan, 1.0]))
    assert not optimizer.step(0.1).item()
    assert torch.equal(parameters[0].detach().cpu(), torch.ones(3))
    assert [slot[0].sum().item() for slot in optimizer.slots.values()] == [0.0, 0.0]


def model_on(device: str) -> BertForPreTraining:
    config = tiny_config()
    kernels = select("torch", torch.device(device), torch.float32, config.head_size)
    return BertForPreTraining(config, kernels, seed=1).to(device)


def updated(name: str, device: str) -> list[Tensor]:
    """The parameters of a model after three updates with random gradients."""
    module = model_on(device)
    optimizer = create_optimizer(name, module.named_parameters(), OptimizerSettings())
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        optimizer.zero_grad()
        for parameter in module.parameters():
            gradient = torch.randn(parameter.shape, generator=generator).to(device)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.copy_(gradient)
        assert optimizer.step(0.01).item()
    return [parameter.detach() for parameter in module.parameters()]


CHECKS = (
    the_type_is_found,
    a_rank_gets_its_own_device,
    tensors_of_two_devices_are_refused,
    a_batch_in_main_memory_is_refused,
    the_decoder_stays_the_word_embedding,
    what_the_device_lacks_is_known,
    batches_come_without_streams_too,
    memory_is_counted,
    random_numbers_are_the_devices_own,
    the_ranks_exchange_through_main_memory,
    every_optimizer_updates_as_on_the_cpu,
    a_step_that_is_not_finite_changes_nothing,
)

if __name__ == "__main__":
    for check in CHECKS:
        check()
        print(check.__name__, flush=True)
