"""Compares sharded with unsharded LAMB, bit for bit. torchrun runs it on gloo ranks."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from bert_pretraining.optim import Optimizer, ShardedLamb, create_optimizer, sharded_lamb
from bert_pretraining.optim.buckets import AT_A_TIME
from bert_pretraining.optim.flat_torch import TorchKernels
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


def sharded_of(parameters: dict[str, Tensor], bucket: int) -> ShardedLamb:
    masters = {name: value.detach().clone() for name, value in parameters.items()}
    if next(iter(masters.values())).element_size() < 4:
        masters = {name: value.float() for name, value in masters.items()}
    return ShardedLamb(parameters.items(), SETTINGS, masters, kernels=TorchKernels(), bucket=bucket)


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


def reduce_by_hand(parameters: dict[str, Tensor], world_size: int) -> None:
    """The mean of the ranks' gradients, as DistributedDataParallel makes it."""
    for parameter in parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.mul_(1.0 / world_size)
        dist.all_reduce(parameter.grad)


class Sending:
    """Counts the buckets that were sent, and those whose end was not yet waited for."""

    def __init__(self) -> None:
        self.begun = 0
        self.waiting = 0
        self._send = sharded_lamb.reduce_scatter

    def __call__(self, shard: Tensor, gradient: Tensor) -> mock.Mock:
        self.begun += 1
        self.waiting += 1
        work = self._send(shard, gradient)

        def wait() -> None:
            work.wait()
            self.waiting -= 1

        return mock.Mock(wait=wait)


@contextlib.contextmanager
def watched() -> Iterator[Sending]:
    sending = Sending()
    with mock.patch.object(sharded_lamb, "reduce_scatter", sending):
        yield sending


def values_of(optimizer: Optimizer) -> list[Tensor]:
    return [optimizer.gradient_norm, *(parameter.detach() for parameter in optimizer.parameters)]


def compare(ranks: process_group.Ranks, dtype: torch.dtype, bucket: int) -> None:
    weights, _, rates = case(seed=5, scale=1.0, steps=STEPS, shapes=SHAPES)
    parameters, plain_parameters = parameters_of(weights, dtype), parameters_of(weights, dtype)
    sharded = sharded_of(parameters, bucket)
    plain = create_optimizer("flat", plain_parameters.items(), SETTINGS, sharing="replicated")
    assert len(sharded.shard.master) * ranks.world_size == sharded.layout.length
    for step, rate in enumerate(rates):
        for optimizer in (sharded, plain):
            optimizer.zero_grad()
        gradients = rank_gradients(step, ranks.rank, dtype)
        for last in (False, True):
            backward(plain_parameters, gradients)
            with sharded.overlap(last), watched() as sending:
                backward(parameters, gradients)
            assert sending.waiting <= AT_A_TIME
            # Buckets are sent during backward, unless they wait for a missing gradient.
            assert (sending.begun > 0) == (last and (step % 2 == 0 or bucket == SMALL_BUCKET))
        sharded.finish_reduction()
        reduce_by_hand(plain_parameters, ranks.world_size)
        assert sharded.step(rate, 0.5)
        assert plain.step(rate, 0.5)
        assert_same_bits(values_of(plain), values_of(sharded))
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
    before = [one.clone() for one in values_of(sharded)[1:]]
    sharded.zero_grad()
    gradients = rank_gradients(0, ranks.rank, dtype)
    if ranks.rank == ranks.world_size - 1:
        gradients["word.bias"][3] = torch.nan
    with sharded.overlap(last=True):
        backward(parameters, gradients)
    sharded.finish_reduction()
    assert not sharded.step(0.1)
    assert_same_bits(before, values_of(sharded)[1:])
    assert sharded.updates == STEPS

    # The state equals the unsharded one, and each optimizer can load the other's.
    state, expected = sharded.state_dict(), plain.state_dict()
    assert bool(state) == ranks.is_main
    if ranks.is_main:
        assert state["updates"] == expected["updates"]
        for key in ("master", "first_moment", "second_moment"):
            assert list(state[key]) == list(SHAPES)
            assert_same_bits(list(expected[key].values()), list(state[key].values()))
    file = io.BytesIO()
    torch.save(expected, file)
    file.seek(0)
    fresh_parameters = parameters_of({name: 0 * value for name, value in weights.items()}, dtype)
    fresh = sharded_of(fresh_parameters, bucket)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for optimizer, its in ((fresh, fresh_parameters), (plain, plain_parameters)):
        optimizer.zero_grad()
        backward(its, rank_gradients(7, ranks.rank, dtype))
    fresh.finish_reduction()
    reduce_by_hand(plain_parameters, ranks.world_size)
    assert fresh.step(0.01)
    assert plain.step(0.01)
    assert_same_bits(values_of(plain), values_of(fresh))


def clip_each_rank_first(ranks: process_group.Ranks) -> None:
    """finish_reduction(limit): each rank clips by its own norm before the mean is taken."""
    weights = case(seed=6, scale=1.0, steps=1, shapes=SHAPES)[0]
    parameters = parameters_of(weights, torch.float64)
    sharded = sharded_of(parameters, 4096)
    gradients = [rank_gradients(0, rank, torch.float64) for rank in range(ranks.world_size)]
    sharded.zero_grad()
    with sharded.overlap(last=False):
        backward(parameters, gradients[ranks.rank])
    limit = 0.7 if ranks.rank == 0 else 1e6  # only rank 0 clips
    sharded.finish_reduction(torch.tensor(limit, dtype=torch.float64))
    assert sharded.step(0.01)
    norm = sum(value.square().sum() for value in gradients[0].values()).sqrt()
    assert norm > 0.7
    gradients[0] = {name: value * (0.7 / norm) for name, value in gradients[0].items()}
    mean = {
        name: sum(found[name] for found in gradients).numpy() / ranks.world_size for name in SHAPES
    }
    assert_near(parameters, numpy_lamb(weights, [mean], [0.01], DECAYED), 1e-11)


def main() -> None:
    ranks = process_group.start("cpu", "gloo")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for bucket in (SMALL_BUCKET, 9000, 2**20):
            compare(ranks, dtype, bucket)
    clip_each_rank_first(ranks)
    process_group.barrier(ranks.device)
    sys.stdout.write(f"rank {ranks.rank} is right\n")
    process_group.stop()


if __name__ == "__main__":
    main()
