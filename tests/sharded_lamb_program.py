"""Compares LAMB that reduces gradients itself with LAMB that does not, bit for bit.

It is sharded or not. torchrun runs this on gloo ranks; the argument is "flat" or "triton", the
optimizer's name.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bert_pretraining.optim import (
    Optimizer,
    ShardedLamb,
    create_optimizer,
    flat_lamb,
    sharded_lamb,
)
from bert_pretraining.optim.buckets import AT_A_TIME
from bert_pretraining.optim.flat_lamb import FlatLamb
from bert_pretraining.optim.flat_torch import TorchKernels
from bert_pretraining.optim.flat_triton import TritonKernels
from bert_pretraining.runtime import process_group
from lamb_cases import SETTINGS, assert_near, assert_same_bits, case, numpy_lamb, parameters_of

# Sizes: one element, below and above a block, above a bucket; not multiples of a number of ranks.
SHAPES = {
    "word.weight": (131, 97),
    "word.bias": (131,),
    "one.bias": (1,),
    "query.weight": (64, 48),
    "LayerNorm.weight": (1025,),
    "small.weight": (3, 7),
}
DECAYED = {"word.weight", "query.weight", "small.weight"}
STEPS = 4
SMALL_BUCKET = 1024  # its buckets end before the parameter without a gradient


@dataclass(frozen=True)
class Case:
    """How one optimizer reduces gradients.

    way: "autograd" makes all gradients, or some come "by hand", other ones in each micro-batch; or
    they come "late": nothing is sent during backward.
    """

    dtype: torch.dtype
    gradient_dtype: torch.dtype
    bucket: int
    sharded: bool
    way: str
    name: str = "flat"

    def optimizer(self, parameters: dict[str, Tensor]) -> FlatLamb:
        masters = {name: value.detach().clone() for name, value in parameters.items()}
        if self.dtype.itemsize < 4:
            masters = {name: value.float() for name, value in masters.items()}
        arguments = {
            "kernels": TorchKernels() if self.name == "flat" else TritonKernels(),
            "bucket": self.bucket,
            "gradient_dtype": self.gradient_dtype,
        }
        if self.sharded:
            return ShardedLamb(parameters.items(), SETTINGS, masters, **arguments)
        return FlatLamb(parameters.items(), SETTINGS, masters, reduces_gradients=True, **arguments)

    def plain(self, parameters: dict[str, Tensor]) -> Optimizer:
        return create_optimizer(
            self.name, parameters.items(), SETTINGS, gradient_dtype=self.gradient_dtype
        )

    def backward(
        self,
        optimizer: Optimizer,
        parameters: dict[str, Tensor],
        gradients: dict[str, Tensor],
        micro_batch: int,
    ) -> None:
        """As `backward`, but some gradients may come by hand."""
        if self.way != "by hand":
            backward(parameters, gradients)
            return
        ours = list(gradients)[micro_batch % 2 :: 2]
        for name in reversed(ours):
            optimizer.sink.target(parameters[name]).add_(gradients[name])
            optimizer.sink.arrived([parameters[name]])
        backward(parameters, {name: gradients[name] for name in gradients if name not in ours})


def cases(name: str) -> Iterator[Case]:
    kinds = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
    if name == "triton":
        for dtype, gradient_dtype in kinds:
            for sharded in (True, False):
                yield Case(dtype, gradient_dtype, 9000, sharded, "by hand", name)
        return
    kinds += [(dtype, dtype) for dtype in (torch.float64, torch.bfloat16)]
    kinds += [(torch.float16, torch.float32)]
    for sharded in (True, False):
        for dtype, gradient_dtype in kinds:
            for bucket in (SMALL_BUCKET, 9000, 2**20):
                yield Case(dtype, gradient_dtype, bucket, sharded, "autograd")
            for way in ("by hand", "late"):
                yield Case(dtype, gradient_dtype, 9000, sharded, way)


def backward(parameters: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    """A backward pass that makes these gradients, from the last parameter to the first."""
    total = 0.0
    for name, gradient in gradients.items():
        total = total + (parameters[name].double() * gradient.double()).sum()
    total.backward()


def rank_gradients(step: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradients of one micro-batch on a rank; in odd steps `one.bias` has none.

    They have few bits each, so that their mean over ranks is exact. Otherwise it would depend on
    gloo's order of addition, which differs with the position in a tensor and the amount sent.
    """
    (gradients,) = case(seed=100 * step + rank, scale=4.0, steps=1, shapes=SHAPES)[1]
    few_bits = dist.get_world_size() * 2.0**-6
    found = {
        name: (torch.tensor(value).round().clamp(-15, 15) * few_bits).to(dtype)
        for name, value in gradients.items()
    }
    if step % 2:
        del found["one.bias"]
    return found


def reduce_by_hand(optimizer: Optimizer) -> None:
    """The mean of the ranks' gradients, one by one."""
    for gradient in optimizer.gradients_by_name().values():
        gradient.mul_(1.0 / dist.get_world_size())
        dist.all_reduce(gradient)


class Sending:
    """Counts the buckets that were sent, and those whose end was not yet waited for."""

    def __init__(self, send: Callable[..., process_group.InProgress]) -> None:
        self.begun = 0
        self.waiting = 0
        self._send = send

    def __call__(self, *tensors: Tensor) -> mock.Mock:
        self.begun += 1
        self.waiting += 1
        work = self._send(*tensors)

        def wait() -> None:
            work.wait()
            self.waiting -= 1

        return mock.Mock(wait=wait)


@contextlib.contextmanager
def watched(sharded: bool) -> Iterator[Sending]:
    module, name = (sharded_lamb, "reduce_scatter") if sharded else (flat_lamb, "all_reduce")
    sending = Sending(getattr(module, name))
    with mock.patch.object(module, name, sending):
        yield sending


def values_of(optimizer: Optimizer) -> list[Tensor]:
    return [optimizer.gradient_norm, *(parameter.detach() for parameter in optimizer.parameters)]


def train(
    ranks: process_group.Ranks, its: Case, tested: FlatLamb, plain: Optimizer, rates: list[float]
) -> None:
    """Steps of two micro-batches with both optimizers, which must stay equal."""
    parameters = dict(zip(tested.names, tested.parameters, strict=True))
    plain_parameters = dict(zip(plain.names, plain.parameters, strict=True))
    for step, rate in enumerate(rates):
        for optimizer in (tested, plain):
            optimizer.zero_grad()
        gradients = rank_gradients(step, ranks.rank, its.dtype)
        for last in (False, True):
            backward(plain_parameters, gradients)
            sends = last and its.way != "late"
            with tested.overlap(sends), watched(its.sharded) as sending:
                its.backward(tested, parameters, gradients, step + last)
            assert sending.waiting <= AT_A_TIME
            # Buckets are sent during backward, unless they wait for a missing gradient.
            assert (sending.begun > 0) == (sends and (step % 2 == 0 or its.bucket == SMALL_BUCKET))
        tested.finish_reduction()
        reduce_by_hand(plain)
        assert tested.step(rate, 0.5)
        assert plain.step(rate, 0.5)
        assert_same_bits(values_of(plain), values_of(tested))


def compare(ranks: process_group.Ranks, its: Case) -> None:
    dtype = its.dtype
    weights, _, rates = case(seed=5, scale=1.0, steps=STEPS, shapes=SHAPES)
    parameters, plain_parameters = parameters_of(weights, dtype), parameters_of(weights, dtype)
    tested, plain = its.optimizer(parameters), its.plain(plain_parameters)
    held = tested.layout.length // (ranks.world_size if its.sharded else 1)
    assert len(tested.shard.master) == held
    train(ranks, its, tested, plain, rates)
    if dtype == torch.float64:
        means = []
        for step in range(STEPS):
            per_rank = [rank_gradients(step, rank, dtype) for rank in range(ranks.world_size)]
            # Two micro-batches times one half: the mean of the ranks' gradients.
            means.append({
                name: sum(found.get(name, torch.zeros(shape)) for found in per_rank).numpy()
                / ranks.world_size
                for name, shape in SHAPES.items()
            })  # fmt: skip
        assert_near(parameters, numpy_lamb(weights, means, rates, DECAYED), 1e-11)

    # A NaN on one rank makes all ranks skip the update.
    before = [one.clone() for one in values_of(tested)[1:]]
    tested.zero_grad()
    gradients = rank_gradients(0, ranks.rank, dtype)
    if ranks.rank == ranks.world_size - 1:
        gradients["word.bias"][3] = torch.nan
    with tested.overlap(last=True):
        backward(parameters, gradients)
    tested.finish_reduction()
    assert not tested.step(0.1)
    assert_same_bits(before, values_of(tested)[1:])
    assert tested.updates == STEPS
    compare_states(ranks, its, tested, plain)


def compare_states(
    ranks: process_group.Ranks, its: Case, tested: FlatLamb, plain: Optimizer
) -> None:
    """The state equals the other optimizer's, and a new optimizer goes on from it."""
    state, expected = tested.state_dict(), plain.state_dict()
    assert bool(state) == (ranks.is_main or not its.sharded)
    if state:
        assert state["updates"] == expected["updates"]
        for key in ("master", "first_moment", "second_moment"):
            assert list(state[key]) == list(SHAPES)
            assert_same_bits(list(expected[key].values()), list(state[key].values()))
    file = io.BytesIO()
    torch.save(expected, file)
    file.seek(0)
    zeros = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    fresh = its.optimizer(parameters_of(zeros, its.dtype))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for optimizer in (fresh, plain):
        optimizer.zero_grad()
        parameters = dict(zip(optimizer.names, optimizer.parameters, strict=True))
        backward(parameters, rank_gradients(7, ranks.rank, its.dtype))
    fresh.finish_reduction()
    reduce_by_hand(plain)
    assert fresh.step(0.01)
    assert plain.step(0.01)
    assert_same_bits(values_of(plain), values_of(fresh))


def clip_each_rank_first(ranks: process_group.Ranks, sharded: bool) -> None:
    """finish_reduction(limit): each rank clips by its own norm before the mean is taken."""
    weights = case(seed=6, scale=1.0, steps=1, shapes=SHAPES)[0]
    parameters = parameters_of(weights, torch.float64)
    tested = Case(torch.float64, torch.float64, 4096, sharded, "late").optimizer(parameters)
    gradients = [rank_gradients(0, rank, torch.float64) for rank in range(ranks.world_size)]
    tested.zero_grad()
    with tested.overlap(last=False):
        backward(parameters, gradients[ranks.rank])
    limit = 0.7 if ranks.rank == 0 else 1e6  # only rank 0 clips
    tested.finish_reduction(torch.tensor(limit, dtype=torch.float64))
    assert tested.step(0.01)
    norm = sum(value.square().sum() for value in gradients[0].values()).sqrt()
    assert norm > 0.7
    gradients[0] = {name: value * (0.7 / norm) for name, value in gradients[0].items()}
    mean = {
        name: sum(found[name] for found in gradients).numpy() / ranks.world_size for name in SHAPES
    }
    assert_near(parameters, numpy_lamb(weights, [mean], [0.01], DECAYED), 1e-11)


def a_gradient_that_comes_twice(sharded: bool) -> None:
    """Its bucket may have been sent without the second part: an error, not a wrong sum."""
    parameters = parameters_of(case(6, 1.0, 1, SHAPES)[0], torch.float32)
    tested = Case(torch.float32, torch.float32, 4096, sharded, "by hand").optimizer(parameters)
    tested.zero_grad()
    for last in (False, True):
        with tested.overlap(last):
            tested.sink.arrived([parameters["small.weight"]])
            try:
                tested.sink.arrived([parameters["small.weight"]])
            except RuntimeError as error:
                assert "small.weight" in str(error)
                assert last
            else:
                assert not last
    tested.finish_reduction()


def main() -> None:
    ranks = process_group.start("cpu", "gloo")
    for its in cases(sys.argv[1]):
        compare(ranks, its)
    for sharded in (True, False):
        clip_each_rank_first(ranks, sharded)
        a_gradient_that_comes_twice(sharded)
    process_group.barrier(ranks.device)
    sys.stdout.write(f"rank {ranks.rank} is right\n")
    process_group.stop()


if __name__ == "__main__":
    main()
