"""What the ranks send each other: the messages of one update, and the memory of the state."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from bert_pretraining.bench.optimizer import shapes_of
from bert_pretraining.config import Config
from bert_pretraining.kernels import DTYPES
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.optim import OPTIMIZERS
from bert_pretraining.optim.buckets import BUCKET
from bert_pretraining.optim.flat import BLOCK, FlatLayout
from bert_pretraining.optim.sharded_lamb import bucket_length

DDP_BUCKET = 25 * 2**20  # bytes: the default of torch's DistributedDataParallel, which others use
MOMENTS, MASTER = 2 * 4, 4  # bytes of a parameter, in float32
SUM = 4  # bytes of a block's sum of squares
SUMS_OF_BLOCKS = (1, 2)  # of gradients; of weights and of their updates


@dataclass(frozen=True)
class Messages:
    """What one update exchanges.

    parameters: of the model, without padding. gradients: bytes of each message, in the order in
    which backward completes them. weights: bytes of all weights. overlaps: whether a message is
    sent as soon as it is complete, or all after the backward pass. sums: bytes of each message by
    which ranks with a sharded state learn the norms of all parameters.
    """

    parameters: int
    gradients: tuple[float, ...]
    weights: float
    overlaps: bool
    sums: tuple[float, ...] = ()

    @property
    def bytes(self) -> float:
        """Of all gradients."""
        return float(sum(self.gradients))


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank that do not depend on the batch."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def weight_dtype(config: Config) -> torch.dtype:
    """In which weights are held: fp8 layers have weights of 16 bits."""
    precision = config.resolved_precision
    return DTYPES["bf16" if precision == "fp8" else precision]


def gradient_dtype(config: Config) -> torch.dtype:
    """In which the gradients of the ranks are added."""
    return torch.float32 if config.gradient_dtype == "fp32" else weight_dtype(config)


def messages_of(
    config: Config, model: BertConfig, ranks: int, is_sharded: bool | None = None
) -> Messages:
    """The messages of an update of this configuration on so many ranks, by the layout itself.

    is_sharded: whether the ranks share the optimizer's state (default: as configured).
    """
    if is_sharded is None:
        is_sharded = config.distributed_lamb
    shapes = list(_shapes(model))
    element = gradient_dtype(config).itemsize
    count = sum(shape.numel() for shape in shapes)
    layout, length, sums = FlatLayout(shapes), BUCKET, ()
    if is_sharded and ranks > 1:
        length = bucket_length(layout.length, BUCKET, ranks)
        layout = FlatLayout(shapes, length)
        sums = tuple(SUM * rows * layout.length / BLOCK for rows in SUMS_OF_BLOCKS)
    elif not is_flat(config):
        layout, length = FlatLayout(shapes), DDP_BUCKET // element
    sent = [min(length, layout.length - start) for start in range(0, layout.length, length)]
    if not is_flat(config) and config.clip_gradients == "before_reduction":
        sent = [shape.numel() for shape in shapes]  # one by one, see ClippedReduction
    follows = config.use_cuda_graph or config.clip_gradients == "before_reduction"
    return Messages(
        count,
        tuple(float(elements * element) for elements in sent),
        float(layout.length * weight_dtype(config).itemsize),
        not follows,
        sums,
    )


@functools.cache
def _shapes(model: BertConfig) -> tuple[torch.Size, ...]:
    return tuple(shapes_of(model).values())


def is_flat(config: Config) -> bool:
    """Whether the optimizer has a flat gradient, and sends its buckets itself; auto has one."""
    return config.optimizer == "auto" or OPTIMIZERS[config.optimizer].flat


def memory_of(config: Config, messages: Messages, ranks: int) -> Memory:
    """Weights, gradients and optimizer state of a rank.

    The optimizer's state are two moments and, beside weights of 16 bits, a master weight, in
    float32. Sharded, a rank holds the state of its part only, with the gradient and the new
    weights of that part (see optim/sharded_lamb.py).
    """
    weight, is_narrow = messages.weights, weight_dtype(config).itemsize < 4
    elements = weight / weight_dtype(config).itemsize
    if config.distributed_lamb and ranks > 1:
        rounded = weight if is_narrow else 0.0
        state = (MOMENTS + MASTER) * elements + messages.bytes + rounded
        return Memory(weight, messages.bytes, state / ranks)
    state = (MOMENTS + (MASTER if is_narrow else 0)) * elements
    return Memory(weight, messages.bytes, state)
